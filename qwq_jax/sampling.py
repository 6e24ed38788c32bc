"""From logits to tokens, on the device.

The transforms come in the order of the reference implementation: temperature, top-k, top-p, min-p. Noise is drawn from
(seed, position) alone, so that a request's tokens depend neither on its batch mates nor on the mesh.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SamplingArrays(NamedTuple):
    """Sampling parameters of each row, all `[...]` of the same shape.

    Attributes:
        temperature: float32; 0 takes the most likely token.
        top_k: int32; 0 is off.
        top_p: float32; 1 is off.
        min_p: float32; 0 is off.
        seed: uint32.
        position: int32, position in its sequence of the token to be drawn.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    position: jax.Array


class Sampled(NamedTuple):
    """What `sample` returns.

    Attributes:
        tokens: `[...]` int32.
        logprobs: `[...]` float32, of the drawn token under the unmodified logits (temperature 1, nothing cut).
        top_ids: `[..., num_top]` int32, the most likely tokens, most likely first.
        top_logprobs: `[..., num_top]` float32, theirs.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def sample(logits: jax.Array, params: SamplingArrays, *, num_top: int = 0) -> Sampled:
    """Draws one token a row.

    Args:
        logits: `[..., V]` float32.
        params: Arrays `[...]`.
        num_top: How many of the most likely tokens to report; static.
    """
    shape, V = logits.shape[:-1], logits.shape[-1]
    flat = logits.reshape(-1, V)
    params = SamplingArrays(*(x.reshape(-1) for x in params))
    warm = params.temperature > 0
    tokens = jax.lax.cond(
        jnp.any(warm),
        lambda: jnp.where(warm, _draw(flat, params), jnp.argmax(flat, axis=-1)),
        lambda: jnp.argmax(flat, axis=-1),
    ).astype(jnp.int32)
    normaliser = jax.nn.logsumexp(flat, axis=-1)
    logprobs = jnp.take_along_axis(flat, tokens[:, None], axis=-1)[:, 0] - normaliser
    top, ids = jax.lax.top_k(flat, num_top)
    return Sampled(
        tokens.reshape(shape),
        logprobs.reshape(shape),
        ids.astype(jnp.int32).reshape(*shape, num_top),
        (top - normaliser[:, None]).reshape(*shape, num_top),
    )


def _draw(logits: jax.Array, params: SamplingArrays) -> jax.Array:
    """Gumbel-max over the kept tokens: argmax(logits/T + noise) is a draw from softmax(logits/T)."""
    scaled = logits / jnp.maximum(params.temperature, 1e-6)[:, None]
    cuts = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
    kept = jax.lax.cond(jnp.any(cuts), lambda: _cut(scaled, params), lambda: scaled)
    noise = jax.vmap(lambda seed, position: jax.random.gumbel(_key(seed, position), scaled.shape[-1:], jnp.float32))
    return jnp.argmax(kept + noise(params.seed, params.position), axis=-1)


def _key(seed: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), position)


def _cut(scaled: jax.Array, params: SamplingArrays) -> jax.Array:
    """Sets tokens outside top-k, top-p or min-p to minus infinity; the most likely token always stays."""
    V = scaled.shape[-1]
    ordered = -jnp.sort(-scaled, axis=-1)
    rank = jnp.arange(V)
    in_top_k = rank < jnp.where(params.top_k > 0, params.top_k, V)[:, None]
    probability = jax.nn.softmax(jnp.where(in_top_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    likely = probability >= params.min_p[:, None] * probability[:, :1]
    keep = in_top_k & likely & ((before < params.top_p[:, None]) | (params.top_p >= 1)[:, None])
    smallest = jnp.take_along_axis(ordered, jnp.maximum(jnp.sum(keep, axis=-1, keepdims=True), 1) - 1, axis=-1)
    return jnp.where(scaled >= smallest, scaled, -jnp.inf)
