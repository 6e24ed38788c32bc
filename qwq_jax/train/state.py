"""What a train step changes, and how each of its arrays lies on the devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """A pytree: master weights, optimizer state and the number of steps taken.

    Attributes:
        params: What is trained, float32, stacked layers: ``{"layers.mlp.up_kernel": [L, D, F], "embed.embedding":
            [V, D], ...}``, or adapters only: ``{"layers.mlp.up_lora.a": [L, D, rank], ...}``.
        opt_state: optax's; its moments mirror `params`.
        step: int32 scalar, updates done.
    """

    params: Params
    opt_state: Any
    step: jax.Array


def state_shardings(abstract: TrainState, params: Mapping[str, Sharding]) -> TrainState:
    """Shardings for every leaf: moments lie as their parameter does, everything else is replicated."""
    example = next(iter(params.values()))
    assert isinstance(example, NamedSharding), example
    replicated = NamedSharding(example.mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Sharding:
        name = str(path[-1].key) if isinstance(path[-1], jax.tree_util.DictKey) else ""
        if name in params and leaf.shape == abstract.params[name].shape:
            return params[name]
        return replicated

    return jax.tree_util.tree_map_with_path(place, abstract)


def _create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.zeros((), jnp.int32))


def abstract_state(
    params: Mapping[str, jax.Array | jax.ShapeDtypeStruct], optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes, types and shardings of a state: the target of a restore. `params` are arrays or descriptions with one."""
    shapes = jax.eval_shape(lambda params: _create(params, optimizer), dict(params))
    shardings = state_shardings(shapes, {name: value.sharding for name, value in params.items()})
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0, laid out as `params` are. The arrays of `params` become the state's own."""
    places = jax.tree.map(lambda x: x.sharding, abstract_state(params, optimizer))
    return jax.jit(lambda params: _create(params, optimizer), out_shardings=places, donate_argnums=0)(params)
