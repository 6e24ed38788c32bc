"""Token log-probabilities and entropies from hidden states, without ever holding all logits.

Logits of 32,768 tokens of a 152,064-word vocabulary are 20 GB in float32. Here a chunk of tokens at a time is
projected, reduced and forgotten; the backward pass recomputes it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, chunk: int = 512, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target token, and the entropy of the distribution it comes from.

    Args:
        hidden: `[B, T, D]` final hidden states; position t predicts `targets[:, t]`.
        head: `[V, D]` output projection.
        targets: `[B, T]` int32.
        chunk: Positions of T handled at once.
        temperature: Logits are divided by it, as the sampler divides them.

    Returns:
        Two float32 arrays `[B, T]`: log softmax(logits / temperature)[target], and the entropy in nats.
    """
    head = head.astype(hidden.dtype)

    @jax.checkpoint
    def part(h: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("btd,vd->btv", h, head, preferred_element_type=jnp.float32) / temperature
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
        logp = logits - normaliser[..., None]
        return chosen - normaliser, -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    return _in_chunks(part, hidden, targets, chunk)


def top_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, num_top: int, chunk: int = 64
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of each target token, and the most likely tokens in its place.

    Args:
        hidden: `[B, T, D]` final hidden states; position t predicts `targets[:, t]`.
        head: `[V, D]` output projection.
        targets: `[B, T]` int32; what is given for a negative one is arbitrary.
        num_top: How many of the most likely tokens.
        chunk: Positions of T handled at once.

    Returns:
        float32 `[B, T]`, int32 `[B, T, num_top]` with the most likely first, and their float32 `[B, T, num_top]`.
    """
    head = head.astype(hidden.dtype)

    def part(h: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = jnp.einsum("btd,vd->btv", h, head, preferred_element_type=jnp.float32)
        normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, jnp.maximum(y, 0)[..., None], axis=-1)
        top, ids = jax.lax.top_k(logits, num_top)
        return (chosen - normaliser)[..., 0], ids.astype(jnp.int32), top - normaliser

    return _in_chunks(part, hidden, targets, chunk)


def _in_chunks(
    part: Callable[..., tuple[jax.Array, ...]], hidden: jax.Array, targets: jax.Array, chunk: int
) -> tuple[Any, ...]:
    """`part(hidden, targets)` for a chunk of positions at a time."""
    B, T, _ = hidden.shape
    chunk = min(chunk, T)
    padding = -T % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    if padding + T == chunk:
        return part(hidden, targets)
    split = lambda x: x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
    parts = jax.lax.map(lambda c: part(*c), (split(hidden), split(targets)))
    return tuple(x.swapaxes(0, 1).reshape(B, -1, *x.shape[3:])[:, :T] for x in parts)
