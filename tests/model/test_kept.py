"""Where some tokens are wanted, their hidden states are as ever, and the last layer does no more for the others."""

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.config.model import ModelConfig
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import bind, random_params
from qwq_jax.plan.hlo import matrix_flops, parse


def test_kept_tokens_are_those_of_all_and_the_others_cost_nothing(
    tiny_config: ModelConfig, rng: np.random.Generator
) -> None:
    model = bind(tiny_config, random_params(tiny_config, jax.random.key(0)), dtype=jnp.float32)
    B, T = 2, 9
    tokens = jnp.asarray(rng.integers(0, tiny_config.vocab_size, (B, T)))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    kept = jnp.array([[8, 0, 3], [5, 5, 1]])

    def hidden(kept: jax.Array | None) -> jax.Array:
        return model(tokens, positions, causal_attend(None), kept=kept)[0]

    compiled = {name: jax.jit(hidden).lower(which).compile() for name, which in (("all", None), ("kept", kept))}
    whole = np.asarray(compiled["all"](None))
    expected = np.take_along_axis(whole, np.asarray(kept)[..., None], axis=1)
    assert np.abs(expected[0, 0] - expected[0, 1]).max() > 0.1
    np.testing.assert_allclose(compiled["kept"](kept), expected, rtol=1e-5, atol=1e-5)
    flops = {name: matrix_flops(parse(each.as_text()), "ENTRY") for name, each in compiled.items()}
    after_attention = tiny_config.hidden_size * (
        tiny_config.num_heads * tiny_config.head_dim + 3 * tiny_config.intermediate_size
    )
    assert flops["all"] - flops["kept"] == 2 * B * (T - kept.shape[1]) * after_attention
