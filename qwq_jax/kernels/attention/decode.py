"""Decoding over a paged cache on TPU: one query token a row, in a pipeline that hides one block behind another.

A product's results, a maximum over lanes and an exponential each take a hundred cycles or more to come out, and for one
token they wait for each other. So every trip of the loop takes the scores of one block and the values of the block
before, which do not depend on each other: the compiler fills the waits of one with the work of the other. Blocks follow
one another across rows; what a row has gathered stands in its place of the results after every trip.

The new token enters the cache on the way: the block that holds its place is there anyway.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention.flash import LANES, LOG2_E, MASKED, START, dot, lanes, row_dot
from qwq_jax.kernels.attention.pages import KEY, VALUE
from qwq_jax.kernels.attention.stream import APPENDED, ITEM, Memory, PagedSizes, Stream, div, rem
from qwq_jax.kernels.attention.tiles import Tiles
from qwq_jax.kernels.attention.words import merge_rows

# Float8 products: how queries and probabilities are put into two terms.
FLOAT8_MAX, TERM_STEP, TERM_ROWS = 448.0, 16.0, 32
SHORT = 512  # keys of a trip whose blocks hold no more


def two_terms(x: jax.Array) -> jax.Array:
    """`x [R, n]`, at most FLOAT8_MAX, as a sum of two float8_e4m3fn: `[32, n]`, the second term in rows R on, times 16.

    The terms hold eight bits together, as bfloat16 does, and below 2^-6 what is a multiple of 2^-13.
    """
    high = x.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    rest = jnp.zeros((TERM_ROWS - 2 * x.shape[0], x.shape[1]), jnp.float32)
    return jnp.concatenate([x, (x - high) * TERM_STEP, rest], axis=0).astype(jnp.float8_e4m3fn)


def join_terms(products: jax.Array, rows: int) -> jax.Array:
    """What the products `[32, n]` of two terms stand for: `[rows, n]`."""
    return products[:rows] + products[rows : 2 * rows] * (1 / TERM_STEP)


class Append(NamedTuple):
    """What a decoded token needs on its way into the cache.

    Attributes:
        page: SMEM `[n]`, the page that holds each row's last position.
        new: VMEM `[n, 2, H]` int32, the element repeated in every part of the word.
        new_scales: VMEM `[n, 2, 128]`, the scale in every lane, or None.
        stage: VMEM `[2, 2, 1, unit, H]`.
        scale_stage: VMEM `[2, 1, 2, unit]`, or None.
        write_sem: DMA `[2]`.
    """

    page: Any
    new: Any
    new_scales: Any
    stage: Any
    scale_stage: Any
    write_sem: Any

    def writes(self, stream: Stream, number: jax.Array, head: Any = 0, page: Any = 0, unit: Any = 0) -> list[Any]:
        """The copies from a stage to the pool; where to does not matter in a wait."""
        memory, at = stream.memory, rem(number, 2)
        copies = [(self.stage.at[at], memory.kv.at[head, page, :, pl.ds(unit, 1)])]
        if memory.scales is not None:
            copies.append((self.scale_stage.at[at], memory.scales.at[head, page, pl.ds(unit, 1)]))
        return [pltpu.make_async_copy(source, target, self.write_sem.at[at]) for source, target in copies]

    def put(self, stream: Stream, head: Any, tile: jax.Array, slot: jax.Array) -> None:
        """Puts the new token into the fetched block, and writes the unit that holds it back to its page.

        What follows the token in its unit may be NaN, and 0 x NaN is NaN: in the block, though not in the page, it is
        zeroed. Units after this one hold zeros, or what some earlier block left there.
        """
        memory, last = stream.memory, stream.tiles.length[tile] - 1
        unit, offset = div(rem(last, stream.sizes.block_kv), stream.unit), rem(last, stream.unit)
        number = memory.cursor[APPENDED]
        stage = rem(number, 2)

        @pl.when(number >= 2)  # the write before the last one left from the same stage
        def _() -> None:
            for write in self.writes(stream, number):
                write.wait()

        for which in (KEY, VALUE):
            new = self.new[tile, which : which + 1, :]
            merged = merge_rows(memory.buffer[slot, which, unit], new, offset, offset + 1)
            self.stage[stage, which, 0] = merged
            memory.buffer[slot, which, unit] = merge_rows(merged, jnp.zeros_like(new), offset + 1, stream.unit)
        if memory.scales is not None:
            lane = jax.lax.broadcasted_iota(jnp.int32, (2, stream.unit), 1)
            merged = jnp.where(lane == offset, self.new_scales[tile], memory.scale_buffer[slot, unit])
            self.scale_stage[stage, 0] = merged
            memory.scale_buffer[slot, unit] = jnp.where(lane <= offset, merged, 0.0)
        for write in self.writes(stream, number, head, self.page[tile], rem(div(last, stream.unit), stream.page_units)):
            write.start()
        memory.cursor[APPENDED] = number + 1

    def end(self, stream: Stream) -> None:
        """Waits for the writes that are still on their way."""
        number = stream.memory.cursor[APPENDED]
        for back in (2, 1):
            for write in self.writes(stream, number + 2 - back):
                pl.when(number >= back)(write.wait)


class Item(NamedTuple):
    """One block of one row: its number among all, its row, and its number in the row."""

    number: Any
    tile: Any
    block: Any


class Decoder(NamedTuple):
    """The arithmetic of a trip.

    Attributes:
        stream: The blocks.
        q: VMEM `[n, R, H]`, or in float8 `[n, 32, H]`.
        q_scale: VMEM `[n, R, 128]` for float8, else None.
        held: VMEM `[2, R, block]` float32, scores on their way from one trip to the next.
        acc: VMEM `[n, R, H]` float32, weighted sums of values.
        m: VMEM `[n, R, 128]` float32, maxima of the scores, the same in all lanes.
        total: VMEM `[n, R, 128]` float32, sums of weights, a part in each lane.
        scale: Factor on the scores.
    """

    stream: Stream
    q: Any
    q_scale: Any
    held: Any
    acc: Any
    m: Any
    total: Any
    scale: float

    def clear(self) -> None:
        """Zeroes the buffers: what has never been fetched must not be NaN where weights are 0."""
        memory = self.stream.memory
        many = math.gcd(self.stream.block_units, 16)  # enough for the loop itself to cost little

        def some(index: jax.Array, _: None) -> None:
            first = index * many
            slot, unit = div(first, self.stream.block_units), rem(first, self.stream.block_units)
            zeros = jnp.zeros((many, *memory.buffer.shape[3:]), memory.buffer.dtype)
            memory.buffer[slot, VALUE, pl.ds(unit, many)] = zeros
            if memory.scales is not None:
                zeros = jnp.zeros((many, *memory.scale_buffer.shape[2:]), jnp.float32)
                memory.scale_buffer[slot, pl.ds(unit, many)] = zeros

        jax.lax.fori_loop(0, self.stream.sizes.depth * self.stream.block_units // many, some, None)

    def _scores(self, item: Item, keys: int) -> list[jax.Array]:
        """Scores of an item's first keys, `[R, 128]` for each 128 of them; those past the row's end are masked."""
        k, scales = self.stream.block(KEY, rem(item.number, self.stream.sizes.depth), keys)
        q = self.q[item.tile]
        if self.q_scale is None:
            scores = row_dot(q, k.astype(q.dtype))
        else:
            q_scale = self.q_scale[item.tile]
            scores = join_terms(row_dot(q, k), q_scale.shape[0]) * lanes(q_scale, keys)
        left = self.stream.tiles.length[item.tile] - item.block * self.stream.sizes.block_kv
        lane = jax.lax.broadcasted_iota(jnp.int32, (scores.shape[0], LANES), 1)
        pieces = [scores[:, i : i + LANES] for i in range(0, keys, LANES)]
        if scales is not None:
            pieces = [piece * scale for piece, scale in zip(pieces, scales, strict=True)]
        return [jnp.where(lane < left - i * LANES, piece, MASKED) for i, piece in enumerate(pieces)]

    def take(self, now: Item, before: Item, keys: int, first: jax.Array) -> None:
        """Holds the scores of `now`, and adds `before`, of whose row it may be the first, by its scores and values.

        The softmax is the online one (arXiv 1805.02867). The order is that of the matrix unit, which takes products in
        turn: the scores of `now` fill its wait for the maximum.
        """
        at, factor = before.tile, self.scale * LOG2_E
        held = self.held[rem(before.number, 2), :, :keys]
        m = jnp.where(first, START, self.m[at])
        m_next = jnp.maximum(m, jnp.max(held, axis=1, keepdims=True))
        scores = self._scores(now, keys)
        v, scales = self.stream.block(VALUE, rem(before.number, self.stream.sizes.depth), keys)
        alpha = jnp.exp2((m - m_next) * factor)
        pieces = [jnp.exp2((held[:, i : i + LANES] - m_next) * factor) for i in range(0, keys, LANES)]
        self.m[at] = m_next
        self.total[at] = jnp.where(first, 0.0, self.total[at]) * alpha + functools.reduce(jnp.add, pieces)
        if scales is not None:
            pieces = [piece * scale for piece, scale in zip(pieces, scales, strict=True)]
        sums = self._weigh(pieces, v, scales)
        self.acc[at] = jnp.where(first, 0.0, self.acc[at]) * lanes(alpha, v.shape[1]) + sums
        # The next trip may be longer than this one.
        scores += [jnp.full_like(scores[0], MASKED)] * ((self.held.shape[2] - keys) // LANES)
        for i, piece in enumerate(scores):
            self.held[rem(now.number, 2), :, i * LANES : (i + 1) * LANES] = piece

    def _weigh(self, pieces: list[jax.Array], v: jax.Array, scales: list[jax.Array] | None) -> jax.Array:
        """Sum of values `[n, H]` with weights `[R, 128]` for each 128 of them: `[R, H]`."""
        if self.q_scale is None:
            return dot(jnp.concatenate(pieces, axis=1).astype(self.q.dtype), v.astype(self.q.dtype))
        assert scales is not None, "a float8 cache has scales"
        # Probabilities are at most 1, so the largest scale is the largest of what is to be put into float8.
        largest = jnp.max(functools.reduce(jnp.maximum, scales), axis=1, keepdims=True)
        largest = jnp.maximum(largest, 1e-30)
        terms = two_terms(jnp.concatenate([piece * (FLOAT8_MAX / largest) for piece in pieces], axis=1))
        return join_terms(dot(terms, v), pieces[0].shape[0]) * (largest / FLOAT8_MAX)


def decode_kernel(*refs, names: tuple[str, ...], sizes: PagedSizes, kv_heads: int, scale: float):  # noqa: ANN002, ANN202
    """All rows of a kv head and part; `names` says what each of `refs` is."""
    ref: Any = dict(zip(names, refs, strict=True)).get
    tiles = Tiles(*(ref(name) for name in Tiles._fields))
    stream = Stream(tiles, Memory(*(ref(name) for name in Memory._fields)), sizes, kv_heads)
    append = Append(*(ref(name) for name in Append._fields))
    arrays = {name: ref(name) for name in Decoder._fields if name not in ("stream", "scale")}
    decoder = Decoder(stream=stream, scale=scale, **arrays)
    part, head, count, block = pl.program_id(0), pl.program_id(1), stream.count, sizes.block_kv
    low, high, per_head = tiles.bounds[part], tiles.bounds[part + 1], tiles.start[count]
    begin, end = (jnp.clip(bound - head * per_head, 0, per_head) for bound in (low, high))

    @pl.when((head == 0) & (high > low))
    def _() -> None:
        stream.memory.cursor[APPENDED] = 0
        decoder.clear()
        stream.begin(part)

    inside = low >= head * per_head  # the part begins in this head, perhaps in the middle of a row
    tile = jnp.where(inside, rem(tiles.begins[part], count), tiles.following[count])
    tile = jnp.minimum(tile, count - 1)
    start = Item(head * per_head + begin, tile, begin - tiles.start[tile])

    def trip(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        """Scores of the item `now` and values of the item `before`.

        The first trip's values and the last's scores are of no item; what they leave is written over or never read.
        """
        now, before = Item(*carry[:3]), Item(*carry[3:])
        left = tiles.length[now.tile] - now.block * block
        slot, real = rem(now.number, sizes.depth), index < end
        # One item is fetched for each that is taken: the last trip, which takes none, would run into what is not read.
        more, full = real & (stream.memory.cursor[ITEM] < high), real & stream.next_is_full(part)

        @pl.when(real)
        def _() -> None:
            stream.wait(slot, stream.units(now.tile, now.block))
            pl.when(left <= block)(lambda: append.put(stream, head, now.tile, slot))

        # Of a row that two parts share, each has its own first block.
        first_block = jnp.maximum(low - head * per_head - tiles.start[before.tile], 0)
        # Beyond the last item there is no block that is at rest but the one before.
        scored = Item(*(jnp.where(real, a, b) for a, b in zip(now, before, strict=True)))

        def both(keys: int) -> None:
            decoder.take(scored, before, keys, before.block == first_block)

        short = min(SHORT, block)
        needed = jnp.maximum(left, tiles.length[before.tile] - before.block * block)

        @pl.when((needed > short) & full)
        def _() -> None:
            both(block)
            stream.start_full()

        pl.when((needed > short) & ~full)(lambda: both(block))
        pl.when(needed <= short)(lambda: both(short))
        pl.when(more & ((needed <= short) | ~full))(stream.start)
        pl.when(more)(lambda: stream.advance(part))
        ends = left <= block
        following = jnp.minimum(tiles.following[now.tile], count - 1)
        after = (now.number + 1, jnp.where(ends, following, now.tile), jnp.where(ends, 0, now.block + 1))
        return (*after, *now)

    @pl.when(end > begin)
    def _() -> None:
        jax.lax.fori_loop(begin, end + 1, trip, (*start, *start))

    @pl.when((head == pl.num_programs(1) - 1) & (high > low))
    def _() -> None:
        stream.end()
        append.end(stream)
