"""Logical axes, and the two tables that map them to mesh axes.

The model names the dimensions of its arrays (`"heads"`, `"mlp"`, ...) and knows nothing of meshes. A `Layout` is one
mesh together with one table; it turns logical axes into `jax.sharding.NamedSharding`. No other module names a mesh
axis.

| logical axis | array dimension                     | TRAIN        | DECODE       |
|--------------|-------------------------------------|--------------|--------------|
| batch        | B, rows of tokens                   | data, fsdp   | data, fsdp, context |
| rows         | B times the parts of T              | data, fsdp, context | -     |
| tokens       | T of a batch, dealt by `zigzag`     | context      | -            |
| sequence     | T between layers (likewise)         | context, tensor | -         |
| replica      | one page pool and its rows          | -            | data, fsdp, context |
| vocab        | V (replicated if it does not divide)| tensor       | tensor       |
| embed        | D of a weight                       | fsdp         | -            |
| heads        | N                                   | tensor       | tensor       |
| kv_heads     | K (replicated if it does not divide)| tensor       | tensor       |
| kv_shared    | K after `kv_copies`                 | tensor       | tensor       |
| mlp          | F                                   | tensor       | tensor       |
| layers       | L of stacked weights                | -            | -            |
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwq_jax.config.mesh import MeshConfig

_log = logging.getLogger(__name__)

Axes = tuple[str | None, ...]

MESH_AXES = ("data", "fsdp", "context", "tensor")
_AUTO = (AxisType.Auto,) * len(MESH_AXES)

TRAIN: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "rows": ("data", "fsdp", "context"),
    "tokens": ("context",),
    "sequence": ("context", "tensor"),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "kv_shared": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
}

DECODE: Mapping[str, tuple[str, ...]] = {
    **TRAIN,
    "batch": ("data", "fsdp", "context"),
    "replica": ("data", "fsdp", "context"),
    "rows": (),
    "tokens": (),
    "sequence": (),
    "embed": (),
}

# A dimension of these axes is replicated, on purpose, where the mesh does not divide it: every device then holds the
# whole of a small kv projection, of a vocabulary of odd size, or of a row of odd length. Any other axis that does not
# divide is an error.
REPLICABLE = frozenset({"vocab", "kv_heads", "sequence"})


@dataclass(frozen=True)
class Layout:
    """A mesh and the table that places logical axes on it.

    Example:
        >>> layout = decode_layout(make_mesh(MeshConfig(tensor=1)))
        >>> layout.spec(("vocab", "embed"), (512, 64))
        PartitionSpec('tensor', None)
    """

    mesh: Mesh
    table: Mapping[str, tuple[str, ...]]

    def size(self, axis: str) -> int:
        """Number of parts into which this layout cuts the logical axis."""
        return math.prod(self.mesh.shape[name] for name in self.mesh_axes(axis))

    def spec(self, axes: Axes, shape: Sequence[int] | None = None) -> PartitionSpec:
        """Partition spec of an array.

        Args:
            axes: One logical axis, or None, a dimension.
            shape: The array's shape; given, divisibility is checked.

        Raises:
            ValueError: An axis is unknown to the table, or a dimension that must divide does not.
        """
        parts = []
        for index, axis in enumerate(axes):
            names = self.mesh_axes(axis) if axis is not None else ()
            if axis is not None and shape is not None and shape[index] % self.size(axis):
                if axis not in REPLICABLE:
                    raise ValueError(
                        f"a dimension of size {shape[index]} ({axis}) cannot be split over {self.size(axis)} devices "
                        f"of the mesh axes {', '.join(names)}; sizes that work: {divisors(shape[index])}"
                    )
                names = ()
            parts.append(names[0] if len(names) == 1 else (names or None))
        return PartitionSpec(*parts)

    def sharding(self, axes: Axes, shape: Sequence[int] | None = None) -> NamedSharding:
        """The `NamedSharding` of `spec(axes, shape)` on this mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Pins the sharding of an activation inside `jax.jit`."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def as_rows(self, x: jax.Array) -> jax.Array:
        """`[B, T, ...]` to `[B * n, T / n, ...]`, each of the n parts of the tokens as a row of its own."""
        parts = self.size("tokens")
        if parts == 1:
            return x
        x = x.reshape(x.shape[0] * parts, x.shape[1] // parts, *x.shape[2:])
        return self.constrain(x, ("rows", *(None,) * (x.ndim - 1)))

    def from_rows(self, x: jax.Array) -> jax.Array:
        """The inverse of `as_rows`."""
        parts = self.size("tokens")
        if parts == 1:
            return x
        x = x.reshape(x.shape[0] // parts, x.shape[1] * parts, *x.shape[2:])
        return self.constrain(x, ("batch", "tokens", *(None,) * (x.ndim - 2)))

    def kv_copies(self, num_heads: int, num_kv_heads: int) -> int:
        """How often each kv head is repeated so that every tensor shard owns whole kv heads.

        With K kv heads on a tensor axis of size t the activations hold lcm(K, t) kv heads: 1 copy where t divides K,
        and t/K copies of each where K divides t.

        Raises:
            ValueError: N query heads cannot be split that way.
        """
        tensor = self.size("heads")
        shared = math.lcm(num_kv_heads, tensor)
        if num_heads % shared:
            usable = [t for t in range(1, num_heads + 1) if num_heads % math.lcm(num_kv_heads, t) == 0]
            raise ValueError(
                f"{num_heads} query heads and {num_kv_heads} kv heads cannot be split over a tensor axis of {tensor}; "
                f"it must be one of {', '.join(map(str, usable))}"
            )
        return shared // num_kv_heads

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """Names of the mesh axes that cut a logical axis, for collectives inside `jax.shard_map`."""
        if axis not in self.table:
            raise ValueError(f"unknown logical axis {axis!r}; this layout knows {', '.join(sorted(self.table))}")
        return self.table[axis]


def zigzag(length: int, parts: int) -> np.ndarray:
    """Which token lies at each place of a row whose tokens are dealt to `parts` devices.

    Each gets a piece from the front and the one as far from the end, so that under causal attention all have the same
    to do. ("Striped Attention", arXiv 2311.09431, has the problem; the pieces are those of Llama 3, arXiv 2407.21783,
    section 3.3.2.)

    Example:
        >>> zigzag(8, 2).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]

    Raises:
        ValueError: The row does not divide into twice as many pieces.
    """
    if parts == 1:
        return np.arange(length)
    if length % (2 * parts):
        raise ValueError(f"a row of {length} tokens does not divide into {2 * parts} pieces, two for each of {parts}")
    pieces = np.arange(length).reshape(2 * parts, -1)
    order = [piece for part in range(parts) for piece in (part, 2 * parts - 1 - part)]
    return pieces[order].reshape(-1)


def divisors(number: int, limit: int = 256) -> str:
    """What divides `number`, up to a limit, for an error message."""
    return ", ".join(str(size) for size in range(1, min(number, limit) + 1) if number % size == 0)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the (data, fsdp, context, tensor) mesh.

    Args:
        config: Size of each axis.
        devices: The `jax.Device`s to use, all by default; a mesh smaller than their number uses the first ones.

    Raises:
        ValueError: There are fewer devices than the mesh needs, or more and they are of several processes.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = (config.data, config.fsdp, config.context, config.tensor)
    needed = math.prod(shape)
    if needed > len(devices):
        raise ValueError(f"mesh {_described(config)} needs {needed} devices; {len(devices)} are present")
    if needed < len(devices):
        if len({device.process_index for device in devices}) > 1:
            raise ValueError(
                f"mesh {_described(config)} leaves {len(devices) - needed} of {len(devices)} devices out; with several "
                "processes it must use all"
            )
        _log.info(
            "the mesh uses %d of %d devices; mesh.data, mesh.fsdp and mesh.tensor make it larger", needed, len(devices)
        )
        return _mesh(np.asarray(devices[:needed]).reshape(shape))
    # Elsewhere the number means something else, such as which GPUs share a fast network.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices > 1:
        return _mesh_of_slices(shape, devices, slices)
    try:  # lets jax order the devices along the machine's network
        return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=_AUTO)
    except NotImplementedError:  # an axis is no product of the network's own: it takes parts of these
        return _mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True))


def _described(config: MeshConfig) -> str:
    """Its axes; that of tokens only where there is one."""
    context = f" x context={config.context}" if config.context > 1 else ""
    return f"data={config.data} x fsdp={config.fsdp}{context} x tensor={config.tensor}"


def _mesh_of_slices(shape: tuple[int, ...], devices: Sequence[Any], slices: int) -> Mesh:
    """Data is what slices share out: of all that goes over a mesh, its gradients are the least, and can wait."""
    data, *within = shape
    if data % slices:
        raise ValueError(
            f"mesh.data={data}: these devices are of {slices} slices, between which only data can be split, so it must "
            f"be a multiple of {slices}"
        )
    shapes = (data // slices, *within), (slices, 1, 1, 1)
    try:
        return _mesh(mesh_utils.create_hybrid_device_mesh(*shapes, devices))
    except NotImplementedError:  # as of one slice
        return _mesh(mesh_utils.create_hybrid_device_mesh(*shapes, devices, allow_split_physical_axes=True))


def rearranged(mesh: Mesh, config: MeshConfig) -> Mesh:
    """The devices of a mesh, in their order, as another mesh: one program can have arrays on both.

    `make_mesh` may order the same devices otherwise for another shape, and a program knows its devices in one order.
    """
    assert config.size == mesh.devices.size, (config, mesh)
    return _mesh(mesh.devices.reshape(config.data, config.fsdp, config.context, config.tensor))


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, MESH_AXES, axis_types=_AUTO)


def train_layout(mesh: Mesh) -> Layout:
    """The layout of training: weights cut by fsdp and tensor, rows by data and fsdp."""
    return Layout(mesh, TRAIN)


def decode_layout(mesh: Mesh) -> Layout:
    """The layout of inference: weights cut by tensor only, one replica of the engine's rows a data shard."""
    return Layout(mesh, DECODE)
