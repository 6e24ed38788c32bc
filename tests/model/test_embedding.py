"""Rows of the embedding: cast before they are gathered, with the gradient of rows that are cast afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.model.embedding import look_up


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rows_and_their_gradient(rng: np.random.Generator, dtype: type) -> None:
    table = jnp.asarray(rng.normal(size=(7, 16)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 7, (3, 50)), jnp.int32)
    d_rows = jnp.asarray(rng.normal(size=(3, 50, 16)), dtype)
    got, pull = jax.vjp(lambda table: look_up(table, tokens, dtype), table)
    want, pull_want = jax.vjp(lambda table: table[tokens].astype(dtype), table)
    np.testing.assert_array_equal(got, want)
    (gradient,), (wanted,) = pull(d_rows), pull_want(d_rows)
    assert got.dtype == dtype and gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, wanted)  # summed in float32, though rows repeat and are of 16 bits


def test_what_is_exchanged_is_of_16_bits() -> None:
    table = jax.ShapeDtypeStruct((7, 16), jnp.float32)
    tokens = jax.ShapeDtypeStruct((4,), jnp.int32)
    jaxpr = str(jax.make_jaxpr(lambda table, tokens: look_up(table, tokens, jnp.bfloat16))(table, tokens))
    assert "bf16[4,16] = gather" in jaxpr, jaxpr
