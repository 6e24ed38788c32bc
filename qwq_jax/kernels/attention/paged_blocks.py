"""Tile sizes of the paged kernel: a table, where each row comes from, and a check of memory before anything compiles.

The rows were chosen by the compiler's static schedule (`tools/kernel_schedule.py`); nothing was timed on a chip.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from qwq_jax.kernels.attention.blocks import MEGACORES, find_chip, vmem_limit
from qwq_jax.kernels.attention.decode import TERM_ROWS
from qwq_jax.kernels.attention.flash import LANES
from qwq_jax.kernels.attention.pages import check_page, is_quantized, unit_tokens
from qwq_jax.kernels.attention.stream import RING, PagedSizes

SMEM_BYTES = 1 << 20


@dataclass(frozen=True)
class Row:
    """One entry: chips by name, bytes of a cached number, and the tiles found best.

    Decode has one query a tile; chunks of prompts have `prefill_block_q`.
    """

    chips: tuple[str, ...]
    itemsize: int
    decode_block: int
    prefill_block_q: int
    prefill_block: int
    origin: str


_SCHEDULE = "static schedule, 5 query heads a kv head, jax 0.10.2, libtpu 0.0.52"
TABLE = (
    Row(("TPU v5 lite", "TPU v6", "TPU v5"), 2, 2048, 128, 1024, _SCHEDULE),
    Row(("TPU v5 lite", "TPU v5"), 1, 4096, 128, 1024, _SCHEDULE),
    Row(("TPU v6",), 1, 8192, 128, 1024, _SCHEDULE),
    Row(("TPU7x",), 2, 4096, 128, 1024, _SCHEDULE),
    Row(("TPU7x",), 1, 8192, 128, 1024, f"{_SCHEDULE}, pages of 512: fewer copies are to be started"),
    Row(("TPU v4",), 2, 2048, 64, 512, "compiles within 16 MiB of VMEM"),
    Row(("TPU v4",), 1, 1024, 64, 512, "compiles within 16 MiB of VMEM; this chip has no 8-bit products"),
)
# A float32 cache, for tests, takes half a 16-bit one's decode block.
DEPTH = {"decode": 4, "prefill": 2}


def paged_sizes(
    device_kind: str, *, groups: int, head_dim: int, page: int, dtype: Any, rows: int, tokens: int, table_width: int
) -> tuple[PagedSizes, PagedSizes]:
    """Tiles for decode and for chunks of prompts.

    Args:
        device_kind: Of `jax.Device`.
        groups: Query heads a kv head.
        head_dim: Of the cache, a multiple of 128.
        page: Tokens a page.
        dtype: Of the cache.
        rows: Rows that decode.
        tokens: Flat tokens of the batch.
        table_width: Pages of the longest row.

    Raises:
        ValueError: The chip is unknown, or pages, queries or lists do not fit; it names what would.
    """
    chip = find_chip(device_kind)
    itemsize = jnp.dtype(dtype).itemsize
    row = next(row for row in TABLE if chip in row.chips and row.itemsize == min(itemsize, 2))
    row = replace(row, decode_block=row.decode_block // max(1, itemsize // 2))
    unit = unit_tokens(dtype)
    check_page(page, dtype)
    needed = smem_bytes(max(rows, tokens // 8), table_width)
    if needed > SMEM_BYTES:
        raise ValueError(
            f"{rows} rows of up to {table_width} pages need {needed >> 10} KiB of scalar memory, and a core has "
            f"{SMEM_BYTES >> 10} KiB: use larger pages or at most {_most_rows(table_width)} rows"
        )
    limit = vmem_limit(chip)
    need = functools.partial(vmem_bytes, rows=rows, groups=groups, head_dim=head_dim, dtype=dtype)
    decode, prefill = _tiles(row, chip, page, table_width, need)
    if max(need(decode), need(prefill)) > limit:
        smaller = page // 2
        while smaller >= unit and max(map(need, _tiles(row, chip, smaller, table_width, need))) > limit:
            smaller //= 2
        advice = f"use pages of {smaller} or less" if smaller >= unit else "use fewer rows"
        raise ValueError(
            f"paged attention with {groups} query heads of {head_dim} a kv head and {page} tokens a page needs "
            f"{max(need(decode), need(prefill)) >> 20} MiB of VMEM, and {chip} has {limit >> 20}: {advice}"
        )
    float8 = (
        chip == "TPU7x" and jnp.dtype(dtype) == jnp.dtype(jnp.float8_e4m3fn) and 2 * 8 * -(-groups // 8) <= TERM_ROWS
    )
    return decode._replace(float8=float8), prefill


def _tiles(
    row: Row, chip: str, page: int, table_width: int, need: Callable[[PagedSizes], int]
) -> tuple[PagedSizes, PagedSizes]:
    """The table's tiles for decode and prefill in whole pages; fewer queries a tile where many do not fit."""
    parts = 2 if chip in MEGACORES else 1
    decode = PagedSizes(1, _whole_pages(row.decode_block, page, table_width), DEPTH["decode"], parts)
    block = _whole_pages(row.prefill_block, page, table_width)
    prefill = PagedSizes(row.prefill_block_q, block, DEPTH["prefill"], parts)
    while prefill.block_q > 8 and need(prefill) > vmem_limit(chip):
        prefill = prefill._replace(block_q=prefill.block_q // 2)
    return decode, prefill


def _whole_pages(block: int, page: int, table_width: int) -> int:
    """The multiple of a page nearest below `block`, no longer than the longest row, at least a page and 128 keys."""
    return max(1, LANES // page, min(block // page, 1 << (table_width - 1).bit_length())) * page


def vmem_bytes(sizes: PagedSizes, *, rows: int, groups: int, head_dim: int, dtype: Any) -> int:
    """Bytes of VMEM, estimated: buffers of blocks, queries and results twice, running state, scores."""
    lines = 8 * -(-groups * sizes.block_q // 8)
    token = 2 * (head_dim * jnp.dtype(dtype).itemsize + 4 * is_quantized(dtype))
    buffers = sizes.depth * sizes.block_kv * token
    working = lines * sizes.block_kv * (4 + 4) + 4 * sizes.block_kv * head_dim * is_quantized(dtype)
    if sizes.block_q > 1:
        tiles = 2 * lines * head_dim * (2 + 4) + 4 * lines * (2 * LANES + head_dim)
    else:  # all rows of a kv head: queries, new keys and values, and three float32 sums
        tiles = 2 * rows * (lines * (2 * head_dim + 4 * (head_dim + 2 * LANES)) + 2 * 4 * head_dim)
        working += 2 * 4 * lines * sizes.block_kv
    return buffers + tiles + working


def smem_bytes(rows: int, table_width: int) -> int:
    """Bytes of scalar memory: the lists of tiles and the rows of page ids in use."""
    return 4 * (8 * (rows + 1) + RING * LANES * (-(-table_width // LANES)))


def _most_rows(table_width: int) -> int:
    return (SMEM_BYTES - smem_bytes(0, table_width)) // 32
