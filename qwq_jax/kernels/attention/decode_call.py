"""Rows that decode one token each on the decode kernel: what it takes, and its sums made into results."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention.decode import FLOAT8_MAX, decode_kernel, two_terms
from qwq_jax.kernels.attention.flash import LANES, START
from qwq_jax.kernels.attention.pages import PagedLayer, to_cache
from qwq_jax.kernels.attention.stream import PagedSizes, compiler_params, stream_scratch
from qwq_jax.kernels.attention.tiles import Tiles, merge_parts


class New(NamedTuple):
    """Decoded tokens on their way into the cache.

    Attributes:
        page: `[n]` int32, the page of each.
        words: `[K, n, 2, H]` int32, each element repeated in every part of a word.
        scales: `[K, n, 2, 128]` float32, each scale in every lane, or None.
    """

    page: jax.Array
    words: jax.Array
    scales: jax.Array | None

    @staticmethod
    def make(k: jax.Array, v: jax.Array, page: jax.Array, dtype: Any) -> "New":
        """From k and v `[n, K, H]`."""
        values, scales = to_cache(jnp.stack([k, v], axis=2).swapaxes(0, 1), dtype)
        bits = 8 * values.dtype.itemsize
        unsigned = jax.lax.bitcast_convert_type(values, f"uint{bits}").astype(jnp.uint32)
        words = unsigned * jnp.uint32(sum(1 << shift for shift in range(0, 32, bits)))
        if scales is not None:
            scales = jnp.broadcast_to(scales[..., None], (*scales.shape, LANES))
        return New(page, jax.lax.bitcast_convert_type(words, jnp.int32), scales)


def _query_terms(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries `[K, n, R, H]` as two float8 terms `[K, n, 32, H]`, and the factor of each row in `[K, n, R, 128]`."""
    wide = q.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1, keepdims=True), 1e-30)
    terms = jax.vmap(jax.vmap(two_terms))(wide * (FLOAT8_MAX / largest))
    return terms, jnp.broadcast_to(largest / FLOAT8_MAX, (*q.shape[:3], LANES))


def attend_decode(
    q: jax.Array,
    new: New,
    pool: PagedLayer,
    tiles: Tiles,
    table: jax.Array,
    *,
    scale: float,
    sizes: PagedSizes,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, PagedLayer]:
    """Attention of one token a row, which is appended.

    Args:
        q: `[K, n, G, H]`.
        new: The tokens' keys and values.
        pool: The cache in units.
        tiles: One a row, whose length counts the new token.
        table: See `RaggedWork`.
        scale: Factor on the scores.
        sizes: Tiles.
        interpret: For `pl.pallas_call`.

    Returns:
        `[K, n, G, H]`, log-sum-exp `[K, n, G]`, and the pool.
    """
    K, _, G, _ = q.shape
    R = G + -G % 8
    queries = {"q": jnp.pad(q, ((0, 0), (0, 0), (0, R - G), (0, 0)))}
    if sizes.float8:
        queries["q"], queries["q_scale"] = _query_terms(queries["q"])
    sums, pool = _call(tiles, queries, new, pool, table, scale=scale, sizes=sizes, interpret=interpret)
    acc, m, total = (x[:, :, :, :G] for x in sums)
    # A part leaves the rows that it has no block of as they were in memory.
    head = jnp.arange(K)[None, :, None] * tiles.start[-1]
    begin, end = (tiles.bounds[edge][:, None, None] - head for edge in (slice(0, -1), slice(1, None)))
    touched = ((tiles.start[:-1] < end) & (tiles.start[1:] > begin) & (tiles.length > 0))[..., None]
    total = jnp.where(touched, jnp.sum(total, axis=-1), 1.0)
    lse = jnp.where(touched, m[..., 0] * scale + jnp.log(total), START)
    out = jnp.where(touched[..., None], acc / total[..., None], 0.0)
    out, lse = merge_parts(out, lse)
    return out.astype(q.dtype), lse, pool


def _call(
    tiles: Tiles,
    queries: dict[str, jax.Array],
    new: New,
    pool: PagedLayer,
    table: jax.Array,
    *,
    scale: float,
    sizes: PagedSizes,
    interpret: Any,
) -> tuple[tuple[jax.Array, ...], PagedLayer]:
    """The Pallas call: sums of values, maxima and sums of weights, `[parts, K, n, R, ...]` float32, and the pool."""
    (K, n, _, H), parts, unit = queries["q"].shape, sizes.parts, pool.kv.shape[4]
    R = queries.get("q_scale", queries["q"]).shape[2]
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    whole = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda p, h, *_: (h, *[0] * (x.ndim - 1)))  # noqa: E731
    pools = {name: x for name, x in pool._asdict().items() if x is not None}
    scalars = tiles._asdict() | {"page": new.page}
    blocks = queries | {"new": new.words} | ({} if new.scales is None else {"new_scales": new.scales})
    inputs = {"table": table, **{f"{name}_before": x for name, x in pools.items()}, **blocks}
    sums = {"acc": H, "m": LANES, "total": LANES}
    scratch = stream_scratch(pool, sizes, table.shape[-1]) | {
        "held": pltpu.VMEM((2, R, sizes.block_kv), jnp.float32),
        "stage": pltpu.VMEM((2, 2, 1, unit, H), pool.kv.dtype),
        "write_sem": pltpu.SemaphoreType.DMA((2,)),
    }
    if pool.scales is not None:
        scratch["scale_stage"] = pltpu.VMEM((2, 1, 2, unit), jnp.float32)
    acc, m, total, *after = pl.pallas_call(
        functools.partial(
            decode_kernel,
            names=(*scalars, *inputs, *sums, *pools, *scratch),
            sizes=sizes,
            kv_heads=K,
            scale=scale,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(parts, K),
            in_specs=[*[hbm] * (1 + len(pools)), *map(whole, blocks.values())],
            out_specs=[
                *(pl.BlockSpec((None, None, n, R, width), lambda p, h, *_: (p, h, 0, 0, 0)) for width in sums.values()),
                *[hbm] * len(pools),
            ],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[
            *(jax.ShapeDtypeStruct((parts, K, n, R, width), jnp.float32) for width in sums.values()),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pools.values()),
        ],
        input_output_aliases={len(scalars) + 1 + i: len(sums) + i for i in range(len(pools))},
        compiler_params=compiler_params("parallel", "arbitrary"),
        interpret=interpret,
        name="paged_decode",
    )(*scalars.values(), *inputs.values())
    return (acc, m, total), PagedLayer(*after)
