"""Parameters as a flat `dict[str, jax.Array]`: random ones, stacked ones, and bound to a module."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.weights import WeightFormat
from qwq_jax.model.spec import ArraySpec, flatten, model_spec
from qwq_jax.model.transformer import Transformer
from qwq_jax.sharding import Layout

Params = dict[str, jax.Array]

FUSED = "layers.{}.attention.qkv_kernel"


def bind(
    config: ModelConfig,
    params: Mapping[str, jax.Array],
    *,
    dtype: Any,
    remat: bool = False,
    weights: WeightFormat | None = None,
    lora: LoraConfig | None = None,
) -> Transformer:
    """A `Transformer` that holds these arrays; cheap, meant to be called inside `jax.jit`.

    Args:
        config: The architecture.
        params: By dotted path, one array a layer or stacked; or as `fuse_projections` gives them.
        dtype: Dtype of the activations.
        remat: See `Transformer`.
        weights: How `params` are quantised, and whether activations are to be; None: they are not.
        lora: Which adapters `params` holds beside the model's own arrays; None: none.

    Raises:
        ValueError: A parameter is missing, or not one of the model's.
    """
    stacked = not any(path.startswith("layers.0.") for path in params)
    # A frozen pydantic model is hashable, which its base class does not say.
    fused = FUSED.format(0) in params
    kind = (config, stacked, jnp.dtype(dtype), remat, weights, lora, fused)
    graph, state = _abstract(*kind)  # pyright: ignore[reportArgumentType]
    flat = flatten(state)
    if flat.keys() != params.keys():
        wrong = sorted(flat.keys() ^ params.keys())
        raise ValueError(f"these parameters are missing from the model or unknown to it: {', '.join(wrong[:5])}")
    paths = [path for path, _ in nnx.to_flat_state(state)]
    filled = [
        (path, variable.replace(params[".".join(map(str, path))]))
        for path, variable in zip(paths, flat.values(), strict=True)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def stack(params: Mapping[str, jax.Array], num_layers: int) -> Params:
    """Joins `layers.{i}.X [...]` to `layers.X [L, ...]`; other parameters stay."""
    out = {path: array for path, array in params.items() if not path.startswith("layers.")}
    for path in params:
        if path.startswith("layers.0."):
            name = path.removeprefix("layers.0.")
            out[f"layers.{name}"] = jnp.stack([params[f"layers.{i}.{name}"] for i in range(num_layers)])
    return out


def unstack(params: Mapping[str, jax.Array], num_layers: int) -> Params:
    """Splits `layers.X [L, ...]` into `layers.{i}.X [...]`; the inverse of `stack`."""
    out = {path: array for path, array in params.items() if not path.startswith("layers.")}
    for path, array in params.items():
        if path.startswith("layers."):
            name = path.removeprefix("layers.")
            out.update({f"layers.{i}.{name}": array[i] for i in range(num_layers)})
    return out


def fuse_projections(params: Mapping[str, jax.Array], num_layers: int) -> Params:
    """As CPUs multiply fastest: q, k, v one array a layer, gate and up one, and each kernel turned to `[out, in]`.

    A product of one row with a small matrix leaves cores idle, and one large one of three does not. Of kernels
    `[in, out]` XLA:CPU reads a strip of columns at a time, far apart in memory; of `[out, in]` it reads whole rows.
    """
    out = dict(params)
    for layer in range(num_layers):
        attention, mlp = f"layers.{layer}.attention", f"layers.{layer}.mlp"
        out[f"{attention}.qkv_kernel"] = _turned([out.pop(f"{attention}.{part}_kernel") for part in "qkv"], summed=1)
        out[f"{attention}.o_kernel"] = _turned([out[f"{attention}.o_kernel"]], summed=2)
        out[f"{mlp}.gate_up_kernel"] = _turned([out.pop(f"{mlp}.{part}_kernel") for part in ("gate", "up")], summed=1)
        out[f"{mlp}.down_kernel"] = _turned([out[f"{mlp}.down_kernel"]], summed=1)
        if f"{attention}.q_bias" in params:
            biases = [out.pop(f"{attention}.{part}_bias").reshape(-1) for part in "qkv"]
            out[f"{attention}.qkv_bias"] = jnp.concatenate(biases)
    return out


@functools.partial(jax.jit, static_argnames="summed")
def _turned(kernels: list[jax.Array], summed: int) -> jax.Array:
    """`[out, in]` of kernels whose first dimensions are summed over, one behind the other."""
    return jnp.concatenate([w.reshape(math.prod(w.shape[:summed]), -1).T for w in kernels])


def random_params(
    config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32, layout: Layout | None = None
) -> Params:
    """Freshly initialised parameters: kernels normal with deviation 0.02, biases 0, norm scales 1.

    Args:
        config: The architecture.
        key: Source of randomness; every array gets a key of its own, so values do not depend on the mesh.
        dtype: Dtype of all parameters.
        layout: Where they go; each device makes its own part. None: the default device.
    """
    spec = model_spec(config, dtype)

    def make() -> Params:
        return {
            path: _initial(path, array, jax.random.fold_in(key, i))
            for i, (path, array) in enumerate(sorted(spec.items()))
        }

    if layout is None:
        return jax.jit(make)()
    return jax.jit(make, out_shardings={path: layout.sharding(a.axes, a.shape) for path, a in spec.items()})()


def _initial(path: str, spec: ArraySpec, key: jax.Array) -> jax.Array:
    if path.endswith("scale"):
        return jnp.ones(spec.shape, spec.dtype)
    if path.endswith("bias"):
        return jnp.zeros(spec.shape, spec.dtype)
    return (0.02 * jax.random.normal(key, spec.shape, jnp.float32)).astype(spec.dtype)


@functools.lru_cache(maxsize=16)
def _abstract(
    config: ModelConfig,
    stacked: bool,
    dtype: Any,
    remat: bool,
    weights: WeightFormat | None,
    lora: LoraConfig | None,
    fused: bool,
) -> tuple[nnx.GraphDef, nnx.State]:
    def make() -> Transformer:
        return Transformer(config, stacked=stacked, dtype=dtype, remat=remat, weights=weights, lora=lora, fused=fused)

    return nnx.split(nnx.eval_shape(make))
