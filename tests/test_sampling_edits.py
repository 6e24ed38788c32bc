"""Penalties, biases and masks do what their inventors say, before anything is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from qwq_jax.sampling import Bias, LogitEdits, Penalties, count_tokens, sample
from tests.sampling_reference import SETTINGS, arrays, exact, pack_bits
from tests.test_sampling import check_distribution

V, DRAWS = 13, 20_000
PROMPT, GENERATED = [1, 1, 4, 7], [2, 4, 2, 2, 9]
run = jax.jit(sample, static_argnames=("num_top", "candidates"))


def edits_of(*, presence=0.0, frequency=0.0, repetition=1.0, bias=(), banned=(), allowed=None):
    """The same edits for all rows; of one shape, so that they share a program."""
    full = lambda value: jnp.full((DRAWS,), value, jnp.float32)  # noqa: E731
    many = lambda ids: jnp.tile(jnp.asarray([[*ids, *[-1] * (V - len(ids))]], jnp.int32), (DRAWS, 1))  # noqa: E731
    values = jnp.tile(jnp.asarray([[value for _, value in bias] + [50.0] * (V - len(bias))], jnp.float32), (DRAWS, 1))
    return LogitEdits(
        Penalties(
            full(presence),
            full(frequency),
            full(repetition),
            count_tokens(many(GENERATED), V),
            count_tokens(many(PROMPT), V) > 0,
        ),
        Bias(many([token for token, _ in bias]), values),
        many(banned),
        jnp.tile(pack_bits(np.ones(V, bool) if allowed is None else allowed)[None], (DRAWS, 1)),
    )


def drawn(logits, edits, candidates=4, **setting):
    return run(
        jnp.broadcast_to(logits, (DRAWS, V)), arrays(DRAWS, **setting), edits=edits, candidates=candidates, num_top=2
    )


def order_of(logits, **penalties):
    """All tokens, most likely first after the edits: greedy, one after the other banned."""
    ids = []
    for _ in range(V):
        ids.append(int(drawn(logits, edits_of(banned=ids, **penalties), temperature=0.0).tokens[0]))
    return ids


def openai(logits, presence, frequency):
    """The formula of OpenAI's API reference."""
    counts = np.bincount(GENERATED, minlength=V)
    return logits - counts * frequency - (counts > 0) * presence


@pytest.mark.parametrize("penalty", [1.4, 0.6])
def test_repetition_penalty_is_that_of_transformers(penalty, rng):
    logits = rng.standard_normal(V).astype(np.float32) * 3
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([PROMPT + GENERATED]), torch.tensor(logits[None]))[0].numpy()
    assert order_of(logits, repetition=penalty) == list(np.argsort(-expected))
    check_distribution(drawn(logits, edits_of(repetition=penalty)).tokens, exact(expected))


@pytest.mark.parametrize("candidates", [128, 4], ids=["candidates", "whole rows"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_edited_distribution(setting, candidates, rng):
    """All edits at once under every cut, and the log-probabilities stay those of the plain logits."""
    logits = rng.standard_normal(V).astype(np.float32) * 1.5
    allowed = np.ones(V, bool)
    allowed[[0, 12]] = False
    edits = edits_of(
        presence=0.4, frequency=-0.2, repetition=1.2, bias=[(3, 1.5), (9, -0.7)], banned=[5], allowed=allowed
    )
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.2)
    expected = processor(torch.tensor([PROMPT + GENERATED]), torch.tensor(logits[None]))[0].numpy()
    expected = openai(expected, 0.4, -0.2)
    expected[3] += 1.5
    expected[9] -= 0.7
    expected[[0, 5, 12]] = -np.inf
    out = drawn(logits, edits, candidates, **setting)
    check_distribution(out.tokens, exact(expected, **setting))
    plain = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(out.logprobs, plain[np.asarray(out.tokens)], rtol=1e-5)
    np.testing.assert_array_equal(out.top_ids[0], np.argsort(-logits)[:2])


def test_edits_of_one_row_leave_the_others_alone(rng):
    logits = rng.standard_normal(V).astype(np.float32)
    edits, best = edits_of(), int(logits.argmax())
    assert edits.banned is not None
    edits = edits._replace(banned=edits.banned.at[7, 3].set(best))
    tokens = np.asarray(drawn(logits, edits, temperature=0.0).tokens)
    assert np.flatnonzero(tokens != best).tolist() == [7]


def test_every_bit_of_a_mask_is_its_token():
    size = 75
    only = jnp.asarray(pack_bits(np.eye(size, dtype=bool)))
    for temperature in (0.0, 1.0):
        params = arrays(size, temperature=temperature)
        tokens = run(jnp.zeros((size, size)), params, edits=LogitEdits(allowed=only)).tokens
        np.testing.assert_array_equal(tokens, np.arange(size))


@pytest.mark.parametrize("candidates", [128, 4])
def test_a_row_that_nothing_is_left_of_is_token_0(candidates):
    nothing = edits_of(allowed=np.zeros(V, bool))
    for setting in ({"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 2}, {"top_k": 9}):
        np.testing.assert_array_equal(drawn(np.zeros(V, np.float32), nothing, candidates, **setting).tokens, 0)


def test_counts():
    ids = jnp.asarray([[[2, 2, -1, 0]], [[-1, -1, -1, -1]]], jnp.int32)
    np.testing.assert_array_equal(count_tokens(ids, 4), [[[1, 0, 2, 0]], [[0, 0, 0, 0]]])
