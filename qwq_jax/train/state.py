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
        params: float32, stacked layers: ``{"layers.mlp.up_kernel": [L, D, F], "embed.embedding": [V, D], ...}``.
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


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0, laid out as `params` are. The arrays of `params` become the state's own."""
    shardings = {name: value.sharding for name, value in params.items()}

    def create(params: Params) -> TrainState:
        return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.zeros((), jnp.int32))

    out = state_shardings(jax.eval_shape(create, params), shardings)
    return jax.jit(create, out_shardings=out, donate_argnums=0)(params)


def abstract_state(state: TrainState) -> TrainState:
    """The same tree with shapes, types and shardings in place of arrays: the target of a restore."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
