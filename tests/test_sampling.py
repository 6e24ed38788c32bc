"""The sampler draws from the distribution it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qwq_jax.sampling import SamplingArrays, sample

V, DRAWS = 13, 20_000


def arrays(n, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, start=0):
    full = lambda value, dtype: jnp.full((n,), value, dtype)  # noqa: E731
    return SamplingArrays(
        full(temperature, jnp.float32),
        full(top_k, jnp.int32),
        full(top_p, jnp.float32),
        full(min_p, jnp.float32),
        full(seed, jnp.uint32),
        jnp.arange(start, start + n, dtype=jnp.int32),
    )


def exact(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution in float64, by its definition: one token at a time, most likely first."""
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    order = np.argsort(-p)
    kept = order[: top_k or V]
    p = np.where(np.isin(np.arange(V), kept), p, 0)
    p /= p.sum()
    mass, chosen = 0.0, []
    for token in kept:
        if (mass < top_p or top_p >= 1) and p[token] >= min_p * p.max():
            chosen.append(token)
        mass += p[token]
    p = np.where(np.isin(np.arange(V), chosen), p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 0.6, "top_k": 6, "top_p": 0.95},
        {"temperature": 1.5, "top_p": 0.9, "min_p": 0.05, "top_k": 10},
        {"top_p": 1e-6},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(setting, rng):
    logits = rng.standard_normal(V).astype(np.float32) * 1.5
    tokens = jax.jit(sample)(jnp.broadcast_to(logits, (DRAWS, V)), arrays(DRAWS, **setting)).tokens
    counts, p = np.bincount(tokens, minlength=V), exact(logits, **setting)
    assert counts[p == 0].sum() == 0
    if (p > 0).sum() > 1:
        # Seeded, so this either always passes or never; 1e-3 leaves room for one unlucky seed in a thousand.
        assert stats.chisquare(counts[p > 0], p[p > 0] * DRAWS).pvalue > 1e-3


def test_zero_temperature_is_the_most_likely_token_and_logprobs_are_of_the_plain_logits(rng):
    logits = rng.standard_normal((3, V)).astype(np.float32)
    out = sample(jnp.asarray(logits), arrays(3, temperature=0.0, top_k=2), num_top=4)
    expected = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_array_equal(out.tokens, logits.argmax(-1))
    np.testing.assert_allclose(out.logprobs, expected.max(-1), rtol=1e-6)
    np.testing.assert_array_equal(out.top_ids, np.argsort(-logits, axis=-1)[:, :4])
    np.testing.assert_allclose(out.top_logprobs, -np.sort(-expected, axis=-1)[:, :4], rtol=1e-6)


def test_a_row_depends_on_its_seed_and_position_alone(rng):
    logits = jnp.asarray(rng.standard_normal((1, V)), jnp.float32)
    mixed = arrays(64)._replace(
        temperature=jnp.where(jnp.arange(64) % 2, 0.0, 1.0), top_p=jnp.where(jnp.arange(64) % 3, 1.0, 0.5)
    )
    batch = sample(jnp.broadcast_to(logits, (64, V)), mixed).tokens
    alone = [sample(logits, SamplingArrays(*(x[i : i + 1] for x in mixed))).tokens[0] for i in range(64)]
    np.testing.assert_array_equal(batch, alone)
    other = sample(jnp.broadcast_to(logits, (64, V)), mixed._replace(seed=mixed.seed + 1)).tokens
    assert (np.asarray(other) != np.asarray(batch)).any()
