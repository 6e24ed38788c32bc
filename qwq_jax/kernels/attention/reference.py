"""Attention in plain jnp: the contract of every kernel beside it, and the path that a CPU takes.

Scores, softmax and the sums are float32 whatever the dtype of the inputs (only the weights that enter a product take
it): attention over 131,072 keys summed in bfloat16 loses the small probabilities that long reasoning lives on.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwq_jax.kernels.attention.pages import KEY, VALUE, PagedLayer, PagedOutput, RaggedRows, append_to_pages, widen

# q [B, N, H], the cache, page table [B, W], lengths [B] and the scale -> output [B, N, H] and log-sum-exp [B, N].
AttendDecode = Callable[[jax.Array, PagedLayer, jax.Array, jax.Array, float], tuple[jax.Array, jax.Array]]

# Finite, so that a row with no visible key gives 0 / 0 nowhere: such rows are zeroed instead.
MASKED = -1e30
# Fewer tokens of a row alone are not worth a way of their own to read them.
ALONE_TOKENS = 128
# Tokens of a single row that are multiplied with all of it at once, such as guesses that are checked.
ALONE_QUERIES = 16


class Blocks(NamedTuple):
    """How much of a paged cache is computed at once.

    Attributes:
        decode_bytes: Keys of all rows that decoding reads in one turn of its loop.
        decode_pages: That many pages at least; both are no more than there are.
        chunk_queries: Tokens of a chunk that are multiplied at once.
        chunk_keys: Tokens of the cache that they are multiplied with.
    """

    decode_bytes: int
    decode_pages: int
    chunk_queries: int
    chunk_keys: int


# On a CPU: few enough bytes to stay in a core's cache, many enough to be worth a turn.
CPU_BLOCKS = Blocks(decode_bytes=2**19, decode_pages=16, chunk_queries=32, chunk_keys=64)
# On a GPU each turn of a loop waits for the host, so that there is one for all rows of an engine's usual sizes.
GPU_BLOCKS = Blocks(decode_bytes=2**28, decode_pages=16, chunk_queries=256, chunk_keys=1024)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    scale: float,
    block_q: int | None = None,
    query_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal grouped-query attention within segments.

    Args:
        q: `[B, T, N, H]`.
        k: `[B, T, K, H]`, N a multiple of K; query head n reads kv head n // (N / K).
        v: `[B, T, K, H]`.
        segment_ids: `[B, T]` int32; a token sees earlier tokens (and itself) of its own segment. None: one segment.
        scale: Factor on the scores before the softmax, 1/sqrt(H) as a rule.
        block_q: Query tokens handled at once, which bounds the scores in memory to `B N block_q T`. None: 64, or T/32
            of a long row. Small blocks skip more of what lies above the diagonal; each is compiled on its own.
        query_ids: `[B, T]` int32, the segments of queries where they are not those of keys; the result of a query that
            then sees no key is arbitrary. With `segment_ids` only.

    Returns:
        `[B, T, N, H]` in the dtype of q, and the natural logarithm of the softmax's denominator, `[B, N, T]` float32.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    size_q = block_q or max(64, -(-T // 32))
    q = q.reshape(B, T, K, N // K, H)

    def block(start: int, size: int) -> tuple[jax.Array, jax.Array]:
        stop = start + size  # keys after the block's last query are above the diagonal: never read
        scores = jnp.einsum("btkgh,bskh->bkgts", q[:, start:stop], k[:, :stop], preferred_element_type=jnp.float32)
        visible = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        visible = visible[None]
        if segment_ids is not None:
            ids = segment_ids if query_ids is None else query_ids
            visible &= ids[:, start:stop, None] == segment_ids[:, None, :stop]
        scores = jnp.where(visible[:, None, None], scores * scale, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bkgts,bskh->btkgh", weights, v[:, :stop], preferred_element_type=jnp.float32)
        return out, jax.nn.logsumexp(scores, axis=-1)

    outs, lses = zip(*(block(start, min(size_q, T - start)) for start in range(0, T, size_q)), strict=True)
    out = jnp.concatenate(outs, axis=1).reshape(B, T, N, H).astype(q.dtype)
    return out, jnp.concatenate(lses, axis=-1).reshape(B, N, T)


def _read_pages(layer: PagedLayer, pages: jax.Array, which: int, dtype: Any) -> jax.Array:
    """Keys or values of `pages` `[...]`, as `[K, ..., page, H]` of this dtype."""
    values = layer.kv.at[:, pages, which].get(mode="clip")
    if layer.scales is None:
        return values.astype(dtype)
    scales = layer.scales[:, :, :, which].at[:, pages].get(mode="clip").reshape(*values.shape[:-1], 1)
    return (values.astype(jnp.float32) * scales).astype(dtype)


def _append(layer: PagedLayer, k: jax.Array, v: jax.Array, slots: jax.Array) -> PagedLayer:
    """`append_to_pages`, in place for a single token too: XLA would turn its scatter into copies of the whole pool."""
    if slots.shape[0] == 1:
        outside = layer.kv.shape[1] * layer.kv.shape[3]
        k, v, slots = (jnp.concatenate([x, x]) for x in (k, v, slots))
        slots = slots.at[1].set(outside)
    return append_to_pages(layer, k, v, slots)


def _attend_decode(
    q: jax.Array, layer: PagedLayer, page_table: jax.Array, kv_length: jax.Array, scale: float, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """Rows of one query each, q `[B, N, H]`, the last token of its row.

    The pages in use, of all rows, are one list, and a loop takes some at a time, as `blocks` says: time goes by tokens
    in the cache, not by the longest row, and what was read is still in the core's cache when it is used. Where one turn
    holds all pages that there may be, there is no loop, and time goes by those. Each page gives a maximum, a sum and a
    weighted value, which its row joins at the end (as in arXiv 1805.02867).

    Returns:
        Output `[B, N, H]` and log-sum-exp `[B, N]`, float32.
    """
    (B, N, H), W = q.shape, page_table.shape[1]
    if B == 1 and W <= blocks.decode_pages:
        return _attend_alone(q, layer, page_table[0], kv_length, scale)
    K, _, _, page, _ = layer.kv.shape
    G, page_bytes = N // K, K * page * H * q.dtype.itemsize
    size = min(max(blocks.decode_pages, blocks.decode_bytes // page_bytes), B * W)
    total = -(-B * W // size) * size
    counts = -(-kv_length // page)
    ends = jnp.cumsum(counts)
    starts, in_use = ends - counts, ends[-1]
    item = jnp.arange(total)
    row = jnp.minimum(jnp.searchsorted(ends, item, side="right"), B - 1)
    column = jnp.clip(item - starts[row], 0, W - 1)
    listed = page_table[row, column]
    tokens = jnp.where(item < in_use, kv_length[row] - column * page, 0)  # of the row, from this page on
    queries = q.reshape(B, K, G, H)

    # Pages are the first axis of all that is computed: XLA shares out the first one among cores, and K may be odd.
    def read(pages: jax.Array, which: int) -> jax.Array:
        return _read_pages(layer, pages, which, q.dtype).swapaxes(0, 1)

    def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        begin, *parts = state
        pages, rows, left = (jax.lax.dynamic_slice(x, (begin,), (size,)) for x in (listed, row, tokens))
        live = (jnp.arange(page) < left[:, None])[:, None, :, None]
        # The many keys on the left: XLA's product of few rows by a transposed matrix is the slower one.
        scores = jnp.einsum("pksh,pkgh->pksg", read(pages, KEY), queries[rows], preferred_element_type=jnp.float32)
        # Turned here, and not within the second product, which would be up to three times as slow.
        scores = jax.lax.optimization_barrier((scores * scale).swapaxes(2, 3))
        scores = jnp.where(live.swapaxes(2, 3), scores, MASKED)
        top = jnp.max(scores, axis=3)
        weights = jnp.exp(scores - top[..., None])
        # Pages are reused and never cleared: what lies past a row's end may be NaN, and 0 x NaN is NaN.
        values = jnp.where(live, read(pages, VALUE), 0)
        out = jnp.einsum("pkgs,pksh->pkgh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
        new = (top, jnp.sum(weights, axis=3), out)
        put = jax.lax.dynamic_update_slice_in_dim
        return begin + size, *(put(part, x, begin, axis=0) for part, x in zip(parts, new, strict=True))

    sizes = ((total, K, G), (total, K, G), (total, K, G, H))
    zeros = (jnp.zeros(shape, jnp.float32) for shape in sizes)
    state = (jnp.int32(0), *zeros)
    state = body(state) if size == total else jax.lax.while_loop(lambda state: state[0] < in_use, body, state)
    _, top, sums, outs = state
    mine = (jnp.arange(W) < counts[:, None])[:, :, None, None]
    at = jnp.minimum(starts[:, None] + jnp.arange(W), total - 1)
    top = jnp.where(mine, top[at], MASKED)  # [B, W, K, G]
    highest = jnp.max(top, axis=1)
    share = jnp.where(mine, jnp.exp(top - highest[:, None]), 0)
    normaliser = jnp.maximum(jnp.sum(share * sums[at], axis=1), jnp.finfo(jnp.float32).tiny)
    out = jnp.sum(share[..., None] * outs[at], axis=1) / normaliser[..., None]
    lse = highest + jnp.log(normaliser)
    return out.reshape(B, N, H), lse.reshape(B, N)


def _attend_alone(
    q: jax.Array, layer: PagedLayer, pages: jax.Array, lengths: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """One row of few pages `[W]` and few queries `[T, N, H]`: all of them at once, with nothing to join.

    Query t sees `lengths[t]` tokens of the row, the last one all of it. Where a half or a quarter of the pages holds
    the row, no more are read.

    Returns:
        Output `[T, N, H]` and log-sum-exp `[T, N]`, float32.
    """
    W, page = pages.shape[0], layer.kv.shape[3]
    widths = [width for width in (W // 4, W // 2) if width * page >= ALONE_TOKENS] + [W]
    choice = sum((jnp.max(lengths) > width * page).astype(jnp.int32) for width in widths[:-1])
    ways = [partial(_attend_pages, q, layer, pages[:width], lengths, scale) for width in widths]
    return jax.lax.switch(choice, ways)


def _attend_pages(
    q: jax.Array, layer: PagedLayer, pages: jax.Array, lengths: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    (T, N, H), (K, _, _, page, _) = q.shape, layer.kv.shape
    S, G = pages.shape[0] * page, N // K
    live = jnp.arange(S) < lengths[:, None]
    keys, values = (_read_pages(layer, pages, which, q.dtype).reshape(K, S, H) for which in (KEY, VALUE))
    queries = q.reshape(T, K, G, H).swapaxes(0, 1).reshape(K, T * G, H)
    scores = jnp.einsum("kqh,ksh->kqs", queries, keys, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(jnp.repeat(live, G, axis=0), scores, MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Pages are reused and never cleared: what lies past the row's end may be NaN, and 0 x NaN is NaN.
    values = jnp.where(jnp.any(live, axis=0)[:, None], values, 0)
    out = jnp.einsum("kqs,ksh->kqh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
    flat = lambda x: x.reshape(K, T, G, -1).swapaxes(0, 1).reshape(T, N, -1)  # noqa: E731
    return flat(out / total), flat(top + jnp.log(total))[..., 0]


def _attend_chunks(
    q: jax.Array, layer: PagedLayer, rows: RaggedRows, scale: float, max_query: int, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
    """Rows of several queries, each the last tokens of its row: q `[T, N, H]` flat, laid out by `query_start`.

    A loop takes `chunk_queries` tokens of a row at a time, and one within it the pages that these see, some at a time,
    with a running maximum and sum (arXiv 1805.02867): time goes by the tokens that there are. A single row of few is
    `_attend_alone`'s.

    Returns:
        Output `[T, N, H]` and log-sum-exp `[T, N]`, float32; arbitrary but finite for tokens of no row.
    """
    (T, N, H), (B, W) = q.shape, rows.page_table.shape
    if B == 1 and T <= ALONE_QUERIES and W <= blocks.decode_pages:
        before_last = rows.query_start[1] - 1 - jnp.arange(T)
        lengths = jnp.clip(rows.kv_length - before_last, 1, rows.kv_length)
        return _attend_alone(q, layer, rows.page_table[0], lengths, scale)
    K, _, _, page, _ = layer.kv.shape
    G, size, at_once = N // K, min(blocks.chunk_queries, max_query), max(1, blocks.chunk_keys // page)
    S = at_once * page
    table = jnp.pad(rows.page_table, ((0, 0), (0, -rows.page_table.shape[1] % at_once)))
    begins, stops = rows.query_start[:-1], rows.query_start[1:]
    counts = jnp.where(rows.kv_length > 0, -(-(stops - begins) // size), 0)
    ends = jnp.cumsum(counts)

    def item(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row = jnp.searchsorted(ends, i, side="right")
        index = begins[row] + (i - ends[row] + counts[row]) * size + jnp.arange(size)
        last = rows.kv_length[row] - 1
        position = jnp.minimum(last + 1 - stops[row] + index, last)
        queries = q.at[index].get(mode="clip").reshape(size, K, G, H).transpose(1, 0, 2, 3).reshape(K, size * G, H)

        def block(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, out = state
            pages = jax.lax.dynamic_slice_in_dim(table[row], j * at_once, at_once)
            key = j * S + jnp.arange(S)
            keys = _read_pages(layer, pages, KEY, q.dtype).reshape(K, S, H)
            scores = jnp.einsum("kth,ksh->kts", queries, keys, preferred_element_type=jnp.float32) * scale
            visible = jnp.repeat(key <= position[:, None], G, axis=0)
            scores = jnp.where(visible, scores, MASKED)
            highest = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - highest[..., None]), 0)
            shrink = jnp.exp(top - highest)
            # Pages are reused and never cleared: what lies past a row's end may be NaN, and 0 x NaN is NaN.
            values = _read_pages(layer, pages, VALUE, q.dtype).reshape(K, S, H)
            values = jnp.where((key <= last)[:, None], values, 0)
            new = jnp.einsum("kts,ksh->kth", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
            return highest, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + new

        blank = (jnp.full((K, size * G), MASKED), jnp.zeros((K, size * G)), jnp.zeros((K, size * G, H)))
        top, total, out = jax.lax.fori_loop(0, position[-1] // S + 1, block, blank)
        place = jnp.where(index < stops[row], index, T)
        flat = lambda x: x.reshape(K, size, G, -1).swapaxes(0, 1).reshape(size, N, -1)  # noqa: E731
        put = lambda all, new: all.at[place].set(new, mode="drop")  # noqa: E731
        return put(results[0], flat(out / total[..., None])), put(results[1], flat(top + jnp.log(total))[..., 0])

    return jax.lax.fori_loop(0, ends[-1], item, (jnp.zeros((T, N, H)), jnp.zeros((T, N))))


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: PagedLayer,
    rows: RaggedRows,
    *,
    scale: float,
    decode_rows: int,
    max_query: int,
    blocks: Blocks = CPU_BLOCKS,
    attend_decode: AttendDecode | None = None,
) -> PagedOutput:
    """Appends a ragged batch's keys and values to the paged cache and attends to it.

    The first `decode_rows` rows have one token each, row b at flat position b; the rows after them have up to
    `max_query` tokens each, back to back (chunks of prompts).

    Args:
        q: `[T, N, H]` queries of the flat batch.
        k: `[T, K, H]` new keys.
        v: `[T, K, H]` new values.
        layer: Cache of this layer; its heads may be wider than H.
        rows: Layout of the batch; B rows.
        scale: Factor on the scores.
        decode_rows: Static number of single-token rows.
        max_query: Static bound on the tokens of any other row; 0 where there are none.
        blocks: How much is computed at once.
        attend_decode: What computes the rows of one token; None: what is here.
    """
    wanted = q.shape[2]
    q, k, v = (widen(x, layer.kv.shape[4]) for x in (q, k, v))
    layer = _append(layer, k, v, rows.slots)
    table, length = rows.page_table, rows.kv_length
    parts: list[tuple[jax.Array, jax.Array]] = []
    if decode_rows:
        decode = attend_decode or partial(_attend_decode, blocks=blocks)
        parts.append(decode(q[:decode_rows], layer, table[:decode_rows], length[:decode_rows], scale))
    if max_query:
        chunks = RaggedRows(
            table[decode_rows:], length[decode_rows:], rows.query_start[decode_rows:] - decode_rows, rows.slots
        )
        parts.append(_attend_chunks(q[decode_rows:], layer, chunks, scale, max_query, blocks))
    out, lse = (jnp.concatenate(each) for each in zip(*parts, strict=True))
    return PagedOutput(out[..., :wanted].astype(q.dtype), lse, layer)
