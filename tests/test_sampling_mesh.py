"""On a mesh each row draws the token that it draws on one device, and no device sees a whole row."""

import functools
import os
import re

import jax
import jax.experimental.topologies
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.config.mesh import MeshConfig
from qwq_jax.sampling import Bias, LogitEdits, Penalties, SamplingArrays, sample
from qwq_jax.sharding import decode_layout, make_mesh
from tests.sampling_reference import mixed, pack_bits


def edits_of(rng, shape, V):
    ids = lambda count: jnp.asarray(rng.integers(-1, V, (*shape, count)), jnp.int32)  # noqa: E731
    real = lambda low, high: jnp.asarray(rng.uniform(low, high, shape), jnp.float32)  # noqa: E731
    generated = jnp.asarray(rng.poisson(0.3, (*shape, V)), jnp.int32)
    prompted = jnp.asarray(rng.random((*shape, V)) < 0.2)
    return LogitEdits(
        Penalties(real(-2, 2), real(-2, 2), real(0.5, 2), generated, prompted),
        Bias(ids(5), jnp.asarray(rng.uniform(-5, 5, (*shape, 5)), jnp.float32)),
        ids(3),
        jnp.asarray(pack_bits(rng.random((*shape, V)) < 0.7)),
    )


@pytest.mark.parametrize(
    ("V", "candidates", "with_edits", "mesh"),
    [
        (304, 16, True, MeshConfig(tensor=8)),
        (304, 300, False, MeshConfig(data=2, tensor=4)),
        pytest.param(257, 16, True, MeshConfig(data=2, tensor=4), marks=pytest.mark.slow),
    ],
    ids=["parts that are no whole words of a mask", "parts smaller than the candidates", "a vocabulary not divided"],
)
def test_a_mesh_draws_the_same_tokens(V, candidates, with_edits, mesh, rng):
    shape = (2, 6)
    # Rounded, so that there are ties across the parts.
    logits = jnp.asarray(np.round(rng.standard_normal((*shape, V)) * 2, 1), jnp.float32)
    params, edits = mixed(rng, shape), edits_of(rng, shape, V) if with_edits else None
    layout = decode_layout(make_mesh(mesh))
    placed = jax.device_put(logits, layout.sharding(("replica", None, "vocab"), logits.shape))
    draw = functools.partial(sample, num_top=5, candidates=candidates)
    alone = jax.jit(draw)(logits, params, edits=edits)
    drawn = jax.jit(functools.partial(draw, layout=layout))(placed, params, edits=edits)
    np.testing.assert_array_equal(drawn.tokens, alone.tokens)
    np.testing.assert_array_equal(drawn.top_ids, alone.top_ids)
    # The sum over the vocabulary has another order.
    np.testing.assert_allclose(drawn.logprobs, alone.logprobs, atol=2e-6)
    np.testing.assert_allclose(drawn.top_logprobs, alone.top_logprobs, atol=2e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # libtpu looks for the machine it is on, and says that there is none
@pytest.mark.parametrize("with_edits", [False, True], ids=["plain", "edited"])
def test_tpus_never_gather_the_vocabulary(with_edits, rng):
    """QwQ-32B's vocabulary over 8 chips: what is gathered of a row are its candidates."""
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which is for Linux on x86-64 only")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
    devices = jax.experimental.topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    layout = decode_layout(make_mesh(MeshConfig(data=2, tensor=8), devices))
    shape, V = (2, 64), 152_064
    cut = {"generated", "prompted"}

    def describe(path, x):
        axes = ("replica", None, "vocab" if path and path[-1].name in cut else None)[: len(x.shape)]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(axes, x.shape))

    logits = jax.ShapeDtypeStruct((*shape, V), jnp.float32, sharding=layout.sharding(("replica", None, "vocab")))
    shapes = jax.eval_shape(lambda: (SamplingArrays(*mixed(np.random.default_rng(0), shape)), edits_of(rng, shape, V)))
    params, edits = jax.tree.map_with_path(describe, shapes)
    run = jax.jit(lambda logits, params, edits: sample(logits, params, num_top=20, edits=edits, layout=layout))
    compiled = run.lower(logits, params, edits if with_edits else None).compile()
    gathers = [
        line for line in compiled.as_text().splitlines() if re.search(r"= .*all-(gather|to-all)(-start)?\(", line)
    ]
    sizes = [
        int(np.prod([int(n) for n in shape.split(",")]))
        for line in gathers
        for shape in re.findall(r"\[([\d,]+)\]", line)
    ]
    assert sizes, "there are no candidates"
    assert max(sizes) <= 64 * 128 * 8, gathers
    # A few copies of the logits of a device, but no row of all of them.
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * 64 * V // 8 * 4
