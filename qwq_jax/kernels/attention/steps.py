"""Which blocks of a causal attention hold any visible pair, and in what order a kernel visits them.

A kernel's grid runs over a list of steps, one (query block, key block) pair a step, so that pairs above the diagonal or
of foreign segments are never visited: they cost neither arithmetic nor memory traffic.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FIRST, LAST, FULL, NEW, END = 1, 2, 4, 8, 1 << 30
PADDING = -(2**31)  # the segment of tokens that only fill up a row
MAX_CHUNKS = 15
_START, _COUNT, _MIXED = 4, 8, 12  # where in the bits each begins


class Steps(NamedTuple):
    """Visits in order; all `[rows, parts, n]` int32, rows 1 if every row of the batch has the same.

    Attributes:
        outer: The block whose accumulators stay in place over consecutive steps.
        inner: The block that changes from step to step.
        bits: FIRST and LAST visit of the outer block, NEW and END the first visit of the inner
            block and the last visit of all, FULL where every pair is visible, and what
            `whole_chunks` and `is_mixed` read; 0 in the steps at the end that are there to fill up.
    """

    outer: jax.Array | np.ndarray
    inner: jax.Array | np.ndarray
    bits: jax.Array | np.ndarray


class Deal(NamedTuple):
    """Rows whose queries are shared out as `sharding.zigzag` does, two pieces to a device.

    Attributes:
        shards: Devices.
        tokens: Of a row, those that fill it up left out.
    """

    shards: int
    tokens: int


def whole_chunks(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and number of the chunks in a row that are visible throughout."""
    return (bits >> _START) & 15, (bits >> _COUNT) & 15


def is_mixed(bits: jax.Array, chunk: jax.Array) -> jax.Array:
    """Whether this chunk must be masked: some of its pairs are visible, and it is not among the `whole_chunks`."""
    return (bits >> (_MIXED + chunk)) & 1 == 1


def plan_steps(
    length: int,
    segment_ids: jax.Array | None,
    *,
    block_q: int,
    block_kv: int,
    chunk: int,
    parts: int = 1,
    by_key: bool = False,
    query_ids: jax.Array | None = None,
    deal: "Deal | None" = None,
) -> Steps:
    """Lists the visits of a causal attention over `length` tokens, a multiple of both blocks.

    Args:
        length: Tokens a row, those that fill up included.
        segment_ids: `[B, length]` int32, PADDING for tokens that fill up; None: one segment.
        block_q: Queries a block.
        block_kv: Keys a block.
        chunk: Keys a chunk of a partial step.
        parts: Lists that share the outer blocks evenly, one a core.
        by_key: Key blocks are outer (backward of k and v), else query blocks.
        query_ids: `[B, length]` int32, the segments of queries where they are not those of keys: PADDING for those that
            are not wanted. With `segment_ids` only.
        deal: How queries are shared out, if those that are wanted are one device's: its list is so much shorter.
    """
    module = np if segment_ids is None else jnp
    chunks = block_kv // chunk
    assert block_kv % chunk == 0 and chunks <= MAX_CHUNKS, (block_kv, chunk)
    visible, whole = (
        x.reshape(*x.shape[:2], -1, chunks)
        for x in _chunk_status(length, segment_ids, query_ids, block_q=block_q, chunk=chunk)
    )
    # Whole chunks beyond the first that follow one another are masked like the mixed ones: right, if slower.
    start = module.argmax(whole, axis=-1)
    in_first = whole & (module.cumsum(~whole, axis=-1) == start[..., None])
    powers = 1 << np.arange(chunks)
    bits = (
        (start << _START)
        + (in_first.sum(-1) << _COUNT)
        + (((visible & ~in_first) * powers).sum(-1) << _MIXED)
        + FULL * whole.all(-1)
    )
    bits = module.where(visible.any(-1), bits, 0)
    bits = bits.swapaxes(1, 2) if by_key else bits
    rows, outer, inner = bits.shape
    order = _balanced(outer, parts)
    bits = bits[:, order]  # [rows, parts, outer / parts, inner]
    count = module.cumsum(bits != 0, axis=-1)
    bits = bits + (bits != 0) * (
        FIRST * (count == 1) + LAST * (count == count[..., -1:]) + NEW * (module.cumsum(bits != 0, axis=-2) == 1)
    )
    flat = lambda x: x.reshape(rows, parts, -1)  # noqa: E731
    outers = np.broadcast_to(order[None, :, :, None], bits.shape)
    inners = np.broadcast_to(np.arange(inner), bits.shape)
    steps = Steps(flat(module.asarray(outers)), flat(module.asarray(inners)), flat(bits))
    causal = np.arange(block_q, length + 1, block_q)[:, None] > np.arange(0, length, block_kv)[None]
    most = 0
    for shard in range(deal.shards if deal else 1):
        wanted = causal & _of_shard(length, block_q, shard, deal)[:, None] if deal else causal
        wanted = wanted.T if by_key else wanted
        most = max(most, int(wanted[order].reshape(parts, -1).sum(-1).max()))
    return _compact(module, steps, most)


def _of_shard(length: int, block_q: int, shard: int, deal: Deal) -> np.ndarray:
    """Which query blocks hold queries of a shard."""
    begin, pieces = np.arange(0, length, block_q), 2 * deal.shards
    piece = deal.tokens // pieces
    held = [(begin < (at + 1) * piece) & (begin + block_q > at * piece) for at in (shard, pieces - 1 - shard)]
    return held[0] | held[1]


def visited_outer(steps: Steps, blocks: int) -> jax.Array:
    """`[rows, blocks]` bool: which outer blocks are visited at all."""
    outer, bits = jnp.asarray(steps.outer), jnp.asarray(steps.bits)
    hit = (outer[..., None] == jnp.arange(blocks)) & (bits != 0)[..., None]
    return hit.any((1, 2))


def visited_inner(steps: Steps, blocks: int) -> jax.Array:
    """`[parts, rows, blocks]` bool: which inner blocks the list of a part visits."""
    inner, bits = jnp.asarray(steps.inner), jnp.asarray(steps.bits)
    hit = (inner[..., None] == jnp.arange(blocks)) & (bits != 0)[..., None]
    return hit.any(2).swapaxes(0, 1)


def _chunk_status(
    length: int, segment_ids: jax.Array | None, query_ids: jax.Array | None, *, block_q: int, chunk: int
) -> tuple[Any, Any]:
    """`[rows, query blocks, chunks]` bool: whether any pair is visible, and whether all are."""
    first_q, first_k = np.arange(0, length, block_q)[:, None], np.arange(0, length, chunk)[None]
    visible, whole = (first_q + block_q - 1 >= first_k)[None], (first_q >= first_k + chunk - 1)[None]
    if segment_ids is None:
        return visible, whole
    of_queries = segment_ids if query_ids is None else query_ids
    queries, keys = (x.reshape(x.shape[0], -1, size) for x, size in ((of_queries, block_q), (segment_ids, chunk)))
    low_q, high_q = queries.min(-1)[:, :, None], queries.max(-1)[:, :, None]
    low_k, high_k = keys.min(-1)[:, None], keys.max(-1)[:, None]
    visible = visible & (low_q <= high_k) & (low_k <= high_q) & (high_q > PADDING) & (high_k > PADDING)
    return visible, visible & whole & (low_q == high_q) & (low_k == high_k)


def _balanced(blocks: int, parts: int) -> np.ndarray:
    """Block numbers `[parts, blocks / parts]`; long and short ones are dealt out like cards, there and back."""
    assert blocks % parts == 0, (blocks, parts)
    dealt = np.arange(blocks).reshape(-1, parts)
    dealt[1::2] = dealt[1::2, ::-1]
    return np.sort(dealt.T, axis=1)


def _compact(module, steps: Steps, keep: int) -> Steps:  # noqa: ANN001
    """Moves the visits to the front, in order; those that fill up to `keep` repeat the last, so nothing is fetched."""
    seen = steps.bits != 0
    order = module.argsort(~seen, axis=-1, **({"kind": "stable"} if module is np else {"stable": True}))
    outer, inner, bits = (module.take_along_axis(x, order, axis=-1) for x in steps)
    count = seen.sum(-1, keepdims=True)
    outer, inner, bits = (x[..., :keep] for x in (outer, inner, bits))
    index = module.minimum(np.arange(outer.shape[-1]), module.maximum(count - 1, 0))
    outer, inner = (module.take_along_axis(x, index, axis=-1) for x in (outer, inner))
    bits = bits + END * ((np.arange(bits.shape[-1]) == count - 1) & (bits != 0))
    return Steps(*(x.astype(np.int32) for x in (outer, inner, bits)))
