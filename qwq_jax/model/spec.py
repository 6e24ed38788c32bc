"""Arrays described before they exist: the abstract tree that everything else derives from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.weights import WeightFormat
from qwq_jax.model.transformer import Transformer
from qwq_jax.sharding import Axes


@dataclass(frozen=True)
class ArraySpec:
    """One parameter that need not exist yet.

    Example:
        `ArraySpec((64, 8, 16), jnp.bfloat16, ("embed", "heads", None))` is a query projection.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: Axes


def flatten(state: nnx.State) -> dict[str, Any]:
    """Flat view of a module's state: dotted path to its variable."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def model_spec(
    config: ModelConfig,
    dtype: Any = jnp.bfloat16,
    weights: WeightFormat | None = None,
    lora: LoraConfig | None = None,
) -> dict[str, ArraySpec]:
    """Every parameter of the model, by dotted path, one array a layer.

    Args:
        config: The architecture.
        dtype: Dtype of all parameters that are not quantised.
        weights: How projections are quantised: a projection has int8 or int4 and, beside it, `PATH_scale` in float32.
        lora: Which projections have an adapter: `layers.0.attention.q_lora.a` and `.b` in float32 beside the kernel.

    Returns:
        For example `"layers.0.attention.q_kernel": ArraySpec((D, N, H), dtype, ("embed", "heads", None))`.

    Raises:
        ValueError: The model cannot be quantised so.
    """
    asked: Any = (config, weights, lora)  # frozen, and so hashable, which their type does not say
    return {
        path: ArraySpec(shape, jnp.dtype(own_dtype or dtype), axes)
        for path, shape, own_dtype, axes in _variables(*asked)
    }


@lru_cache(maxsize=8)  # a job asks for the same in several places, and each layer is described by being made
def _variables(
    config: ModelConfig, weights: WeightFormat | None, lora: LoraConfig | None
) -> tuple[tuple[str, tuple[int, ...], Any, Axes], ...]:
    """Path, shape, dtype if it has one of its own, and axes of every parameter."""
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, weights=weights, lora=lora)))
    return tuple((path, tuple(v.get_value().shape), v.own_dtype, tuple(v.axes)) for path, v in flatten(state).items())


def stacked_spec(spec: Mapping[str, ArraySpec], num_layers: int) -> dict[str, ArraySpec]:
    """The spec of the same parameters with the layers stacked, `layers.{i}.X` becoming `layers.X` of `[L, ...]`."""
    out = {}
    for path, array in spec.items():
        if path.startswith("layers.0."):
            name = "layers." + path.removeprefix("layers.0.")
            out[name] = ArraySpec((num_layers, *array.shape), array.dtype, ("layers", *array.axes))
        elif not path.startswith("layers."):
            out[path] = array
    return out
