"""Token log-probabilities and entropies from hidden states, without ever holding all logits.

Logits of 32,768 tokens of a 152,064-word vocabulary are 20 GB in float32. Here a chunk of tokens at a time is
projected, reduced and forgotten; the backward pass recomputes it.
"""

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
    B, T, D = hidden.shape
    chunk = min(chunk, T)
    padding = -T % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    head = head.astype(hidden.dtype)

    @jax.checkpoint
    def part(h: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("btd,vd->btv", h, head, preferred_element_type=jnp.float32) / temperature
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
        logp = logits - normaliser[..., None]
        return chosen - normaliser, -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    if padding + T == chunk:
        logprobs, entropy = part(hidden, targets)
    else:
        split = lambda x: x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
        logprobs, entropy = jax.lax.map(lambda c: part(*c), (split(hidden), split(targets)))
        logprobs, entropy = (x.swapaxes(0, 1).reshape(B, -1) for x in (logprobs, entropy))
    return logprobs[:, :T], entropy[:, :T]
