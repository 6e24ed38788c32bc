"""Our logits are those of transformers: live where torch is installed, from stored ones everywhere."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import bind, stack
from qwq_jax.sharding import make_mesh, train_layout
from tests.cases import exhaustive
from tests.parity.models import CASES, Case, L, prompt

FIXTURES = Path(__file__).with_name("logits.npz")
# Two float32 implementations of the same sums, whose logits reach 10: agreement is 1e-5, and 2e-4 is promised.
TOLERANCE = 2e-4


def our_logits(case: Case, *, stacked: bool = False, remat: bool = False) -> np.ndarray:
    config = ModelConfig.from_huggingface(case.huggingface())
    params = stack(case.params(), L) if stacked else case.params()

    @jax.jit
    def forward(params, tokens):
        model = bind(config, params, dtype=jnp.float32, remat=remat)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.logits(model(tokens, positions, causal_attend(None))[0])

    return np.asarray(forward(params, prompt()))


# For all heads a head of its own or YaRN; both and neither are near to these.
SOME = [case if case.tied != case.yarn else exhaustive(case) for case in CASES]


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_logits_equal_transformers(case: Case):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config.from_dict(case.huggingface())
    model = transformers.Qwen2ForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(
        {name: torch.from_numpy(array.copy()) for name, array in case.weights().items()}, strict=False
    )
    assert not unexpected and missing == (["lm_head.weight"] if case.tied else [])
    model.tie_weights()
    with torch.no_grad():
        expected = model(torch.from_numpy(prompt()).long()).logits.numpy()
    np.testing.assert_allclose(our_logits(case), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_equal_stored_ones_of_transformers(case: Case):
    stored = np.load(FIXTURES)[case.name]
    np.testing.assert_allclose(our_logits(case)[:, -2:], stored, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("remat", [False, True])
def test_stacked_layers_compute_the_same(remat: bool):
    case = CASES[0]
    # The same float32 operations, fused differently by the compiler.
    np.testing.assert_allclose(our_logits(case, stacked=True, remat=remat), our_logits(case), atol=2e-5, rtol=0)


def test_yarn_changes_the_logits():
    on, off = (next(c for c in CASES if c.yarn is yarn and c.N == 5 and c.tied) for yarn in (True, False))
    assert np.abs(our_logits(on) - our_logits(off)).max() > 0.05


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(tensor=8)])
def test_sharded_logits_equal_unsharded(mesh: MeshConfig, tiny_config: ModelConfig):
    from qwq_jax.model.params import random_params

    layout = train_layout(make_mesh(mesh))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (8, 24)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)

    def logits(params, attend):
        model = bind(tiny_config, params, dtype=jnp.float32)
        return model.logits(model(tokens, positions, attend)[0])

    key = jax.random.key(0)
    one = jax.jit(lambda p: logits(p, causal_attend(None)))(random_params(tiny_config, key))
    sharded = random_params(tiny_config, key, layout=layout)
    assert not sharded["layers.0.mlp.up_kernel"].sharding.is_fully_replicated
    many = jax.jit(lambda p: logits(p, causal_attend(None, layout)))(sharded)
    np.testing.assert_allclose(many, one, atol=1e-5, rtol=0)  # partial sums added in another order
