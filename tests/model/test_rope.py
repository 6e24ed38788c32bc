import re

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.model.rope import inverse_frequencies, rotary_tables, rotate

LAYERS = 4


def test_a_cosine_is_computed_once_for_all_layers(tiny_config):
    """XLA for CPUs would draw it into the rotation of each layer, and of each head there."""

    def layers(positions, x):
        tables = rotary_tables(positions, tiny_config)
        for _ in range(LAYERS):
            x = rotate(x, *tables) @ jnp.ones((x.shape[-1], x.shape[-1]))
        return x

    x = jnp.zeros((32, tiny_config.num_heads, tiny_config.head_dim))
    text = jax.jit(layers).lower(jnp.zeros(32, jnp.int32), x).compile().as_text()
    assert len(re.findall(r" cosine\(", text)) == 1


def test_tables_are_the_cosines_and_sines_to_the_last_bit(tiny_config):
    positions = jnp.asarray(np.r_[0:500, 131_000:131_072], jnp.int32)
    angles = positions[:, None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(tiny_config))
    found = jax.jit(lambda positions: rotary_tables(positions, tiny_config))(positions)
    wanted = jax.jit(lambda angles: (jnp.cos(angles), jnp.sin(angles)))(angles)
    for left, right in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(left, right)
