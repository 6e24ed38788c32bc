"""What the sampler has to do, in numpy and float64, by its definition: one token at a time, most likely first."""

import jax.numpy as jnp
import numpy as np

from qwq_jax.sampling import SamplingArrays

SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 0.6, "top_k": 6, "top_p": 0.95},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.05, "top_k": 10},
    {"top_k": 9, "min_p": 0.02},
    {"top_p": 1e-6},
]


def arrays(shape, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, start=0):
    shape = (shape,) if isinstance(shape, int) else shape
    full = lambda value, dtype: jnp.full(shape, value, dtype)  # noqa: E731
    return SamplingArrays(
        full(temperature, jnp.float32),
        full(top_k, jnp.int32),
        full(top_p, jnp.float32),
        full(min_p, jnp.float32),
        full(seed, jnp.uint32),
        jnp.arange(start, start + np.prod(shape), dtype=jnp.int32).reshape(shape),
    )


def exact(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution `[V]`."""
    logits = np.asarray(logits, np.float64)
    V = len(logits)
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
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


def mixed(rng, shape):
    """Rows of every kind side by side."""
    choose = lambda values, dtype: jnp.asarray(rng.choice(values, shape), dtype)  # noqa: E731
    return SamplingArrays(
        choose([0.0, 0.5, 1.0, 2.0], jnp.float32),
        choose([0, 1, 3, 20, 90], jnp.int32),
        choose([0.3, 0.9, 0.999, 1.0], jnp.float32),
        choose([0.0, 0.0, 0.05], jnp.float32),
        jnp.asarray(rng.integers(0, 2**32, shape), jnp.uint32),
        jnp.asarray(rng.integers(0, 2**17, shape), jnp.int32),
    )


def pack_bits(allowed):
    """`[..., V]` bool as `[..., ceil(V / 32)]` uint32."""
    V = allowed.shape[-1]
    padded = np.pad(allowed, [(0, 0)] * (allowed.ndim - 1) + [(0, -V % 32)])
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4")
