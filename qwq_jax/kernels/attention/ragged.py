"""A ragged batch on the paged TPU kernels: decoded tokens in one call, chunks of prompts appended, then in another."""

from typing import Any

import jax
import jax.numpy as jnp

from qwq_jax.kernels.attention.append import append_chunks
from qwq_jax.kernels.attention.decode_call import New, attend_decode
from qwq_jax.kernels.attention.flash import LANES
from qwq_jax.kernels.attention.pages import PagedLayer, PagedOutput, RaggedRows, check_page, unit_tokens, widen
from qwq_jax.kernels.attention.prefill_call import attend_chunks
from qwq_jax.kernels.attention.stream import PagedSizes


def check_pages(layer: PagedLayer, sizes: PagedSizes) -> None:
    """Raises ValueError, with what would work, if the kernels cannot serve this pool."""
    *_, page, H = layer.kv.shape
    check_page(page, layer.kv.dtype)
    if H % LANES:
        raise ValueError(f"the paged TPU kernel needs a cache with heads a multiple of {LANES} wide, not {H}")
    if sizes.block_kv % page or sizes.block_kv % LANES:
        raise ValueError(f"blocks of {sizes.block_kv} are no multiple of {LANES} and of pages of {page} tokens")


def ragged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: PagedLayer,
    rows: RaggedRows,
    *,
    scale: float,
    decode_rows: int,
    max_query: int,
    decode: PagedSizes,
    prefill: PagedSizes,
    interpret: Any = False,
) -> PagedOutput:
    """As `reference.paged_attention`.

    Args:
        q: `[T, N, H]`.
        k: `[T, K, H]`.
        v: `[T, K, H]`.
        layer: The cache; heads a multiple of 128 wide.
        rows: The batch.
        scale: Factor on the scores.
        decode_rows: Rows of one token each.
        max_query: 0 where there are no other rows.
        decode: Tiles for those rows.
        prefill: Tiles for the others.
        interpret: For `pl.pallas_call`.

    Raises:
        ValueError: The kernels cannot serve such pages.
    """
    wanted, H = q.shape[2], layer.kv.shape[4]
    q, k, v = (widen(x, H) for x in (q, k, v))
    N, K = q.shape[1], k.shape[1]
    check_pages(layer, decode)
    check_pages(layer, prefill)
    pool, outs, lses = _unit_view(layer), [], []
    if decode_rows:
        first = slice(0, decode_rows)
        new = New.make(k[first], v[first], rows.slots[first] // layer.kv.shape[3], layer.kv.dtype)
        out, lse, pool = attend_decode(
            q[first].reshape(decode_rows, K, N // K, H).swapaxes(0, 1),
            new,
            pool,
            rows.kv_length[first],
            rows.page_table[first],
            scale=scale,
            sizes=decode,
            interpret=interpret,
        )
        outs.append(out.swapaxes(0, 1).reshape(decode_rows, N, H))
        lses.append(lse.swapaxes(0, 1).reshape(decode_rows, N))
    if max_query:
        pool = append_chunks(k, v, pool, rows, decode_rows, interpret)
        out, lse = attend_chunks(
            q, pool, rows, decode_rows=decode_rows, scale=scale, sizes=prefill, interpret=interpret
        )
        outs.append(out)
        lses.append(lse)
    layer = pool._replace(kv=pool.kv.reshape(layer.kv.shape))
    return PagedOutput(jnp.concatenate(outs)[..., :wanted], jnp.concatenate(lses), layer)


def _unit_view(layer: PagedLayer) -> PagedLayer:
    """The pools with each page cut into units; no byte moves."""
    *outer, page, H = layer.kv.shape
    unit = unit_tokens(layer.kv.dtype)
    return layer._replace(kv=layer.kv.reshape(*outer, page // unit, unit, H))
