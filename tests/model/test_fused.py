"""Projections that are joined and turned for CPUs compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.config.model import ModelConfig
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import bind, fuse_projections, random_params


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_fused_projections_compute_the_same(bias: bool, tiny_config: ModelConfig, rng: np.random.Generator) -> None:
    config = tiny_config.model_copy(update={"qkv_bias": bias})
    drawn = random_params(config, jax.random.key(0))
    params = {
        path: 5 * x + 0.3 * jax.random.normal(jax.random.key(i), x.shape) for i, (path, x) in enumerate(drawn.items())
    }
    fused = fuse_projections(params, config.num_layers)
    assert not any(path.endswith((".q_kernel", ".k_bias", ".up_kernel")) for path in fused)
    assert sum(x.size for x in fused.values()) == sum(x.size for x in params.values())
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 9)))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    hidden = [
        bind(config, each, dtype=jnp.float32)(tokens, positions, causal_attend(None))[0] for each in (params, fused)
    ]
    np.testing.assert_allclose(*hidden, rtol=1e-4, atol=1e-4)
