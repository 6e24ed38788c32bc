"""A ragged batch on the paged TPU kernels: decoded tokens in one call, chunks of prompts appended, then in another."""

from typing import Any

import jax
import jax.numpy as jnp

from qwq_jax.kernels.attention.append import append_chunks
from qwq_jax.kernels.attention.decode_call import New, attend_decode
from qwq_jax.kernels.attention.pages import PagedLayer, PagedOutput, unit_tokens, widen
from qwq_jax.kernels.attention.prefill_call import attend_chunks
from qwq_jax.kernels.attention.work import RaggedWork


def ragged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: PagedLayer,
    work: RaggedWork,
    *,
    scale: float,
    interpret: Any = False,
) -> PagedOutput:
    """As `reference.paged_attention`.

    Args:
        q: `[T, N, H]`.
        k: `[T, K, H]`.
        v: `[T, K, H]`.
        layer: The cache; heads a multiple of 128 wide.
        work: From `find_work` of the batch, for such a layer.
        scale: Factor on the scores.
        interpret: For `pl.pallas_call`.
    """
    wanted, H = q.shape[2], layer.kv.shape[4]
    q, k, v = (widen(x, H) for x in (q, k, v))
    N, K = q.shape[1], k.shape[1]
    pool, outs, lses, decoded = _unit_view(layer), [], [], 0
    if work.decode is not None:
        decoded = work.decode.page.shape[0]
        new = New.make(k[:decoded], v[:decoded], work.decode.page, layer.kv.dtype)
        out, lse, pool = attend_decode(
            q[:decoded].reshape(decoded, K, N // K, H).swapaxes(0, 1),
            new,
            pool,
            work.decode.tiles,
            work.table,
            scale=scale,
            sizes=work.decode_sizes,
            interpret=interpret,
        )
        outs.append(out.swapaxes(0, 1).reshape(decoded, N, H))
        lses.append(lse.swapaxes(0, 1).reshape(decoded, N))
    if work.chunks is not None:
        q, k, v = (x[decoded:] for x in (q, k, v))
        pool = append_chunks(k, v, pool, work.chunks.append, interpret)
        out, lse = attend_chunks(
            q, pool, work.chunks, work.table, scale=scale, sizes=work.chunk_sizes, interpret=interpret
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
