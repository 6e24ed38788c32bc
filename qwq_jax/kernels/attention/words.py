"""Rows of narrow elements seen as 32-bit words, in which they can be masked on every chip."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention.flash import LANES


def field_mask(words: int, pack: int, low: Any, high: Any) -> jax.Array:
    """`[words, 128]` int32 with all bits of rows `low <= row < high` set, `pack` rows a word, the first one lowest."""
    row = jax.lax.broadcasted_iota(jnp.int32, (words, LANES), 0) * pack
    bits = 32 // pack
    fields = np.uint32((1 << bits) - 1) << np.arange(0, 32, bits, dtype=np.uint32)
    parts = [
        jnp.where((row + i >= low) & (row + i < high), int(field), 0) for i, field in enumerate(fields.view(np.int32))
    ]
    return functools.reduce(jnp.bitwise_or, parts)


def as_words(x: jax.Array) -> jax.Array:
    """`[rows, H]` of any width of element as words `[rows / pack, H]`."""
    return x if x.dtype == jnp.int32 else pltpu.bitcast(x, jnp.int32)


def merge_rows(old: jax.Array, new_words: jax.Array, low: Any, high: Any) -> jax.Array:
    """Rows `low <= row < high` of `old [rows, H]` replaced by those of `new_words`."""
    pack = 4 // old.dtype.itemsize
    words = as_words(old)
    mask = jnp.concatenate([field_mask(words.shape[0], pack, low, high)] * (words.shape[1] // LANES), axis=1)
    return pltpu.bitcast((words & ~mask) | (new_words & mask), old.dtype)
