"""Chunks of prompts as tiles for the paged kernel, and their results back as flat tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention.flash import LANES
from qwq_jax.kernels.attention.paged import Softmax, paged_kernel
from qwq_jax.kernels.attention.pages import PagedLayer, RaggedRows
from qwq_jax.kernels.attention.stream import PagedSizes, compiler_params, stream_scratch
from qwq_jax.kernels.attention.tiles import chunk_runs, cut_runs, make_tiles, merge_parts, page_rows


def attend_chunks(
    q: jax.Array,
    pool: PagedLayer,
    rows: RaggedRows,
    *,
    decode_rows: int,
    scale: float,
    sizes: PagedSizes,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the flat tokens from `decode_rows` on; their keys and values are in the pool already.

    Args:
        q: `[T, N, H]`.
        pool: The cache in units.
        rows: The batch.
        decode_rows: Rows of one token, left out.
        scale: Factor on the scores.
        sizes: Tiles.
        interpret: For `pl.pallas_call`.

    Returns:
        `[Tp, N, H]` and the log-sum-exps `[Tp, N]`.
    """
    (T, N, H), K = q.shape, pool.kv.shape[0]
    G, size, tokens = N // K, sizes.block_q, T - decode_rows
    begin, end, position = chunk_runs(rows, decode_rows)
    pieces = cut_runs(begin, end, position, tokens=tokens, size=size, aligned=False)
    n = pieces.row.shape[0]
    length = jnp.where(pieces.live, pieces.position + pieces.inside.sum(1, dtype=jnp.int32), 0)
    # One gather cuts out the tiles and puts the query heads of a kv head below each other.
    tile_q = q[decode_rows:][pieces.token].reshape(n, size, K, G, H).transpose(2, 0, 3, 1, 4).reshape(K, n, G * size, H)
    places = (decode_rows + pieces.row, pieces.position, length)
    out, lse = _attend_tiles(tile_q, pool, places, rows.page_table, scale=scale, sizes=sizes, interpret=interpret)
    place = jnp.where(pieces.inside, pieces.token, tokens)
    where = jnp.zeros(tokens + 1, jnp.int32).at[place].set(jnp.arange(n * size, dtype=jnp.int32).reshape(n, size))
    tile, within = where[:tokens] // size, where[:tokens] % size
    # The arrays of indices stand apart, so their dimension comes first: [Tp, K, G, H].
    out = out.reshape(K, n, G, size, H)[:, tile, :, within]
    lse = lse.reshape(K, n, G, size)[:, tile, :, within]
    return out.reshape(tokens, N, H), lse.reshape(tokens, N)


def _attend_tiles(
    q: jax.Array,
    pool: PagedLayer,
    places: tuple[jax.Array, jax.Array, jax.Array],
    table: jax.Array,
    *,
    scale: float,
    sizes: PagedSizes,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel on tiles `q [K, n, R, H]` at `places` (row, first, length of `Tiles`).

    Returns:
        `[K, n, R, H]` and log-sum-exp `[K, n, R]`.
    """
    (K, n, R, H), parts = q.shape, sizes.parts
    assert R % 8 == 0, "a tile has at least 8 query tokens"
    tiles = make_tiles(*places, block=sizes.block_kv, kv_heads=K, parts=parts)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    apart = lambda *shape: pl.BlockSpec((None, None, 1, *shape), lambda p, h, i, *_: (p, h, i, *[0] * len(shape)))  # noqa: E731
    pools = {name: x for name, x in pool._asdict().items() if x is not None}
    inputs = {"table": page_rows(table), "q": q, **pools}
    outputs = {"o": (q.dtype if parts == 1 else jnp.float32, (R, H)), "lse": (jnp.float32, (1, R))}
    states = {name: pltpu.VMEM((R, H if name == "acc" else LANES), jnp.float32) for name in Softmax._fields}
    scratch = stream_scratch(pool, sizes, inputs["table"].shape[-1]) | states
    out, lse = pl.pallas_call(
        functools.partial(
            paged_kernel, names=(*tiles._fields, *inputs, *outputs, *scratch), sizes=sizes, kv_heads=K, scale=scale
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tiles),
            grid=(parts, K, n),
            in_specs=[hbm, pl.BlockSpec((None, 1, R, H), lambda p, h, i, *_: (h, i, 0, 0)), *[hbm] * len(pools)],
            out_specs=[apart(*shape) for _, shape in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[jax.ShapeDtypeStruct((parts, K, n, *shape), dtype) for dtype, shape in outputs.values()],
        compiler_params=compiler_params("parallel", "arbitrary", "arbitrary"),
        interpret=interpret,
        name="paged_prefill",
    )(*tiles, *inputs.values())
    out, lse = merge_parts(out, lse[:, :, :, 0])
    return out.astype(q.dtype), lse
