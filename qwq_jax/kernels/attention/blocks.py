"""Tile sizes of the attention kernels: a table, where each row comes from, and what is done off the table.

The rows were chosen by the compiler's static schedule (`tools/kernel_schedule.py`) for QwQ-32B's group of 5 query heads
of 128, bf16; nothing was timed on a chip.
"""

import math
from dataclasses import dataclass
from typing import Literal

from qwq_jax.kernels.attention.flash import LANES, Sizes

Pass = Literal["forward", "backward"]
# Float32 tiles of [rows, keys] that the compiler holds at once: scores, and more of the kind in the backward pass.
_TILES = {"forward": 2, "backward": 4}


@dataclass(frozen=True)
class Row:
    """One entry: chips by the beginning of their `device_kind`, and what was found best for them."""

    chips: tuple[str, ...]
    kind: Pass
    block_q: int
    block_kv: int
    chunk: int
    origin: str
    looped: bool = False


SCHEDULE = "static schedule at 8k and 32k, jax 0.10.2, libtpu 0.0.52; docs/benchmarks/kernels.md"
SIZES_OF_V5E = "compiles within 64 MiB of VMEM; sizes of v5e"
# A chunk as long as a query block leaves out what the diagonal cannot see. On v5 the matrix unit binds, and chunks one
# at a time take as many cycles as four at once, but 1.6% more in the backward pass; and 11% more on v6e.
TABLE = (
    Row(("TPU v5 lite",), "forward", 512, 2048, 512, SCHEDULE, looped=True),
    Row(("TPU v6",), "forward", 512, 2048, 512, SCHEDULE),
    Row(("TPU v5 lite", "TPU v6"), "backward", 512, 2048, 512, SCHEDULE),
    Row(("TPU v5",), "forward", 512, 2048, 512, SIZES_OF_V5E, looped=True),
    Row(("TPU7x",), "forward", 512, 2048, 512, SIZES_OF_V5E),
    Row(("TPU v5", "TPU7x"), "backward", 512, 2048, 512, SIZES_OF_V5E),
    Row(("TPU v4",), "forward", 256, 1024, 256, "compiles within 16 MiB of VMEM, where 512, 1024 does not"),
    Row(("TPU v4",), "backward", 256, 1024, 256, "best of three in the static schedule at 8k"),
)
TUNED_GROUPS = 5  # query heads a kv head that the rows were compiled with, 128 wide
# VMEM of a core, of which the compiler needs some for itself.
VMEM_BYTES = {"TPU v4": 16 << 20, "TPU v5 lite": 128 << 20, "TPU v5": 64 << 20, "TPU v6": 128 << 20, "TPU7x": 64 << 20}
# Two cores that work as one device: a list of visits each.
MEGACORES = ("TPU v4", "TPU v5")


def find_chip(device_kind: str) -> str:
    """The longest name in the table that a `device_kind` begins with.

    Raises:
        ValueError: There is none.
    """
    names = [name for name in VMEM_BYTES if device_kind.startswith(name)]
    if not names:
        raise ValueError(f"no tile sizes are known for {device_kind!r}; known: {', '.join(VMEM_BYTES)}")
    return max(names, key=len)


def vmem_limit(device_kind: str) -> int:
    """Bytes of VMEM that a kernel may ask for."""
    return VMEM_BYTES[find_chip(device_kind)] * 15 // 16


def tile_sizes(kind: Pass, device_kind: str, *, groups: int, length: int, head_dim: int = LANES) -> Sizes:
    """Tiles for rows of `length` tokens and `groups` query heads a kv head.

    Off the table (more query heads a group, wider heads) blocks are halved until their tiles fit in VMEM.

    Raises:
        ValueError: The chip is unknown, or even the smallest tiles do not fit.
    """
    chip = find_chip(device_kind)
    row = next(row for row in TABLE if row.kind == kind and chip in row.chips)
    block_q, block_kv, chunk = row.block_q, row.block_kv, row.chunk
    tuned = groups <= TUNED_GROUPS and head_dim <= LANES
    while not tuned and vmem_needed(
        kind, block_q=block_q, block_kv=block_kv, groups=groups, head_dim=head_dim
    ) > vmem_limit(chip):
        if block_q == block_kv == LANES:
            raise ValueError(
                f"attention {kind} of {groups} query heads of {head_dim} a kv head does not fit in the "
                f"{VMEM_BYTES[chip] >> 20} MiB of VMEM of {chip} even with blocks of {LANES}; use fewer heads a group"
            )
        block_q, block_kv = (block_q // 2, block_kv) if block_q > LANES else (block_q, block_kv // 2)
    short = LANES * math.ceil(length / LANES)
    block_kv = min(block_kv, 1 << (short - 1).bit_length())
    # A block longer than an eighth of the row would mostly hold padding at its end.
    while block_kv > 2 * LANES and -(-short // block_kv) * block_kv > short * 9 // 8:
        block_kv //= 2
    chunk = min(max(min(chunk, block_q), block_kv // 8), block_kv)
    return Sizes(min(block_q, block_kv), block_kv, chunk, looped=row.looped)


def vmem_needed(kind: Pass, *, block_q: int, block_kv: int, groups: int, head_dim: int) -> int:
    """Bytes of VMEM, estimated: float32 tiles, accumulators, and two buffers of each block."""
    rows = groups * block_q
    tiles = 4 * _TILES[kind] * rows * block_kv
    blocks = 2 * 4 * (2 * rows + 2 * block_kv) * head_dim
    accumulators = 4 * (rows * (head_dim + 2 * LANES) if kind == "forward" else (3 * rows + 2 * block_kv) * head_dim)
    return tiles + blocks + accumulators
