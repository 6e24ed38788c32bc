"""Quantised projections through the real TPU compiler: read as they are stored, without a wider copy."""

import os
import re

import jax
import jax.experimental.topologies
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from qwq_jax.config.weights import parse_weights
from qwq_jax.model.quantize import DTYPES, kernel_format, project

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu, which is for Linux on x86-64 only")
pytestmark = [
    pytest.mark.slow,
    # libtpu looks for the machine it is on, and says that there is none.
    pytest.mark.filterwarnings("ignore"),
]
# Of QwQ-32B on a tensor axis of 8.
PROJECTIONS = {
    "q": ("btd,dnh->btnh", (5120, 5, 128), ("embed", "heads", None)),
    "o": ("btnh,nhd->btd", (5, 128, 5120), ("heads", None, "embed")),
    "gate": ("btd,df->btf", (5120, 3456), ("embed", "mlp")),
    "down": ("btf,fd->btd", (3456, 5120), ("mlp", "embed")),
}
NAMES = {"int8": "s8", "int4": "s4", "int4-g64": "s4"}


def compiled_entry(chip: str, projection: str, name: str, tokens: int, activations: int) -> str:
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
    device = jax.experimental.topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    describe = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))  # noqa: E731
    equation, shape, axes = PROJECTIONS[projection]
    weights = parse_weights(name).model_copy(update={"activations": activations})
    format = kernel_format(weights, shape, axes)
    (kernel, kernel_axes), (scale, _) = format.kernel(shape, axes), format.scale(shape, axes)

    def run(x, w, s):
        return project(equation, x, nnx.Param(w, axes=kernel_axes), nnx.Param(s), weights)

    width = shape[:2] if projection == "o" else shape[:1]
    arguments = [describe((1, tokens, *width), jnp.bfloat16), describe(kernel, DTYPES[weights.bits])]
    text = jax.jit(run).lower(*arguments, describe(scale, jnp.float32)).compile().as_text()
    return text[text.index("\nENTRY") :]


@pytest.mark.parametrize(
    ("chip", "projection", "name"),
    [
        *(("v5e:2x2", projection, "int8") for projection in PROJECTIONS),
        *(
            pytest.param("v5e:2x2", projection, name, marks=pytest.mark.exhaustive)
            for projection in PROJECTIONS
            for name in NAMES
            if name != "int8"
        ),
        pytest.param("v6e:2x2", "o", "int8", marks=pytest.mark.exhaustive),
        ("v6e:2x2", "o", "int4"),
    ],
)
def test_no_wider_copy_of_a_weight_is_made(chip, projection, name):
    """Between the fusions of a decode step of 64 rows, in memory of any kind."""
    elements = 5120 * (640 if projection in "qo" else 3456)
    for kind, extent in re.findall(
        r"\b(bf16|f32|s32|s8|s4)\[([\d,]+)\]", compiled_entry(chip, projection, name, 64, 16)
    ):
        size = 1
        for dimension in extent.split(","):
            size *= int(dimension)
        assert size < elements or kind == NAMES[name], f"{kind}[{extent}]"


def test_8_bit_activations_are_multiplied_as_such():
    text = compiled_entry("v5e:2x2", "gate", "int8", 1024, 8)
    assert re.search(r"s8\[(1,)?1024,5120\]", text), "the activations never become int8"
