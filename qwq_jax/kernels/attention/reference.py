"""Attention in plain jnp: the contract of every kernel beside it, and the path that a CPU takes.

Scores, softmax and the weighted sum are float32 whatever the dtype of the inputs: attention over 131,072 keys in
bfloat16 loses the small probabilities that long reasoning lives on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row with no visible key gives 0 / 0 nowhere: such rows are zeroed instead.
MASKED = -1e30


class PagedLayer(NamedTuple):
    """The cache of one layer.

    Attributes:
        k: `[K, P, page, H]` keys, rotated.
        v: `[K, P, page, H]` values.
    """

    k: jax.Array
    v: jax.Array


class RaggedRows(NamedTuple):
    """Which tokens of a flat batch belong to which row, and where each row's cache lies.

    Attributes:
        page_table: `[B, W]` int32, page ids of each row in order; entries past a row's length may be anything.
        kv_length: `[B]` int32, tokens of the row in the cache once this step's tokens are in; 0 marks an empty row.
        query_start: `[B+1]` int32, first flat token of each row; the tokens of row b are its last ones.
        slots: `[T]` int32 from `token_slots`.
    """

    page_table: jax.Array
    kv_length: jax.Array
    query_start: jax.Array
    slots: jax.Array


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    scale: float,
    block_q: int | None = None,
) -> jax.Array:
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
        `[B, T, N, H]` in the dtype of q.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    size_q = block_q or max(64, -(-T // 32))
    q = q.reshape(B, T, K, N // K, H)

    def block(start: int, size: int) -> jax.Array:
        stop = start + size  # keys after the block's last query are above the diagonal: never read
        scores = jnp.einsum("btkgh,bskh->bkgts", q[:, start:stop], k[:, :stop], preferred_element_type=jnp.float32)
        visible = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        visible = visible[None]
        if segment_ids is not None:
            visible &= segment_ids[:, start:stop, None] == segment_ids[:, None, :stop]
        weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores * scale, MASKED), axis=-1)
        return jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v[:, :stop], preferred_element_type=jnp.float32)

    blocks = [block(start, min(size_q, T - start)) for start in range(0, T, size_q)]
    return jnp.concatenate(blocks, axis=1).reshape(B, T, N, H).astype(q.dtype)


def token_slots(
    page_table: jax.Array,
    kv_length: jax.Array,
    query_start: jax.Array,
    positions: jax.Array,
    *,
    page_size: int,
    pages: int,
) -> jax.Array:
    """Flat cache slot `page * page_size + offset` of every token of a flat batch.

    Args:
        page_table: `[B, W]` int32.
        kv_length: `[B]` int32; tokens of rows of length 0 get no slot.
        query_start: `[B+1]` int32.
        positions: `[T]` int32, position of each token in its row.
        page_size: Tokens a page.
        pages: Pages of the pool.

    Returns:
        `[T]` int32; tokens that belong to no row get `pages * page_size`, which lies outside the pool.
    """
    flat = jnp.arange(positions.shape[0])
    row = jnp.clip(jnp.searchsorted(query_start, flat, side="right") - 1, 0, kv_length.shape[0] - 1)
    page = jnp.take_along_axis(page_table[row], (positions // page_size)[:, None], axis=1, mode="clip")[:, 0]
    held = (flat < query_start[-1]) & (positions < kv_length[row])
    return jnp.where(held, page * page_size + positions % page_size, pages * page_size).astype(jnp.int32)


def append_to_pages(pages: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """Writes `new [T, K, H]` into `pages [K, P, page, H]` at `slots [T]`; slots outside the pool are dropped."""
    K, P, page, H = pages.shape
    flat = pages.reshape(K, P * page, H)
    flat = flat.at[:, slots].set(new.swapaxes(0, 1).astype(pages.dtype), mode="drop")
    return flat.reshape(K, P, page, H)


def _attend_rows(
    q: jax.Array, layer: PagedLayer, page_table: jax.Array, kv_length: jax.Array, first: jax.Array, scale: float
) -> jax.Array:
    """Rows of equal query count: q `[B, T, N, H]`, query t of row b at position `first[b] + t`. Returns float32."""
    B, T, N, H = q.shape
    K, _, page, _ = layer.k.shape
    S = page_table.shape[1] * page
    gather = lambda pool: pool.at[:, page_table].get(mode="clip").reshape(K, B, S, H)  # noqa: E731
    rows = q.reshape(B, T, K, N // K, H).transpose(2, 0, 1, 3, 4).reshape(K, B, T * (N // K), H)
    scores = jnp.einsum("kbth,kbsh->kbts", rows, gather(layer.k), preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(K, B, T, N // K, S)
    key = jnp.arange(S)
    live = key[None] < kv_length[:, None]
    causal = key[None, None] <= first[:, None, None] + jnp.arange(T)[None, :, None]
    visible = (causal & live[:, None])[None, :, :, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1).reshape(K, B, T * (N // K), S)
    # Pages are reused and never cleared: what lies past a row's end may be NaN, and 0 x NaN is NaN.
    values = jnp.where(live[None, :, :, None], gather(layer.v), 0)
    out = jnp.einsum("kbts,kbsh->kbth", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return out.reshape(K, B, T, N // K, H).transpose(1, 2, 0, 3, 4).reshape(B, T, N, H)


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
) -> tuple[jax.Array, PagedLayer]:
    """Appends a ragged batch's keys and values to the paged cache and attends to it.

    The first `decode_rows` rows have one token each, row b at flat position b; the rows after them have up to
    `max_query` tokens each, back to back (chunks of prompts).

    Args:
        q: `[T, N, H]` queries of the flat batch.
        k: `[T, K, H]` new keys.
        v: `[T, K, H]` new values.
        layer: Cache of this layer.
        rows: Layout of the batch; B rows.
        scale: Factor on the scores.
        decode_rows: Static number of single-token rows.
        max_query: Static bound on the tokens of any other row; 0 where there are none.

    Returns:
        `[T, N, H]` in the dtype of q (zero or arbitrary but finite where a token belongs to no row), and the cache.
    """
    T = q.shape[0]
    layer = PagedLayer(append_to_pages(layer.k, k, rows.slots), append_to_pages(layer.v, v, rows.slots))
    table, length = rows.page_table, rows.kv_length
    out = _attend_rows(
        q[:decode_rows, None], layer, table[:decode_rows], length[:decode_rows], length[:decode_rows] - 1, scale
    )[:, 0]
    if max_query == 0:
        return out.astype(q.dtype), layer
    out = jnp.concatenate([out, jnp.zeros((T - decode_rows, *out.shape[1:]), out.dtype)])
    start, stop = rows.query_start[decode_rows:-1], rows.query_start[decode_rows + 1 :]

    def one(carry: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        table_row, length_row, begin, end = row

        def work(out: jax.Array) -> jax.Array:
            index = begin + jnp.arange(max_query)
            chunk = q.at[index].get(mode="fill", fill_value=0)
            attended = _attend_rows(
                chunk[None], layer, table_row[None], length_row[None], (length_row - (end - begin))[None], scale
            )[0]
            return out.at[jnp.where(index < end, index, T)].set(attended, mode="drop")

        return jax.lax.cond(length_row > 0, work, lambda out: out, carry), None

    out, _ = jax.lax.scan(one, out, (table[decode_rows:], length[decode_rows:], start, stop))
    return out.astype(q.dtype), layer
