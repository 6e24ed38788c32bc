"""Attention of query tiles over a paged cache on TPU: a stream of key blocks that never waits for the next row.

Every block of every tile is one item of one list; blocks are fetched several items ahead, across the borders of rows
and heads, so the memory bus does not idle. Scores are `[query rows, keys]`: for a decoded token one register holds 128
keys of 8 heads. A decoded token enters the cache by the same kernel: the block that holds its place is there anyway.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention.flash import LANES, LOG2_E, MASKED, START, dot, lanes, row_dot
from qwq_jax.kernels.attention.pages import KEY, VALUE
from qwq_jax.kernels.attention.stream import APPENDED, ITEM, Memory, PagedSizes, Stream, div, rem
from qwq_jax.kernels.attention.tiles import Tiles

# Float8 products: how queries and probabilities are put into two terms.
FLOAT8_MAX, TERM_STEP, TERM_ROWS = 448.0, 16.0, 32
SMALLEST = 256  # keys of the smallest step over a block that is not full


def field_mask(words: int, pack: int, low: Any, high: Any) -> jax.Array:
    """`[words, 128]` int32 with all bits of rows `low <= row < high` set, `pack` rows a word, the first one lowest."""
    row = jax.lax.broadcasted_iota(jnp.int32, (words, LANES), 0) * pack
    bits = 32 // pack
    fields = np.uint32((1 << bits) - 1) << np.arange(0, 32, bits, dtype=np.uint32)
    parts = [
        jnp.where((row + i >= low) & (row + i < high), int(field), 0) for i, field in enumerate(fields.view(np.int32))
    ]
    return functools.reduce(jnp.bitwise_or, parts)


def as_words(x: jax.Array) -> jax.Array:
    """`[rows, H]` of any width of element as 32-bit words: narrow types have no masks of their own on every chip."""
    return x if x.dtype == jnp.int32 else pltpu.bitcast(x, jnp.int32)


def merge_rows(old: jax.Array, new_words: jax.Array, low: Any, high: Any) -> jax.Array:
    """Rows `low <= row < high` of `old [rows, H]` replaced by those of `new_words`."""
    pack = 4 // old.dtype.itemsize
    words = as_words(old)
    mask = jnp.concatenate([field_mask(words.shape[0], pack, low, high)] * (words.shape[1] // LANES), axis=1)
    return pltpu.bitcast((words & ~mask) | (new_words & mask), old.dtype)


class Softmax(NamedTuple):
    """Running state of a tile's online softmax in VMEM: maximum and sum `[R, 128]`, output `[R, H]`, all float32."""

    m: Any
    total: Any
    acc: Any

    def clear(self) -> None:
        """No key seen."""
        self.m[...] = jnp.full_like(self.m, START)
        self.total[...] = jnp.zeros_like(self.total)
        self.acc[...] = jnp.zeros_like(self.acc)

    def update(self, scores: jax.Array, values: jax.Array, value_scales: list[jax.Array] | None, factor: float) -> None:
        """Takes in `scores [R, n]` and `values [n, H]`; the scales are one `[1, 128]` for each 128 keys.

        Values in float8 are multiplied as they are, by probabilities in two float8 terms.
        """
        m, n = self.m[...], scores.shape[1]
        m_next = jnp.maximum(m, jnp.max(scores, axis=1, keepdims=True))
        alpha = jnp.exp2((m - m_next) * factor)
        pieces = [jnp.exp2((scores[:, i : i + LANES] - m_next) * factor) for i in range(0, n, LANES)]
        self.m[...] = m_next
        self.total[...] = self.total[...] * alpha + functools.reduce(jnp.add, pieces)
        if value_scales is not None:
            pieces = [piece * scale for piece, scale in zip(pieces, value_scales, strict=True)]
        before = self.acc[...] * lanes(alpha, self.acc.shape[1])
        if values.dtype != jnp.float8_e4m3fn:
            self.acc[...] = before + dot(jnp.concatenate(pieces, axis=1).astype(values.dtype), values)
            return
        assert value_scales is not None, "a float8 cache has scales"
        # Probabilities are at most 1, so the largest scale is the largest of what is to be put into float8.
        largest = jnp.max(functools.reduce(jnp.maximum, value_scales), axis=1, keepdims=True)
        sums = dot(two_terms(jnp.concatenate([piece * (FLOAT8_MAX / largest) for piece in pieces], axis=1)), values)
        self.acc[...] = before + join_terms(sums, m.shape[0]) * (largest / FLOAT8_MAX)


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


def _take_block(
    stream: Stream, softmax: Softmax, q: Any, slot: jax.Array, keys: int, *, factor: float, limits: Any = None
) -> None:
    """One block, or its first `keys`; `limits` is None if all are visible, else the mask and how many there are.

    `q` is `[R, H]`, or for products in float8 its two terms and their scale `[R, 128]`.
    """
    memory, units = stream.memory, keys // stream.unit
    k, v = (memory.buffer[slot, which, :units].reshape(keys, -1) for which in (KEY, VALUE))
    if limits is not None:  # what lies past the row's end may be NaN, and 0 x NaN is NaN
        v = merge_rows(v, jnp.zeros((keys * v.dtype.itemsize // 4, v.shape[1]), jnp.int32), limits[1], keys)
    if isinstance(q, tuple):
        terms, scale = q
        scores = join_terms(row_dot(terms, k), scale.shape[0]) * lanes(scale, keys)
    else:
        scores, v = row_dot(q, k.astype(q.dtype)), v.astype(q.dtype)
    value_scales = None
    if memory.scales is not None:
        key_scales, value_scales = (
            [memory.scale_buffer[slot, i, which : which + 1, :] for i in range(units)] for which in (KEY, VALUE)
        )
        parts = [scores[:, i * LANES : (i + 1) * LANES] * scale for i, scale in enumerate(key_scales)]
        scores = jnp.concatenate(parts, axis=1)
        if limits is not None:
            lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
            value_scales = [jnp.where(lane + i * LANES < limits[1], x, 0.0) for i, x in enumerate(value_scales)]
    if limits is not None:
        scores = jnp.where(limits[0], scores, MASKED)
    softmax.update(scores, v, value_scales, factor)


class Append(NamedTuple):
    """What a decoded token needs on its way into the cache.

    Attributes:
        page: SMEM `[n]`, the page that holds each tile's last position.
        new: VMEM `[group, 2, H]` int32, the element repeated in every part of the word.
        new_scales: VMEM `[group, 2, 128]`, the scale in every lane, or None.
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

    def put(self, stream: Stream, head: Any, tile: jax.Array, index: jax.Array, slot: jax.Array) -> None:
        """Puts the new token into the fetched block, and writes the unit that holds it back to its page."""
        memory, last = stream.memory, stream.tiles.length[tile] - 1
        unit, offset = div(rem(last, stream.sizes.block_kv), stream.unit), rem(last, stream.unit)
        number = memory.cursor[APPENDED]
        stage = rem(number, 2)

        @pl.when(number >= 2)  # the write before the last one left from the same stage
        def _() -> None:
            for write in self.writes(stream, number):
                write.wait()

        for which in (KEY, VALUE):
            new = self.new[index, which : which + 1, :]
            merged = merge_rows(memory.buffer[slot, which, unit], new, offset, offset + 1)
            memory.buffer[slot, which, unit] = merged
            self.stage[stage, which, 0] = merged
        if memory.scales is not None:
            lane = jax.lax.broadcasted_iota(jnp.int32, (2, stream.unit), 1)
            merged = jnp.where(lane == offset, self.new_scales[index], memory.scale_buffer[slot, unit])
            memory.scale_buffer[slot, unit] = merged
            self.scale_stage[stage, 0] = merged
        for write in self.writes(stream, number, head, self.page[tile], rem(div(last, stream.unit), stream.page_units)):
            write.start()
        memory.cursor[APPENDED] = number + 1

    def end(self, stream: Stream) -> None:
        """Waits for the writes that are still on their way."""
        number = stream.memory.cursor[APPENDED]
        for back in (2, 1):
            for write in self.writes(stream, number + 2 - back):
                pl.when(number >= back)(write.wait)


def paged_kernel(*refs, names: tuple[str, ...], sizes: PagedSizes, kv_heads: int, scale: float):  # noqa: ANN002, ANN202
    """One group of tiles of a kv head and part; `names` says what each of `refs` is."""
    ref: Any = dict(zip(names, refs, strict=True)).get
    tiles = Tiles(*(ref(name) for name in Tiles._fields))
    stream = Stream(tiles, Memory(*(ref(name) for name in Memory._fields)), sizes, kv_heads)
    append = Append(*(ref(name) for name in Append._fields))
    appends = append.stage is not None
    softmax = Softmax(ref("m"), ref("l"), ref("acc"))
    q_ref, q_scale_ref, o_ref, lse_ref = ref("q"), ref("q_scale"), ref("o"), ref("lse")
    part, head, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    low, high = tiles.bounds[part], tiles.bounds[part + 1]
    rows, block, factor = o_ref.shape[1], sizes.block_kv, scale * LOG2_E
    # A block that is not full is taken in the smallest of these that holds its keys.
    classes = [block >> i for i in range(block.bit_length()) if i == 0 or block >> i >= SMALLEST]

    @pl.when((head == 0) & (step == 0) & (high > low))
    def _() -> None:
        stream.memory.cursor[APPENDED] = 0
        stream.begin(part)

    def one_tile(index: jax.Array, _: None) -> None:
        tile = step * sizes.group + index
        first_item = head * tiles.start[stream.count] + tiles.start[tile]
        blocks, length, first = tiles.start[tile + 1] - tiles.start[tile], tiles.length[tile], tiles.first[tile]
        softmax.clear()

        def one_block(j: jax.Array, _: None) -> None:
            slot = rem(first_item + j, sizes.depth)
            q = q_ref[index] if q_scale_ref is None else (q_ref[index], q_scale_ref[index])
            take = functools.partial(_take_block, stream, softmax, q, slot, factor=factor)
            left = length - j * block
            whole = (j + 1) * block <= first + 1  # the first query sees the block's last key
            steady = whole & stream.next_is_full(part)
            more = stream.memory.cursor[ITEM] < high
            stream.wait(slot, stream.units(tile, j))
            if appends:
                pl.when(j == blocks - 1)(lambda: append.put(stream, head, tile, index, slot))

            @pl.when(steady)
            def _() -> None:
                take(block)
                stream.start_full()

            pl.when(~steady & more)(stream.start)
            pl.when(~steady & whole)(lambda: take(block))
            for keys, smaller in zip(classes, [*classes[1:], 0], strict=True):

                @pl.when(~whole & (left > smaller) & ((left <= keys) | (keys == block)))
                def _(keys: int = keys) -> None:
                    key = j * block + jax.lax.broadcasted_iota(jnp.int32, (rows, keys), 1)
                    query = first
                    if sizes.block_q > 1:
                        query += jax.lax.broadcasted_iota(jnp.int32, (rows, keys), 0) & (sizes.block_q - 1)
                    visible = (key <= query) & (key < length)
                    take(keys, limits=(visible, jnp.minimum(left, keys)))

            pl.when(more)(lambda: stream.advance(part))

        begin, end = (jnp.clip(bound - first_item, 0, blocks) for bound in (low, high))
        jax.lax.fori_loop(begin, end, one_block, None)
        total = jnp.broadcast_to(jnp.sum(softmax.total[...], axis=1, keepdims=True), softmax.total.shape)
        seen = total > 0
        share = lanes(jnp.where(seen, 1.0 / total, 0.0), softmax.acc.shape[1])
        o_ref[index] = (softmax.acc[...] * share).astype(o_ref.dtype)
        if lse_ref is not None:
            lse = jnp.where(seen, softmax.m[...] * scale + jnp.log(total), START)
            lse_ref[index] = lse.T[:1]

    jax.lax.fori_loop(0, sizes.group, one_tile, None)

    @pl.when((head == pl.num_programs(1) - 1) & (step == pl.num_programs(2) - 1) & (high > low))
    def _() -> None:
        stream.end()
        if appends:
            append.end(stream)
