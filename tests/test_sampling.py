"""The sampler draws from the distribution it promises, from candidates and from whole rows alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qwq_jax.sampling import sample
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


def test_a_row_is_cut_alike_whatever_its_candidates(rng):
    """Ties at every cut included: the tokens are those of a sampler that has all of them as candidates."""
    logits = jnp.asarray(np.round(rng.standard_normal((2000, 97)) * 2, 1), jnp.float32)
    params = mixed(rng, (2000,))
    whole = run(logits, params, candidates=97).tokens
    np.testing.assert_array_equal(run(logits, params, candidates=5).tokens, whole)


@pytest.mark.parametrize("candidates", [5, 97])
def test_only_kept_tokens_come_and_all_of_them_do(candidates, rng):
    """Ties are kept in the order of their ids, as numpy's stable sort has it."""
    logits = np.round(rng.standard_normal(97), 1).astype(np.float32)
    setting = {"top_k": 11, "top_p": 0.8, "temperature": 3.0}
    tokens = run(jnp.broadcast_to(logits, (2000, 97)), arrays(2000, **setting), candidates=candidates).tokens
    np.testing.assert_array_equal(np.unique(tokens), np.flatnonzero(exact(logits, **setting)))


def test_zero_temperature_is_the_most_likely_token_and_logprobs_are_of_the_plain_logits(rng):
    logits = rng.standard_normal((3, V)).astype(np.float32)
    logits[0, [3, 7]] = 9.0
    out = run(jnp.asarray(logits), arrays(3, temperature=0.0, top_k=2), num_top=5, candidates=4)
    expected = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_array_equal(out.tokens, logits.argmax(-1))
    np.testing.assert_allclose(out.logprobs, expected.max(-1), rtol=1e-6)
    np.testing.assert_array_equal(out.top_ids, np.argsort(-logits, axis=-1, kind="stable")[:, :5])
    np.testing.assert_allclose(out.top_logprobs, -np.sort(-expected, axis=-1)[:, :5], rtol=1e-6)


def test_a_row_depends_on_its_seed_and_position_alone(rng):
    """Not on its batch mates, its place among them, their number, or whether likely tokens are reported."""
    logits = jnp.broadcast_to(jnp.asarray(rng.standard_normal(V), jnp.float32), (DRAWS, V))
    params, order = mixed(rng, (DRAWS,)), rng.permutation(DRAWS)
    one = functools.partial(run, candidates=4)
    tokens = np.asarray(one(logits, params).tokens)
    np.testing.assert_array_equal(one(logits, jax.tree.map(lambda x: x[order], params)).tokens, tokens[order])
    alone = [one(logits[:1], jax.tree.map(lambda x: x[i : i + 1], params)).tokens[0] for i in range(40)]  # noqa: B023
    np.testing.assert_array_equal(alone, tokens[:40])
    few = jax.tree.map(lambda x: x[:3], params)
    np.testing.assert_array_equal(one(logits[:3], few, num_top=5).tokens, tokens[:3])
    for changed in (params._replace(seed=params.seed + 1), params._replace(position=params.position + 1)):
        assert (np.asarray(one(logits, changed).tokens) != tokens).any()


def test_logits_without_bound_stay_finite():
    """Tokens of probability 0, and temperatures near 0, give no nan and no token that cannot come."""
    logits = jnp.asarray([[0.0, -jnp.inf, 1e4, -1e30], [-jnp.inf] * 3 + [5.0], [-3e38, -3e38, -jnp.inf, -jnp.inf]])
    for setting in ({}, {"temperature": 1e-7}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}):
        tokens = run(logits, arrays(3, **setting), candidates=1).tokens
        assert tokens[0] == 2 and tokens[1] == 3 and tokens[2] in (0, 1)


def test_neither_noise_nor_candidates_where_all_rows_take_the_most_likely(rng):
    """They are in the branch that is not taken, and nowhere else."""
    jaxpr = jax.make_jaxpr(sample)(jnp.zeros((2, V)), arrays(2))
    outside = {equation.primitive.name for equation in jaxpr.eqns}
    assert "cond" in outside and not outside & {"top_k", "sort", "threefry2x32"}


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.7])
def test_scaled_logprobs_are_those_of_the_distribution_drawn_from(temperature, rng):
    logits = 3 * rng.standard_normal((50, V)).astype(np.float32)
    out = jax.jit(lambda x, p: sample(x, p, num_top=3, scaled_logprobs=True))(
        jnp.asarray(logits), arrays(50, temperature=temperature)
    )
    expected = np.asarray(jax.nn.log_softmax(logits / (temperature or 1.0)))
    np.testing.assert_allclose(out.logprobs, expected[np.arange(50), out.tokens], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.top_logprobs, -np.sort(-expected, axis=-1)[:, :3], rtol=1e-5, atol=1e-6)
