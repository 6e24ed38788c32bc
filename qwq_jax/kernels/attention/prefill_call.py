"""Chunks of prompts as tiles for the paged kernel, and their results back as flat tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention.flash import LANES
from qwq_jax.kernels.attention.paged import Softmax, paged_kernel
from qwq_jax.kernels.attention.pages import PagedLayer
from qwq_jax.kernels.attention.stream import PagedSizes, compiler_params, stream_scratch
from qwq_jax.kernels.attention.tiles import Tiles, merge_parts
from qwq_jax.kernels.attention.work import ChunkWork


def attend_chunks(
    q: jax.Array,
    pool: PagedLayer,
    work: ChunkWork,
    table: jax.Array,
    *,
    scale: float,
    sizes: PagedSizes,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention of chunks of prompts, whose keys and values are in the pool already.

    Args:
        q: `[Tp, N, H]`.
        pool: The cache in units.
        work: Where the tokens are.
        table: See `RaggedWork`.
        scale: Factor on the scores.
        sizes: Tiles.
        interpret: For `pl.pallas_call`.

    Returns:
        `[Tp, N, H]` and the log-sum-exps `[Tp, N]`.
    """
    (tokens, N, H), K, (n, size) = q.shape, pool.kv.shape[0], work.token.shape
    G = N // K
    # One gather cuts out the tiles and puts the query heads of a kv head below each other.
    tile_q = q[work.token].reshape(n, size, K, G, H).transpose(2, 0, 3, 1, 4).reshape(K, n, G * size, H)
    out, lse = _attend_tiles(tile_q, pool, work.tiles, table, scale=scale, sizes=sizes, interpret=interpret)
    # The arrays of indices stand apart, so their dimension comes first: [Tp, K, G, H].
    out = out.reshape(K, n, G, size, H)[:, work.tile, :, work.place]
    lse = lse.reshape(K, n, G, size)[:, work.tile, :, work.place]
    return out.reshape(tokens, N, H), lse.reshape(tokens, N)


def _attend_tiles(
    q: jax.Array,
    pool: PagedLayer,
    tiles: Tiles,
    table: jax.Array,
    *,
    scale: float,
    sizes: PagedSizes,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel on tiles `q [K, n, R, H]`.

    Returns:
        `[K, n, R, H]` and log-sum-exp `[K, n, R]`.
    """
    (K, n, R, H), parts = q.shape, sizes.parts
    assert R % 8 == 0, "a tile has at least 8 query tokens"
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    apart = lambda *shape: pl.BlockSpec((None, None, 1, *shape), lambda p, h, i, *_: (p, h, i, *[0] * len(shape)))  # noqa: E731
    pools = {name: x for name, x in pool._asdict().items() if x is not None}
    inputs = {"table": table, "q": q, **pools}
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
