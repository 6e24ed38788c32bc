"""Chunked log-probs equal the plain ones, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.logprobs import token_logprobs


def plain(hidden, head, targets, temperature, weight):
    """Value and gradients in float64, by hand: d logp = (onehot - p) / T, d entropy = -p (logp + entropy) / T."""
    hidden, head, weight = (np.asarray(x, np.float64) for x in (hidden, head, weight))
    logits = hidden @ head.T / temperature
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    p, chosen = np.exp(logp), np.eye(head.shape[0])[targets]
    entropy = -(p * logp).sum(-1)
    slope = weight[0][..., None] * (chosen - p) - weight[1][..., None] * p * (logp + entropy[..., None])
    slope /= temperature
    return (chosen * logp).sum(-1), entropy, slope @ head, np.einsum("btv,btd->vd", slope, hidden)


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equal_to_the_plain_formula(chunk, temperature, rng):
    hidden = jnp.asarray(rng.standard_normal((2, 13, 8)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((31, 8)), jnp.float32)
    targets = rng.integers(0, 31, (2, 13))
    weight = jnp.asarray(rng.standard_normal((2, 2, 13)), jnp.float32)

    def scalar(hidden, head):
        logprob, entropy = token_logprobs(hidden, head, jnp.asarray(targets), chunk=chunk, temperature=temperature)
        return jnp.sum(weight[0] * logprob) + jnp.sum(weight[1] * entropy), (logprob, entropy)

    (_, values), gradients = jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(hidden, head)
    expected = plain(hidden, head, targets, temperature, weight)
    # Logits reach 15 and float32 keeps 7 digits of them: 2e-6, times a few tens of terms in each gradient.
    for ours, theirs in zip((*values, *gradients), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=1e-5)
