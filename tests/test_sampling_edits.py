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


def penalties(rows, presence=0.0, frequency=0.0, repetition=1.0):
    full = lambda value: jnp.full((rows,), value, jnp.float32)  # noqa: E731
    many = lambda ids: jnp.broadcast_to(jnp.asarray([*ids, -1], jnp.int32), (rows, len(ids) + 1))  # noqa: E731
    prompted = count_tokens(many(PROMPT), V) > 0
    return Penalties(full(presence), full(frequency), full(repetition), count_tokens(many(GENERATED), V), prompted)


def edited(logits, edits):
    """The logits that the sampler draws from, found out: greedy, one token banned after the other."""
    row, ids = jnp.asarray(logits)[None], []
    for _ in range(V):
        banned = jnp.asarray([[*ids, *[-1] * (V - len(ids))]], jnp.int32)
        ids.append(int(run(row, arrays(1, temperature=0.0), edits=edits._replace(banned=banned)).tokens[0]))
    return ids


def openai(logits, presence, frequency):
    """The formula of OpenAI's API reference."""
    counts = np.bincount(GENERATED, minlength=V)
    return logits - counts * frequency - (counts > 0) * presence


def test_repetition_penalty_is_that_of_transformers(rng):
    logits = rng.standard_normal(V).astype(np.float32) * 3
    for penalty in (1.4, 0.6):
        processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        expected = processor(torch.tensor([PROMPT + GENERATED]), torch.tensor(logits[None]))[0].numpy()
        assert edited(logits, LogitEdits(penalties(1, repetition=penalty))) == list(np.argsort(-expected))
        tokens = run(
            jnp.broadcast_to(logits, (DRAWS, V)), arrays(DRAWS), edits=LogitEdits(penalties(DRAWS, repetition=penalty))
        ).tokens
        check_distribution(tokens, exact(expected))


@pytest.mark.parametrize("candidates", [128, 4], ids=["candidates", "whole rows"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_edited_distribution(setting, candidates, rng):
    """All edits at once under every cut, and the log-probabilities stay those of the plain logits."""
    logits = rng.standard_normal(V).astype(np.float32) * 1.5
    allowed = np.ones(V, bool)
    allowed[[0, 12]] = False
    edits = LogitEdits(
        penalties(DRAWS, presence=0.4, frequency=-0.2, repetition=1.2),
        Bias(jnp.tile(jnp.asarray([[3, 9, -1]]), (DRAWS, 1)), jnp.tile(jnp.asarray([[1.5, -0.7, 50.0]]), (DRAWS, 1))),
        jnp.tile(jnp.asarray([[5, -1]]), (DRAWS, 1)),
        jnp.tile(pack_bits(allowed)[None], (DRAWS, 1)),
    )
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.2)
    expected = processor(torch.tensor([PROMPT + GENERATED]), torch.tensor(logits[None]))[0].numpy()
    expected = openai(expected, 0.4, -0.2)
    expected[3] += 1.5
    expected[9] -= 0.7
    expected[[0, 5, 12]] = -np.inf
    out = run(
        jnp.broadcast_to(logits, (DRAWS, V)), arrays(DRAWS, **setting), edits=edits, candidates=candidates, num_top=2
    )
    check_distribution(out.tokens, exact(expected, **setting))
    plain = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(out.logprobs, plain[np.asarray(out.tokens)], rtol=1e-5)
    np.testing.assert_array_equal(out.top_ids[0], np.argsort(-logits)[:2])


def test_edits_of_one_row_leave_the_others_alone(rng):
    logits = jnp.asarray(rng.standard_normal((2, 3, V)), jnp.float32)
    best = np.array(logits.argmax(-1))
    banned = np.full((2, 3, 1), -1, np.int32)
    banned[1, 2] = best[1, 2]
    tokens = np.asarray(
        run(logits, arrays((2, 3), temperature=0.0), edits=LogitEdits(banned=jnp.asarray(banned))).tokens
    )
    assert tokens[1, 2] != best[1, 2]
    best[1, 2] = tokens[1, 2]
    np.testing.assert_array_equal(tokens, best)


@pytest.mark.parametrize("size", [32, 75])
def test_every_bit_of_a_mask_is_its_token(size):
    only = jnp.asarray(pack_bits(np.eye(size, dtype=bool)))
    for temperature in (0.0, 1.0):
        params = arrays(size, temperature=temperature)
        tokens = run(jnp.zeros((size, size)), params, edits=LogitEdits(allowed=only)).tokens
        np.testing.assert_array_equal(tokens, np.arange(size))


def test_a_row_that_nothing_is_left_of_is_token_0():
    nothing = LogitEdits(allowed=jnp.zeros((2, 1), jnp.uint32))
    for setting in ({"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 2}):
        for candidates in (2, 128):
            tokens = run(jnp.zeros((2, V)), arrays(2, **setting), edits=nothing, candidates=candidates).tokens
            np.testing.assert_array_equal(tokens, 0)


def test_counts():
    ids = jnp.asarray([[[2, 2, -1, 0]], [[-1, -1, -1, -1]]], jnp.int32)
    np.testing.assert_array_equal(count_tokens(ids, 4), [[[1, 0, 2, 0]], [[0, 0, 0, 0]]])
