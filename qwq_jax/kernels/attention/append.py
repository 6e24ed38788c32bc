"""Puts chunks of prompts into the pages of a TPU's cache: read a unit where it is only partly new, merge, write."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention.pages import PagedLayer, to_cache
from qwq_jax.kernels.attention.words import as_words, merge_rows
from qwq_jax.kernels.attention.work import PIECES, AppendWork


def append_chunks(k: jax.Array, v: jax.Array, pool: PagedLayer, work: AppendWork, interpret: Any) -> PagedLayer:
    """Writes the keys and values `[Tp, K, H]` of chunks into their pages, a unit at a time."""
    token, *scalars = work
    values, scales = to_cache(jnp.stack([k, v], axis=2), pool.kv.dtype)  # [Tp, K, 2, H]
    new = [values[token].transpose(2, 0, 3, 1, 4)]  # [K, n, 2, unit, H]
    if scales is not None:
        new.append(scales[token].transpose(2, 0, 3, 1))  # [K, n, 2, unit]
    pools = [x for x in pool if x is not None]
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    stages = [pltpu.VMEM((PIECES, *x.shape[2:]), x.dtype) for x in new]
    after = pl.pallas_call(
        functools.partial(_append_kernel, arrays=len(new)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(k.shape[1], token.shape[0] // PIECES),
            in_specs=[
                pl.BlockSpec((None, PIECES, *x.shape[2:]), lambda h, i, *_, d=x.ndim - 2: (h, i, *[0] * d)) for x in new
            ]
            + [hbm] * len(pools),
            out_specs=[hbm] * len(pools),
            scratch_shapes=[*stages, pltpu.SemaphoreType.DMA((PIECES,))],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pools],
        input_output_aliases={len(scalars) + len(new) + i: i for i in range(len(pools))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="append_chunks",
    )(*scalars, *new, *pools)
    return PagedLayer(*after)


def _append_kernel(page_ref, unit_ref, low_ref, high_ref, *refs, arrays: int):  # noqa: ANN001, ANN002, ANN202
    new, pools, stages, sem = refs[:arrays], refs[2 * arrays : 3 * arrays], refs[3 * arrays : -1], refs[-1]
    head, first = pl.program_id(0), pl.program_id(1) * PIECES

    def copies(i: int, out: bool) -> list[Any]:
        page, unit = page_ref[first + i], unit_ref[first + i]
        # Scales have their runs before keys and values, the pool after.
        places = [pools[0].at[head, page, :, unit], *(pool.at[head, page, unit] for pool in pools[1:])]
        ends = [(stage.at[i], place) for stage, place in zip(stages, places, strict=True)]
        ends = ends if out else [(place, stage) for stage, place in ends]
        return [pltpu.make_async_copy(source, target, sem.at[i]) for source, target in ends]

    def each(act: Any) -> None:
        for i in range(PIECES):
            low, high = low_ref[first + i], high_ref[first + i]
            pl.when(high > low)(functools.partial(act, i, low, high))

    def fetch(i: int, low: jax.Array, high: jax.Array) -> None:
        for copy in copies(i, out=False):
            copy.start()

    def put(i: int, low: jax.Array, high: jax.Array) -> None:
        for copy in copies(i, out=False):
            copy.wait()
        for which in range(2):
            stages[0][i, which] = merge_rows(stages[0][i, which], as_words(new[0][i, which]), low, high)
        if arrays > 1:
            lane = jax.lax.broadcasted_iota(jnp.int32, stages[1].shape[1:], 1)
            stages[1][i] = jnp.where((lane >= low) & (lane < high), new[1][i], stages[1][i])
        for copy in copies(i, out=True):
            copy.start()

    def finish(i: int, low: jax.Array, high: jax.Array) -> None:
        for copy in copies(i, out=True):
            copy.wait()

    each(fetch)
    each(put)
    each(finish)
