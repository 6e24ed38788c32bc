"""Attention of query tiles over a paged cache on TPU: chunks of prompts, over all that came before them.

A tile is some consecutive tokens of a row with all query heads of a kv head. Every block of keys of every tile is one
item of one list; blocks are fetched ahead, across the borders of tiles and heads, so the memory bus does not idle.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwq_jax.kernels.attention.flash import LANES, LOG2_E, MASKED, START, dot, lanes, row_dot
from qwq_jax.kernels.attention.pages import KEY, VALUE
from qwq_jax.kernels.attention.stream import ITEM, Memory, PagedSizes, Stream, rem
from qwq_jax.kernels.attention.tiles import Tiles
from qwq_jax.kernels.attention.words import merge_rows

SMALLEST = 256  # keys of the smallest step over a block that is not full


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
        """Takes in `scores [R, n]` and `values [n, H]`; the scales are one `[1, 128]` for each 128 keys."""
        m, n = self.m[...], scores.shape[1]
        m_next = jnp.maximum(m, jnp.max(scores, axis=1, keepdims=True))
        alpha = jnp.exp2((m - m_next) * factor)
        pieces = [jnp.exp2((scores[:, i : i + LANES] - m_next) * factor) for i in range(0, n, LANES)]
        self.m[...] = m_next
        self.total[...] = self.total[...] * alpha + functools.reduce(jnp.add, pieces)
        if value_scales is not None:
            pieces = [piece * scale for piece, scale in zip(pieces, value_scales, strict=True)]
        before = self.acc[...] * lanes(alpha, self.acc.shape[1])
        self.acc[...] = before + dot(jnp.concatenate(pieces, axis=1).astype(values.dtype), values)


def _take_block(
    stream: Stream, softmax: Softmax, q: jax.Array, slot: jax.Array, keys: int, *, factor: float, limits: Any = None
) -> None:
    """One block, or its first `keys`; `limits` is None if all are visible, else the mask and how many there are."""
    (k, key_scales), (v, value_scales) = (stream.block(which, slot, keys) for which in (KEY, VALUE))
    if limits is not None:  # what lies past the row's end may be NaN, and 0 x NaN is NaN
        v = merge_rows(v, jnp.zeros((keys * v.dtype.itemsize // 4, v.shape[1]), jnp.int32), limits[1], keys)
    scores, v = row_dot(q, k.astype(q.dtype)), v.astype(q.dtype)
    if key_scales is not None and value_scales is not None:
        parts = [scores[:, i * LANES : (i + 1) * LANES] * scale for i, scale in enumerate(key_scales)]
        scores = jnp.concatenate(parts, axis=1)
        if limits is not None:
            lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
            value_scales = [jnp.where(lane + i * LANES < limits[1], x, 0.0) for i, x in enumerate(value_scales)]
    if limits is not None:
        scores = jnp.where(limits[0], scores, MASKED)
    softmax.update(scores, v, value_scales, factor)


def paged_kernel(*refs, names: tuple[str, ...], sizes: PagedSizes, kv_heads: int, scale: float):  # noqa: ANN002, ANN202
    """One tile of a kv head and part; `names` says what each of `refs` is."""
    ref: Any = dict(zip(names, refs, strict=True)).get
    tiles = Tiles(*(ref(name) for name in Tiles._fields))
    stream = Stream(tiles, Memory(*(ref(name) for name in Memory._fields)), sizes, kv_heads)
    softmax = Softmax(*(ref(name) for name in Softmax._fields))
    q_ref, o_ref, lse_ref = ref("q"), ref("o"), ref("lse")
    part, head, tile = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    low, high = tiles.bounds[part], tiles.bounds[part + 1]
    rows, block, factor = o_ref.shape[1], sizes.block_kv, scale * LOG2_E
    # A block that is not full is taken in the smallest of these that holds its keys.
    classes = [block >> i for i in range(block.bit_length()) if i == 0 or block >> i >= SMALLEST]

    @pl.when((head == 0) & (tile == 0) & (high > low))
    def _() -> None:
        stream.begin(part)

    first_item = head * tiles.start[stream.count] + tiles.start[tile]
    blocks, length, first = tiles.start[tile + 1] - tiles.start[tile], tiles.length[tile], tiles.first[tile]
    softmax.clear()

    def one_block(j: jax.Array, _: None) -> None:
        slot = rem(first_item + j, sizes.depth)
        take = functools.partial(_take_block, stream, softmax, q_ref[0], slot, factor=factor)
        left = length - j * block
        whole = (j + 1) * block <= first + 1  # the first query sees the block's last key
        steady = whole & stream.next_is_full(part)
        more = stream.memory.cursor[ITEM] < high
        stream.wait(slot, stream.units(tile, j))

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
                query = first + (jax.lax.broadcasted_iota(jnp.int32, (rows, keys), 0) & (sizes.block_q - 1))
                visible = (key <= query) & (key < length)
                take(keys, limits=(visible, jnp.minimum(left, keys)))

        pl.when(more)(lambda: stream.advance(part))

    begin, end = (jnp.clip(bound - first_item, 0, blocks) for bound in (low, high))
    jax.lax.fori_loop(begin, end, one_block, None)
    total = jnp.broadcast_to(jnp.sum(softmax.total[...], axis=1, keepdims=True), softmax.total.shape)
    seen = total > 0
    share = lanes(jnp.where(seen, 1.0 / total, 0.0), softmax.acc.shape[1])
    o_ref[0] = (softmax.acc[...] * share).astype(o_ref.dtype)
    lse_ref[0] = jnp.where(seen, softmax.m[...] * scale + jnp.log(total), START).T[:1]

    @pl.when((head == pl.num_programs(1) - 1) & (tile == pl.num_programs(2) - 1) & (high > low))
    def _() -> None:
        stream.end()
