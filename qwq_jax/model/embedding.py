"""Rows of the token embedding, in the dtype that the model computes in."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def look_up(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    """The rows of `table [V, D]` that tokens name, `[..., D]` in `dtype`.

    They are cast before they are gathered, so that devices which share a table exchange, and the compiler orders, half
    as many bytes of a float32 table that is computed with in 16 bits. The sums of its gradient keep the table's dtype.
    """
    if jnp.dtype(dtype).itemsize >= table.dtype.itemsize:
        return _gather(table, tokens).astype(dtype)
    return _cast_first(table, tokens, dtype, (table.shape, table.dtype))


def _gather(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return table.at[tokens].get(mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cast_first(table: jax.Array, tokens: jax.Array, dtype: Any, stored: Any) -> jax.Array:
    return _gather(table.astype(dtype), tokens)


def _forward(table: jax.Array, tokens: jax.Array, dtype: Any, stored: Any) -> tuple[jax.Array, jax.Array]:
    return _cast_first(table, tokens, dtype, stored), tokens


def _backward(dtype: Any, stored: Any, tokens: jax.Array, d_rows: jax.Array) -> tuple[jax.Array, None]:
    table = jax.ShapeDtypeStruct(*stored)
    (gradient,) = jax.linear_transpose(lambda table: _gather(table, tokens), table)(d_rows.astype(table.dtype))
    return gradient, None


_cast_first.defvjp(_forward, _backward)
