"""The kernels through the real TPU compiler, for chips that are only described: Mosaic, scalar and vector memory."""

import os

import jax
import jax.experimental.topologies
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.load import load_toml
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.engine.runner import lower_step
from qwq_jax.engine.step import Program
from qwq_jax.kernels.attention import (
    PagedLayer,
    RaggedRows,
    Target,
    attention,
    is_quantized,
    paged_attention,
    scales_shape,
)
from qwq_jax.sharding import decode_layout, make_mesh
from tests.cases import exhaustive

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which is for Linux on x86-64 only")
pytestmark = [
    pytest.mark.slow,
    # libtpu looks for the machine it is on, and says that there is none.
    pytest.mark.filterwarnings("ignore"),
]
CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
# In CI the extremes: the least memory, one core, two devices a chip; the others when all is run.
MOST = [name if name in ("v4", "v5e", "7x") else exhaustive(name) for name in CHIPS]
EIGHT_BIT = {"v4": "int8", "v5e": "int8", "v5p": "int8", "v6e": "int8", "7x": "float8_e4m3fn"}
CONTEXT, SEQUENCES = 131_072, 256


def topology(name):
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
    return jax.experimental.topologies.get_topology_desc(platform="tpu", topology_name=name)


def describer(device):
    sharding = SingleDeviceSharding(device)
    return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def compile_paged(chip, tensor, dtype, page=128):
    """A step of 256 decoding rows and 1,024 prompt tokens on one shard of QwQ-32B, any row up to 131,072 tokens."""
    device = topology(CHIPS[chip]).devices[0]
    array, bf16, i32 = describer(device), jnp.bfloat16, jnp.int32
    N, K, H, rows, tokens = 40 // tensor, 8 // tensor, 128, SEQUENCES + 4, SEQUENCES + 1024
    kv = (K, 4096, 2, page, H)
    layer = PagedLayer(array(kv, dtype), array(scales_shape(kv), jnp.float32) if is_quantized(dtype) else None)
    batch = RaggedRows(
        array((rows, CONTEXT // page), i32), array((rows,), i32), array((rows + 1,), i32), array((tokens,), i32)
    )

    def step(q, k, v, layer, batch):
        target = Target("tpu", device.device_kind)
        return paged_attention(
            q, k, v, layer, batch, scale=H**-0.5, decode_rows=SEQUENCES, max_query=1024, target=target
        )

    new = array((tokens, K, H), bf16)
    return jax.jit(step, donate_argnums=3).lower(array((tokens, N, H), bf16), new, new, layer, batch).compile(), layer


@pytest.mark.parametrize("tensor", [8, *map(exhaustive, (1, 2, 4))])
@pytest.mark.parametrize("chip", MOST)
def test_paged_attention_compiles_for_every_shard(chip, tensor):
    compiled, layer = compile_paged(chip, tensor, "bfloat16")
    memory, pool = compiled.memory_analysis(), 2 * np.prod(layer.kv.shape)
    assert memory.alias_size_in_bytes >= pool, "the cache is not updated in place"
    assert memory.temp_size_in_bytes < 0.1 * pool, "a part of the cache is copied"


@pytest.mark.parametrize("chip", ["7x", *(exhaustive(name) for name in CHIPS if name != "7x")])
def test_8_bit_caches_compile_and_are_half_as_large(chip):
    """With one kv head a chip too: nothing is padded to the width of a register."""
    compiled, layer = compile_paged(chip, 8, EIGHT_BIT[chip], page=512 if chip == "7x" else 256)
    elements = np.prod(layer.kv.shape)
    assert compiled.memory_analysis().alias_size_in_bytes == pytest.approx(elements * (1 + 4 / 128), rel=0.001)


@pytest.mark.parametrize("chip", ["v5e", *(exhaustive(name) for name in CHIPS if name != "v5e")])
def test_dense_attention_compiles_forward_and_backward(chip):
    """Of 131,072 tokens, without a temporary that grows with their square."""
    device = topology(CHIPS[chip]).devices[0]
    array = describer(device)
    target = Target("tpu", device.device_kind)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, scale=128**-0.5, target=target).astype(jnp.float32))

    q, k = array((1, CONTEXT, 5, 128), jnp.bfloat16), array((1, CONTEXT, 1, 128), jnp.bfloat16)
    memory = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile().memory_analysis()
    queries = 2 * CONTEXT * 5 * 128
    # Output, its gradient, and dQ in float32: a few times the queries; one row of blocks of scores would be 100 times.
    assert memory.temp_size_in_bytes < 8 * queries


@pytest.mark.parametrize(
    ("name", "mesh", "dtype"),
    [
        pytest.param("v5e:4x4", MeshConfig(data=2, tensor=8), "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param("tpu7x:2x2x1", MeshConfig(tensor=8), "float8_e4m3fn", marks=pytest.mark.exhaustive),
    ],
)
def test_whole_decode_step_of_the_32b_compiles_without_a_copy_of_the_cache(name, mesh, dtype):
    """All 64 layers; `tests/tools/test_step_bytes.py` has every chip, by two and four layers."""
    model = load_toml("configs/models/qwq-32b.toml", ModelConfig)
    layout = decode_layout(make_mesh(mesh, topology(name).devices))
    config = EngineConfig(max_sequences=16, page_size=128, num_pages=1024, max_context=32_768, cache_dtype=dtype)
    compiled = lower_step(model, layout, config, Program(config.max_sequences, 0, 0)).compile()
    memory = compiled.memory_analysis()
    heads = 8 // mesh.tensor
    cache = model.num_layers * heads * 1024 * 2 * 128 * 128 * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes >= cache, "the cache is not updated in place"
    assert memory.temp_size_in_bytes < 0.5e9
    if not name.startswith("tpu7x"):  # whose HLO is newer than this jaxlib can print
        pool = f"[1,{heads},1024,2,128,128]"
        copies = [line for line in compiled.as_text().splitlines() if " copy" in line and pool in line.split("(")[0]]
        assert not copies, copies[:3]
