"""The sampler draws from the distribution it promises, from candidates and from whole rows alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qwq_jax.sampling import SamplingArrays, sample
from tests.sampling_reference import SETTINGS, arrays, exact, mixed

V, DRAWS = 13, 20_000
run = jax.jit(sample, static_argnames=("num_top", "candidates"))


def check_distribution(tokens, p):
    """Chi-square at 1e-3: seeded, so this either always passes or never, and leaves room for one unlucky seed."""
    counts = np.bincount(np.ravel(tokens), minlength=len(p))
    assert counts[p == 0].sum() == 0
    if (p > 0).sum() > 1:
        assert stats.chisquare(counts[p > 0], p[p > 0] * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize("candidates", [128, 4], ids=["candidates", "whole rows"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_distribution(setting, candidates, rng):
    logits = rng.standard_normal(V).astype(np.float32) * 1.5
    tokens = run(jnp.broadcast_to(logits, (DRAWS, V)), arrays(DRAWS, **setting), candidates=candidates).tokens
    check_distribution(tokens, exact(logits, **setting))


def test_large_vocabularies_are_drawn_from_evenly():
    """Where the noise of many tokens is nearly the same, its resolution decides."""
    tokens = run(jnp.zeros((512, 100_000)), arrays(512)).tokens
    check_distribution(np.asarray(tokens) // 10_000, np.full(10, 0.1))


@pytest.mark.parametrize("candidates", [1, 5, 64])
def test_a_row_is_cut_alike_whatever_its_candidates(candidates, rng):
    """Ties at every cut included: the tokens are those of a sampler that has all of them as candidates."""
    logits = jnp.asarray(np.round(rng.standard_normal((200, 97)) * 2, 1), jnp.float32)
    params = mixed(rng, (200,))
    whole = run(logits, params, candidates=97).tokens
    np.testing.assert_array_equal(run(logits, params, candidates=candidates).tokens, whole)


@pytest.mark.parametrize("candidates", [2, 97])
def test_only_kept_tokens_come_and_all_of_them_do(candidates, rng):
    """Ties are kept in the order of their ids, as numpy's stable sort has it."""
    logits = np.round(rng.standard_normal(97), 1).astype(np.float32)
    setting = {"top_k": 11, "top_p": 0.8, "temperature": 3.0}
    tokens = run(jnp.broadcast_to(logits, (4000, 97)), arrays(4000, **setting), candidates=candidates).tokens
    np.testing.assert_array_equal(np.unique(tokens), np.flatnonzero(exact(logits, **setting)))


def test_zero_temperature_is_the_most_likely_token_and_logprobs_are_of_the_plain_logits(rng):
    logits = rng.standard_normal((3, V)).astype(np.float32)
    logits[0, [3, 7]] = 9.0
    out = sample(jnp.asarray(logits), arrays(3, temperature=0.0, top_k=2), num_top=4)
    expected = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_array_equal(out.tokens, logits.argmax(-1))
    np.testing.assert_allclose(out.logprobs, expected.max(-1), rtol=1e-6)
    np.testing.assert_array_equal(out.top_ids, np.argsort(-logits, axis=-1, kind="stable")[:, :4])
    np.testing.assert_allclose(out.top_logprobs, -np.sort(-expected, axis=-1)[:, :4], rtol=1e-6)


def test_reported_tokens_change_nothing_and_are_more_than_the_candidates_if_asked(rng):
    logits = jnp.asarray(rng.standard_normal((8, V)), jnp.float32)
    plain, reported = run(logits, arrays(8), candidates=2), run(logits, arrays(8), candidates=2, num_top=5)
    np.testing.assert_array_equal(plain.tokens, reported.tokens)
    np.testing.assert_array_equal(reported.top_ids, np.argsort(-logits, axis=-1)[:, :5])
    assert plain.top_ids.shape == (8, 0)


@pytest.mark.parametrize("candidates", [128, 3])
def test_a_row_depends_on_its_seed_and_position_alone(candidates, rng):
    logits = jnp.asarray(rng.standard_normal((1, V)), jnp.float32)
    params = mixed(rng, (64,))
    one = functools.partial(run, candidates=candidates)
    batch = one(jnp.broadcast_to(logits, (64, V)), params).tokens
    alone = [one(logits, SamplingArrays(*(x[i : i + 1] for x in params))).tokens[0] for i in range(64)]
    np.testing.assert_array_equal(batch, alone)
    for changed in (params._replace(seed=params.seed + 1), params._replace(position=params.position + 1)):
        assert (np.asarray(one(jnp.broadcast_to(logits, (64, V)), changed).tokens) != np.asarray(batch)).any()


def test_logits_without_bound_stay_finite():
    """Tokens of probability 0, and temperatures near 0, give no nan and no token that cannot come."""
    logits = jnp.asarray([[0.0, -jnp.inf, 1e4, -1e30], [-jnp.inf] * 3 + [5.0], [-3e38, -3e38, -jnp.inf, -jnp.inf]])
    for setting in ({}, {"temperature": 1e-7}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}):
        for candidates in (1, 4):
            tokens = run(logits, arrays(3, **setting), candidates=candidates).tokens
            assert tokens[0] == 2 and tokens[1] == 3 and tokens[2] in (0, 1)


def test_neither_noise_nor_candidates_where_all_rows_take_the_most_likely(rng):
    """They are in the branch that is not taken, and nowhere else."""
    jaxpr = jax.make_jaxpr(sample)(jnp.zeros((2, V)), arrays(2))
    outside = {equation.primitive.name for equation in jaxpr.eqns}
    assert "cond" in outside and not outside & {"top_k", "sort", "threefry2x32"}
