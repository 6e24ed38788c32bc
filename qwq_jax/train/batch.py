"""The arrays of one train step, placed on the devices."""

from dataclasses import dataclass

import jax
import numpy as np

from qwq_jax.sharding import Layout, zigzag
from qwq_jax.train.packing import PackedRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainBatch:
    """`PackedRows` as a pytree: ``[A, B, T]`` for a step of ``A`` micro-batches, ``[B, T]`` for one of them.

    Where devices share the tokens of a row, these lie in the order of `sharding.zigzag`.

    Attributes:
        tokens: int32 inputs.
        targets: int32, the token after each input.
        loss_mask: bool, the targets that count.
        positions: int32, from 0 in each segment.
        segment_ids: int32, from 1 in each row; 0 is padding.
        columns: float32, further values aligned with `targets`.
    """

    tokens: jax.Array
    targets: jax.Array
    loss_mask: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    columns: dict[str, jax.Array]


def place_batch(packed: PackedRows, *, accumulation: int, layout: Layout) -> TrainBatch:
    """Splits the rows into `accumulation` micro-batches and spreads each over the batch axes of `layout`.

    Every process passes the same rows and keeps those of its devices.

    Raises:
        ValueError: The rows cannot be divided into that many micro-batches.
    """
    rows, length = packed.tokens.shape
    if rows % accumulation:
        raise ValueError(f"{rows} rows a step cannot be divided into {accumulation} micro-batches")
    return _place(packed, (accumulation, rows // accumulation, length), layout)


def place_rows(packed: PackedRows, layout: Layout) -> TrainBatch:
    """The rows as one micro-batch ``[B, T]``, spread over the batch axes of `layout`; as `place_batch` otherwise."""
    return _place(packed, packed.tokens.shape, layout)


def _place(packed: PackedRows, shape: tuple[int, ...], layout: Layout) -> TrainBatch:
    sharding = layout.sharding((None, "batch", "tokens")[-len(shape) :], shape)
    parts = layout.size("tokens")
    order = zigzag(shape[-1], parts) if parts > 1 else slice(None)

    def place(value: np.ndarray) -> jax.Array:
        split = value.reshape(shape)[..., order]
        return jax.make_array_from_callback(shape, sharding, lambda index: split[index])

    return TrainBatch(
        tokens=place(packed.tokens),
        targets=place(packed.targets),
        loss_mask=place(packed.loss_mask),
        positions=place(packed.positions),
        segment_ids=place(packed.segment_ids),
        columns={name: place(value) for name, value in packed.columns.items()},
    )
