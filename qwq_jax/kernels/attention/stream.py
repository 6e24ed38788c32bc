"""The fetching side of the paged kernel: which block of keys and values comes next, and the copies that bring it.

A copy is taken up again by its semaphore, which counts bytes; so start and wait of each are described in one place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention.tiles import Tiles

RING = 8  # rows of the page table on their way or in use
HEAD, TILE, BLOCK, ITEM, APPENDED = range(5)


def div(x: jax.Array, by: int) -> jax.Array:
    """Quotient of a number that is not negative; the sign of `//` would cost several instructions."""
    return x >> (by.bit_length() - 1) if by & (by - 1) == 0 else jax.lax.div(x, jnp.int32(by))


def rem(x: jax.Array, by: int) -> jax.Array:
    """Remainder of a number that is not negative."""
    return x & (by - 1) if by & (by - 1) == 0 else jax.lax.rem(x, jnp.int32(by))


class PagedSizes(NamedTuple):
    """Tile sizes of a call: query tokens a tile, keys a block, blocks in flight, cores.

    `float8` multiplies a float8_e4m3fn cache as it is: for one token a tile, where the chip can.
    """

    block_q: int
    block_kv: int
    depth: int = 4
    parts: int = 1
    float8: bool = False


class Memory(NamedTuple):
    """What the copies run between. Pools are seen in units: part of a page, the least that is fetched.

    Attributes:
        table: HBM `[B, 1, W]` int32.
        ring: SMEM `[RING, 1, W]`, rows of the table.
        kv: HBM `[K, P, 2, page / unit, unit, H]`.
        buffer: VMEM `[depth, 2, block / unit, unit, H]`.
        scales: HBM `[K, P, page / unit, 2, unit]` float32, or None.
        scale_buffer: VMEM `[depth, block / unit, 2, unit]`, or None.
        cursor: SMEM `[5]` int32: the next item to fetch, and how many tokens were appended.
        table_sem: DMA `[RING]`.
        sem: DMA `[depth]`.
    """

    table: Any
    ring: Any
    kv: Any
    buffer: Any
    scales: Any
    scale_buffer: Any
    cursor: Any
    table_sem: Any
    sem: Any


def stream_scratch(pool: Any, sizes: PagedSizes, table_width: int) -> dict[str, Any]:
    """The parts of `Memory` that are scratch, for a pool in units."""
    *_, unit, H = pool.kv.shape
    units = sizes.block_kv // unit
    scratch = {
        "ring": pltpu.SMEM((RING, 1, table_width), jnp.int32),
        "cursor": pltpu.SMEM((5,), jnp.int32),
        "buffer": pltpu.VMEM((sizes.depth, 2, units, unit, H), pool.kv.dtype),
        "table_sem": pltpu.SemaphoreType.DMA((RING,)),
        "sem": pltpu.SemaphoreType.DMA((sizes.depth,)),
    }
    if pool.scales is not None:
        scratch["scale_buffer"] = pltpu.VMEM((sizes.depth, units, 2, unit), jnp.float32)
    return scratch


def compiler_params(*dimensions: Any) -> pltpu.CompilerParams:
    """For a kernel that streams, over a grid of these dimensions."""
    # A check of bounds costs as much as starting a copy; the tests run with the interpreter's.
    return pltpu.CompilerParams(dimension_semantics=dimensions, vmem_limit_bytes=100 << 20, disable_bounds_checks=True)


class Stream(NamedTuple):
    """Copies of one part's items, in order; `tiles` holds references to SMEM."""

    tiles: Tiles
    memory: Memory
    sizes: PagedSizes
    kv_heads: int

    @property
    def count(self) -> int:
        """Tiles of a head."""
        return self.tiles.row.shape[0]

    @property
    def unit(self) -> int:
        """Tokens a unit."""
        return self.memory.kv.shape[4]

    @property
    def page_units(self) -> int:
        """Units a page."""
        return self.memory.kv.shape[3]

    @property
    def block_units(self) -> int:
        """Units a block."""
        return self.sizes.block_kv // self.unit

    def units(self, tile: jax.Array, block: jax.Array) -> jax.Array:
        """Units of a block that hold keys of the tile."""
        left = self.tiles.length[tile] - block * self.sizes.block_kv
        return jnp.minimum(div(left + self.unit - 1, self.unit), self.block_units)

    def block(self, which: int, slot: jax.Array, keys: int) -> tuple[jax.Array, list[jax.Array] | None]:
        """The first keys or values of a buffer `[keys, H]`, and their scales, `[1, 128]` for each 128 of them."""
        units = keys // self.unit
        block = self.memory.buffer[slot, which, :units].reshape(keys, -1)
        if self.memory.scales is None:
            return block, None
        return block, [self.memory.scale_buffer[slot, i, which : which + 1, :] for i in range(units)]

    def begin(self, part: jax.Array) -> None:
        """Starts the part's first copies."""
        cursor, place = self.memory.cursor, self.tiles.begins[part]
        head, tile, item = div(place, self.count), rem(place, self.count), self.tiles.bounds[part]
        for ahead in range(RING - 1):
            pl.when(place + ahead < self.kv_heads * self.count)(self._row(place + ahead).start)
        self._row(place).wait()
        cursor[HEAD], cursor[TILE], cursor[ITEM] = head, tile, item
        cursor[BLOCK] = item - head * self.tiles.start[self.count] - self.tiles.start[tile]
        jax.lax.fori_loop(0, self.sizes.depth - 1, lambda _, __: self.issue(part), None)

    def issue(self, part: jax.Array) -> None:
        """Starts the copies of the next item, if the part has one, and moves on."""
        more = self.memory.cursor[ITEM] < self.tiles.bounds[part + 1]
        pl.when(more)(self.start)
        pl.when(more)(lambda: self.advance(part))

    def next_is_full(self, part: jax.Array) -> jax.Array:
        """Whether there is a next item, and it is a full block."""
        cursor = self.memory.cursor
        units = self.units(cursor[TILE], cursor[BLOCK])
        return (cursor[ITEM] < self.tiles.bounds[part + 1]) & (units == self.block_units)

    def start(self) -> None:
        """Starts the copies of the next item."""
        cursor = self.memory.cursor
        units = self.units(cursor[TILE], cursor[BLOCK])
        pl.when(units == self.block_units)(self.start_full)

        @pl.when(units < self.block_units)
        def _() -> None:
            fetch, whole, rest = self._fetcher(), div(units, self.page_units), rem(units, self.page_units)
            jax.lax.fori_loop(0, whole, lambda index, _: fetch(index, self.page_units), None)
            pl.when(rest > 0)(lambda: fetch(whole, rest))

    def start_full(self) -> None:
        """Starts the copies of the next item, a full block: no branch, so that they hide among other instructions."""
        fetch = self._fetcher()
        for index in range(self.block_units // self.page_units):
            fetch(index, self.page_units)

    def advance(self, part: jax.Array) -> None:
        """Moves on to the item after the next, whose copies were started."""
        cursor = self.memory.cursor
        head, tile, block, item = cursor[HEAD], cursor[TILE], cursor[BLOCK], cursor[ITEM]
        cursor[ITEM], cursor[BLOCK] = item + 1, block + 1
        ends = block + 1 == self.tiles.start[tile + 1] - self.tiles.start[tile]
        pl.when(ends & (item + 1 < self.tiles.bounds[part + 1]))(lambda: self._move(head, tile))

    def wait(self, slot: jax.Array, units: jax.Array) -> None:
        """Waits until the first units of a buffer are there."""

        def take(size: Any) -> None:
            # A page is smaller than a block: the buffer stands for both ends, and its bytes are what counts.
            sem, whole = self.memory.sem.at[slot], self.memory.buffer.at[slot, :, pl.ds(0, size)]
            pltpu.make_async_copy(whole, whole, sem).wait()
            if self.memory.scales is not None:
                whole = self.memory.scale_buffer.at[slot, pl.ds(0, size)]
                pltpu.make_async_copy(whole, whole, sem).wait()

        pl.when(units == self.block_units)(lambda: take(self.block_units))
        pl.when(units < self.block_units)(lambda: take(units))

    def end(self) -> None:
        """Takes in the rows of page ids that were fetched for nothing."""
        place = self.memory.cursor[HEAD] * self.count + self.memory.cursor[TILE]
        for ahead in range(1, RING - 1):
            pl.when(place + ahead < self.kv_heads * self.count)(self._row(place + ahead).wait)

    def _row(self, place: jax.Array) -> Any:
        """The copy of a tile's row of page ids; `place` counts tiles over all kv heads."""
        slot = rem(place, RING)
        source = self.memory.table.at[self.tiles.row[rem(place, self.count)]]
        return pltpu.make_async_copy(source, self.memory.ring.at[slot], self.memory.table_sem.at[slot])

    def _fetcher(self) -> Callable[[Any, Any], None]:
        """Starts the copies of the first `size` units of a page of the next block; `index` counts its pages."""
        memory, cursor = self.memory, self.memory.cursor
        head, tile, slot = cursor[HEAD], cursor[TILE], rem(cursor[ITEM], self.sizes.depth)
        ring, first = rem(head * self.count + tile, RING), cursor[BLOCK] * (self.block_units // self.page_units)

        def fetch(index: Any, size: Any) -> None:
            page, at, sem = memory.ring[ring, 0, first + index], index * self.page_units, memory.sem.at[slot]
            source = memory.kv.at[head, page, :, pl.ds(0, size)]
            pltpu.make_async_copy(source, memory.buffer.at[slot, :, pl.ds(at, size)], sem).start()
            if memory.scales is not None:
                source = memory.scales.at[head, page, pl.ds(0, size)]
                pltpu.make_async_copy(source, memory.scale_buffer.at[slot, pl.ds(at, size)], sem).start()

        return fetch

    def _move(self, head: jax.Array, tile: jax.Array) -> None:
        """Goes to the next tile that is not empty; every row of page ids on the way is waited for once."""
        following = self.tiles.following[tile]
        wraps = following == self.count
        next_head = jnp.where(wraps, head + 1, head)
        next_tile = jnp.where(wraps, self.tiles.following[self.count], following)

        def step(place: jax.Array, _: None) -> None:
            self._row(place).wait()
            ahead = place + RING - 2
            pl.when(ahead < self.kv_heads * self.count)(self._row(ahead).start)

        jax.lax.fori_loop(head * self.count + tile + 1, next_head * self.count + next_tile + 1, step, None)
        cursor = self.memory.cursor
        cursor[HEAD], cursor[TILE], cursor[BLOCK] = next_head, next_tile, 0
