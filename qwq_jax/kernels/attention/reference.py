"""Attention in plain jnp: the contract of every kernel beside it, and the path that a CPU takes.

Scores, softmax and the sums are float32 whatever the dtype of the inputs (only the weights that enter a product take
it): attention over 131,072 keys summed in bfloat16 loses the small probabilities that long reasoning lives on.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qwq_jax.kernels.attention.pages import KEY, VALUE, PagedLayer, PagedOutput, RaggedRows, append_to_pages, widen

# Finite, so that a row with no visible key gives 0 / 0 nowhere: such rows are zeroed instead.
MASKED = -1e30
# Pages of all rows that decoding reads at once: few enough to stay in a core's cache, many enough to be worth a turn.
DECODE_PAGES = 16


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    scale: float,
    block_q: int | None = None,
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
            visible &= segment_ids[:, start:stop, None] == segment_ids[:, None, :stop]
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


def _attend_rows(
    q: jax.Array, layer: PagedLayer, page_table: jax.Array, kv_length: jax.Array, first: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Rows of equal query count: q `[B, T, N, H]`, query t of row b at position `first[b] + t`.

    Returns:
        Output `[B, T, N, H]` and log-sum-exp `[B, T, N]`, float32.
    """
    B, T, N, H = q.shape
    K, _, _, page, _ = layer.kv.shape
    S = page_table.shape[1] * page
    gather = lambda which: _read_pages(layer, page_table, which, q.dtype).reshape(K, B, S, H)  # noqa: E731
    rows = q.reshape(B, T, K, N // K, H).transpose(2, 0, 1, 3, 4).reshape(K, B, T * (N // K), H)
    scores = jnp.einsum("kbth,kbsh->kbts", rows, gather(KEY), preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(K, B, T, N // K, S)
    key = jnp.arange(S)
    live = key[None] < kv_length[:, None]
    causal = key[None, None] <= first[:, None, None] + jnp.arange(T)[None, :, None]
    visible = (causal & live[:, None])[None, :, :, None]
    scores = jnp.where(visible, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).reshape(K, B, T * (N // K), S)
    # Pages are reused and never cleared: what lies past a row's end may be NaN, and 0 x NaN is NaN.
    values = jnp.where(live[None, :, :, None], gather(VALUE), 0)
    out = jnp.einsum("kbts,kbsh->kbth", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(scores, axis=-1).transpose(1, 2, 0, 3).reshape(B, T, N)
    return out.reshape(K, B, T, N // K, H).transpose(1, 2, 0, 3, 4).reshape(B, T, N, H), lse


def _attend_decode(
    q: jax.Array, layer: PagedLayer, page_table: jax.Array, kv_length: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Rows of one query each, q `[B, N, H]`, the last token of its row.

    The pages in use, of all rows, are one list, and a loop takes `DECODE_PAGES` of them at a time: time goes by tokens
    in the cache, not by the longest row, and what was read is still in the core's cache when it is used. Each page
    gives a maximum, a sum and a weighted value, which its row joins at the end (as in arXiv 1805.02867).

    Returns:
        Output `[B, N, H]` and log-sum-exp `[B, N]`, float32.
    """
    (B, N, H), W = q.shape, page_table.shape[1]
    K, _, _, page, _ = layer.kv.shape
    G, size = N // K, min(DECODE_PAGES, B * W)
    total = -(-B * W // size) * size
    counts = -(-kv_length // page)
    ends = jnp.cumsum(counts)
    starts, in_use = ends - counts, ends[-1]
    item = jnp.arange(total)
    row = jnp.minimum(jnp.searchsorted(ends, item, side="right"), B - 1)
    column = jnp.clip(item - starts[row], 0, W - 1)
    listed = page_table[row, column]
    tokens = jnp.where(item < in_use, kv_length[row] - column * page, 0)  # of the row, from this page on
    queries = q.reshape(B, K, G, H).transpose(1, 0, 2, 3)

    def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        begin, *parts = state
        pages, rows, left = (jax.lax.dynamic_slice(x, (begin,), (size,)) for x in (listed, row, tokens))
        live = (jnp.arange(page) < left[:, None])[None, :, :, None]
        keys = _read_pages(layer, pages, KEY, q.dtype)
        # The many keys on the left: XLA's product of few rows by a transposed matrix is the slower one.
        scores = jnp.einsum("kpsh,kpgh->kpsg", keys, queries[:, rows], preferred_element_type=jnp.float32) * scale
        scores = jnp.where(live, scores, MASKED)
        top = jnp.max(scores, axis=2)
        weights = jnp.exp(scores - top[:, :, None])
        # Pages are reused and never cleared: what lies past a row's end may be NaN, and 0 x NaN is NaN.
        values = jnp.where(live, _read_pages(layer, pages, VALUE, q.dtype), 0)
        out = jnp.einsum("kpsg,kpsh->kpgh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
        new = (top, jnp.sum(weights, axis=2), out)
        put = jax.lax.dynamic_update_slice_in_dim
        return begin + size, *(put(part, x, begin, axis=1) for part, x in zip(parts, new, strict=True))

    sizes = ((K, total, G), (K, total, G), (K, total, G, H))
    zeros = (jnp.zeros(shape, jnp.float32) for shape in sizes)
    _, top, sums, outs = jax.lax.while_loop(lambda state: state[0] < in_use, body, (jnp.int32(0), *zeros))
    mine = (jnp.arange(W) < counts[:, None])[None, :, :, None]
    at = jnp.minimum(starts[:, None] + jnp.arange(W), total - 1)
    top = jnp.where(mine, top[:, at], MASKED)  # [K, B, W, G]
    highest = jnp.max(top, axis=2)
    share = jnp.where(mine, jnp.exp(top - highest[:, :, None]), 0)
    normaliser = jnp.maximum(jnp.sum(share * sums[:, at], axis=2), jnp.finfo(jnp.float32).tiny)
    out = jnp.sum(share[..., None] * outs[:, at], axis=2) / normaliser[..., None]
    lse = highest + jnp.log(normaliser)
    return out.transpose(1, 0, 2, 3).reshape(B, N, H), lse.transpose(1, 0, 2).reshape(B, N)


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
    """
    T, N, wanted = q.shape
    q, k, v = (widen(x, layer.kv.shape[4]) for x in (q, k, v))
    layer = _append(layer, k, v, rows.slots)
    table, length = rows.page_table, rows.kv_length
    if decode_rows:
        out, lse = _attend_decode(q[:decode_rows], layer, table[:decode_rows], length[:decode_rows], scale)
    else:
        out, lse = jnp.zeros((0, *q.shape[1:]), jnp.float32), jnp.zeros((0, N), jnp.float32)
    if max_query == 0:
        return PagedOutput(out[..., :wanted].astype(q.dtype), lse, layer)
    fill = T - decode_rows
    out, lse = jnp.pad(out, ((0, fill), (0, 0), (0, 0))), jnp.pad(lse, ((0, fill), (0, 0)))
    start, stop = rows.query_start[decode_rows:-1], rows.query_start[decode_rows + 1 :]

    def one(carry: tuple[jax.Array, jax.Array], row: tuple[jax.Array, ...]) -> tuple[Any, None]:
        table_row, length_row, begin, end = row

        def work(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            index = begin + jnp.arange(max_query)
            chunk = q.at[index].get(mode="fill", fill_value=0)
            first = (length_row - (end - begin))[None]
            new = _attend_rows(chunk[None], layer, table_row[None], length_row[None], first, scale)
            place = jnp.where(index < end, index, T)
            out, lse = (x.at[place].set(y[0], mode="drop") for x, y in zip(carry, new, strict=True))
            return out, lse

        return jax.lax.cond(length_row > 0, work, lambda carry: carry, carry), None

    (out, lse), _ = jax.lax.scan(one, (out, lse), (table[decode_rows:], length[decode_rows:], start, stop))
    return PagedOutput(out[..., :wanted].astype(q.dtype), lse, layer)
