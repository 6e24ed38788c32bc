"""Low-rank adapters (LoRA, arXiv 2106.09685) as a flat dict of stacked arrays beside the model's parameters.

A projection `layers.attention.q_kernel` `[L, D, N, H]` has `layers.attention.q_lora.a` `[L, D, rank]` and
`layers.attention.q_lora.b` `[L, rank, N, H]`: A as its input, B as its output, with the same logical axes and a rank
that no mesh cuts. Names are disjoint from the model's own, so `{**base, **adapters}` is what `bind(..., lora=lora)`
takes; `base` alone is the model before training, the reference of RL for instance.
"""

import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.model.params import Params
from qwq_jax.model.spec import ArraySpec, model_spec, stacked_spec
from qwq_jax.sharding import Layout

A, B = "_lora.a", "_lora.b"


def lora_spec(config: ModelConfig, lora: LoraConfig) -> dict[str, ArraySpec]:
    """Every adapter array, stacked and in float32, by dotted path."""
    spec = stacked_spec(model_spec(config, lora=lora), config.num_layers)
    return {path: array for path, array in spec.items() if path.endswith((A, B))}


def num_adapter_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """What is trained: the entries of all A and B."""
    return sum(math.prod(array.shape) for array in lora_spec(config, lora).values())


def random_adapters(config: ModelConfig, lora: LoraConfig, key: jax.Array, layout: Layout | None = None) -> Params:
    """Adapters that change nothing yet: B is zero, and A what PEFT fills it with.

    That is Kaiming's uniform distribution with a = sqrt(5): bounds of 1 / sqrt(inputs of the projection).

    Args:
        config: The architecture.
        lora: Where they are.
        key: Source of randomness; values depend on it and on the path, not on the mesh or on other adapters.
        layout: Where they go. None: the default device.
    """
    spec = lora_spec(config, lora)

    def fill(path: str, array: ArraySpec) -> jax.Array:
        if path.endswith(B):
            return jnp.zeros(array.shape, array.dtype)
        bound = 1 / math.sqrt(math.prod(array.shape[1:-1]))
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return jax.random.uniform(own, array.shape, array.dtype, -bound, bound)

    def make() -> Params:
        return {path: fill(path, array) for path, array in spec.items()}

    if layout is None:
        return jax.jit(make)()
    return jax.jit(make, out_shardings={path: layout.sharding(a.axes, a.shape) for path, a in spec.items()})()


def adapted_kernel(path: str) -> str:
    """The kernel that the adapter array `path` belongs to."""
    assert path.endswith((A, B)), path
    return path[: -len(A)] + "_kernel"


def merge(base: Mapping[str, jax.Array], adapters: Mapping[str, jax.Array], lora: LoraConfig) -> Params:
    """The model whose kernels are W + scale * A B, for an engine or for export; meant to be called inside `jax.jit`.

    Args:
        base: The model's parameters of any float dtype, stacked or one array a layer.
        adapters: In the same arrangement.
        lora: Gives the scale.

    Returns:
        As `base`. A kernel's product and sum are float32, in one layer at a time, and rounded once to its dtype.
    """

    def add(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        # A TPU multiplies float32 in bfloat16 unless it is told otherwise.
        product = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + lora.scale * product).astype(kernel.dtype)

    merged = dict(base)
    for path, a in adapters.items():
        if path.endswith(A):
            name = adapted_kernel(path)
            kernel, b = base[name], adapters[path.removesuffix(A) + B]
            assert jnp.issubdtype(kernel.dtype, jnp.floating), f"{name} is quantised"
            stacked = not path.split(".")[1].isdigit()
            merged[name] = jax.lax.map(lambda x: add(*x), (kernel, a, b)) if stacked else add(kernel, a, b)
    return merged
