"""Ragged batches over a paged cache, and what attention gives for them in float64."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from qwq_jax.kernels.attention import PagedLayer, RaggedRows, is_quantized, scales_shape, token_slots
from qwq_jax.kernels.attention.pages import to_cache


def brute_force(q, k, v, visible, scale=None):
    """q [T,N,H], k and v [S,K,H], visible [T,S] bool: output [T,N,H] and log-sum-exp [T,N] in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    G = q.shape[1] // k.shape[1]
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:2])
    for n in range(q.shape[1]):
        scores = q[:, n] @ k[:, n // G].T * (scale or q.shape[2] ** -0.5)
        top = scores.max(initial=-1e9, axis=1, keepdims=True)
        weights = np.where(visible, np.exp(scores - top), 0)
        out[:, n] = weights / weights.sum(1, keepdims=True) @ v[:, n // G]
        lse[:, n] = np.log(weights.sum(1)) + top[:, 0]
    return out, lse


@dataclass(frozen=True)
class Batch:
    """What a paged attention takes, and for each row that has tokens its first one, its output and log-sum-exp."""

    q: jnp.ndarray
    k: jnp.ndarray
    v: jnp.ndarray
    layer: PagedLayer
    rows: RaggedRows
    decode_rows: int
    max_query: int
    expected: list[tuple[int, np.ndarray, np.ndarray]]

    @property
    def owned(self) -> set[int]:
        """Slots of the pool that this step's tokens go to."""
        pool = self.layer.kv.shape[1] * self.layer.kv.shape[3]
        return {int(slot) for slot in self.rows.slots if slot < pool}


def make_batch(rng, decode, chunks, *, heads, page, H=16, max_query=24, dtype="float32", width=None, gap=0):
    """Rows as (length before, new tokens), decode rows as (length before, live).

    NaN stands in every page that no row owns, past every row's end, and in their scales; the table names a page of NaN
    where it names none. The values are those that the cache's dtype can hold, so any error is the attention's own.

    Args:
        rng: Of all numbers.
        decode: Rows of one token.
        chunks: Rows of up to `max_query` tokens.
        heads: N and K.
        page: Tokens a page.
        H: Width of a head.
        max_query: Bound on a chunk.
        dtype: Of the cache.
        width: Pages of the table; the pool then holds `width * rows` pages, whatever the rows.
        gap: Flat tokens between the chunks that belong to none.
    """
    N, K = heads
    rows = [(before, 1) if live else (0, 0) for before, live in decode] + list(chunks)
    lengths = [before + new for before, new in rows]
    widths = [-(-length // page) for length in lengths]
    W = width or max(1, *widths)
    P = (width * len(rows) if width else sum(widths)) + 3
    free = list(rng.permutation(P - 1))
    table = np.full((len(rows), W), P - 1, np.int32)
    kv = np.full((K, P, 2, page, H), np.nan, np.float32)
    Bd, flat_size = len(decode), len(decode) + (max_query + gap) * len(chunks)
    q = rng.standard_normal((flat_size, N, H)).astype(np.float32)
    new_kv = rng.standard_normal((2, flat_size, K, H)).astype(np.float32) * rng.uniform(0.5, 2, (2, flat_size, K, 1))
    new_kv = held(new_kv.astype(np.float32), dtype)
    start, positions, expected, at = [], np.zeros(flat_size, np.int32), [], Bd
    for b, (before, new) in enumerate(rows):
        table[b, : widths[b]] = [free.pop() for _ in range(widths[b])]
        begin = b if b < Bd else at
        start.append(begin)
        at = max(at, begin + new) if b >= Bd else at
        positions[begin : begin + new] = np.arange(before, before + new)
        old = held(rng.standard_normal((2, before, K, H)).astype(np.float32), dtype)
        s = np.arange(before)
        kv[:, table[b, s // page], :, s % page] = old.transpose(1, 2, 0, 3)
        if new:
            full = [np.concatenate([o, x[begin : begin + new]]) for o, x in zip(old, new_kv, strict=True)]
            visible = np.arange(before + new)[None] <= np.arange(before, before + new)[:, None]
            expected.append((begin, *brute_force(q[begin : begin + new], *full, visible)))
    table, lengths, start, positions = (jnp.asarray(x, jnp.int32) for x in (table, lengths, [*start, at], positions))
    slots = token_slots(table, lengths, start, positions, page_size=page, pages=P)
    k, v = (jnp.asarray(x) for x in new_kv)
    batch_rows = RaggedRows(table, lengths, start, slots)
    return Batch(jnp.asarray(q), k, v, layer_of(kv, dtype), batch_rows, Bd, max_query if chunks else 0, expected)


def held(x, dtype):
    """The values that a cache of this dtype holds when given these."""
    values, scales = to_cache(jnp.asarray(x), dtype)
    values = values.astype(jnp.float32)
    return np.asarray(values if scales is None else values * scales[..., None])


def layer_of(kv, dtype):
    """The cache with these keys and values; the scales of what is NaN are NaN too."""
    empty = np.isnan(kv).any(-1)
    values, scales = to_cache(jnp.asarray(np.where(empty[..., None], 0 if is_quantized(dtype) else np.nan, kv)), dtype)
    if scales is None:
        return PagedLayer(values)
    K, P, _, page = empty.shape
    _, _, runs, _, run = scales_shape((*kv.shape,))
    scales = jnp.where(empty, jnp.nan, scales).reshape(K, P, 2, runs, run).swapaxes(2, 3)
    return PagedLayer(values, scales)


def check(batch, result, tolerance):
    """Outputs, log-sum-exps, and a cache in which nothing but the new tokens' places has changed."""
    for begin, out, lse in batch.expected:
        rows = slice(begin, begin + len(out))
        np.testing.assert_allclose(np.asarray(result.out, np.float32)[rows], out, atol=tolerance)
        np.testing.assert_allclose(np.asarray(result.lse)[rows], lse, atol=10 * tolerance)
    assert len(batch.owned) == sum(len(out) for _, out, _ in batch.expected)
    slots = np.asarray(batch.rows.slots)
    pool = batch.layer.kv.shape[1] * batch.layer.kv.shape[3]
    tokens = np.flatnonzero(slots < pool)
    changed = np.isin(np.arange(pool), slots[tokens])
    values, scales = to_cache(jnp.stack([batch.k, batch.v], axis=2), batch.layer.kv.dtype)
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))  # noqa: E731
    for by_slot, before, after, new in (
        (values_by_slot, batch.layer.kv, result.layer.kv, values),
        (scales_by_slot, batch.layer.scales, result.layer.scales, scales),
    ):
        if before is not None:
            before, after = by_slot(before), by_slot(after)
            same(before[~changed], after[~changed])
            same(after[slots[tokens]], np.ascontiguousarray(np.asarray(new)[tokens]))


def values_by_slot(kv):
    """`[K, P, 2, page, H]` as `[P * page, K, 2, H]`."""
    x = np.asarray(kv).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(x.reshape(-1, *x.shape[2:]))


def scales_by_slot(scales):
    """`[K, P, runs, 2, run]` as `[P * page, K, 2]`."""
    x = np.asarray(scales).transpose(1, 2, 4, 0, 3)
    return np.ascontiguousarray(x.reshape(-1, *x.shape[3:]))
