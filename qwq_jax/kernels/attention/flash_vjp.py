"""Causal attention on TPU, backward: all three gradients in one pass over the visible block pairs.

Key blocks stay in place with their gradients; query blocks pass by. Probabilities are computed once, transposed
(`[keys, queries]`), so that dK and dV are plain products and only dQ contracts over rows (equations of FlashAttention,
arXiv 2205.14135, appendix B.2). The gradient of a passing query block lives in HBM: it is fetched while the block's
products are computed, added to, and written back while the next ones are. Nothing grows with the square of the length.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention.flash import (
    DIAGONAL_PARTS,
    LANES,
    LOG2_E,
    Sizes,
    contract,
    dot,
    exponent_factor,
    flash_forward,
    group_rows,
    lanes,
    row_dot,
    visit,
)
from qwq_jax.kernels.attention.steps import (
    END,
    FIRST,
    FULL,
    LAST,
    NEW,
    PADDING,
    Deal,
    is_mixed,
    plan_steps,
    visited_inner,
    visited_outer,
    whole_chunks,
)


def _backward_kernel(
    outer_ref,
    inner_ref,
    bits_ref,
    k_ref,
    v_ref,
    q_ref,
    do_ref,
    lse_ref,
    di_ref,
    *refs,
    groups: int,
    scale: float,
    chunk: int,
    segmented: bool,
):  # noqa: ANN001, ANN202
    (seg_k_ref, seg_q_ref), refs = (refs[:2], refs[2:]) if segmented else ((None, None), refs)
    dk_ref, dv_ref, dq_hbm, dk_acc, dv_acc, dq_acc, dq_in, dq_out, read_sem, write_sem = refs
    place, factor = visit(bits_ref), exponent_factor(scale)
    row, part, number = place
    batch, head = pl.program_id(0), pl.program_id(1)
    bits, block_q, block_kv, width = bits_ref[place], q_ref.shape[0], k_ref.shape[0], k_ref.shape[1]
    query = inner_ref[place]
    returns = (number > 0) & (inner_ref[row, part, jnp.maximum(number - 1, 0)] == query)
    area = dq_hbm.at[part, batch, pl.ds(query * block_q, block_q), pl.ds(head * groups * width, groups * width)]
    read = pltpu.make_async_copy(area, dq_in, read_sem)
    write = pltpu.make_async_copy(dq_out, area, write_sem)

    @pl.when(bits & FIRST != 0)
    def _() -> None:
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when((bits != 0) & (bits & NEW == 0))
    def _() -> None:
        pl.when(returns)(write.wait)  # what is to be read is still on its way out
        read.start()

    def take(at: Any, mask: jax.Array | None = None, *, skip: int = 0, whole: bool = False) -> None:
        # Queries before `skip` see none of these keys.
        kept = pl.ds(skip, block_q - skip)
        keys, values = k_ref[at, :], v_ref[at, :]
        queries, d_out = (group_rows(x.at[kept], groups, width) for x in (q_ref, do_ref))
        lse, di = (jnp.concatenate([x[g : g + 1, kept] for g in range(groups)], axis=1) for x in (lse_ref, di_ref))
        scores = row_dot(keys, queries)
        scores = scores if factor == 1 else scores * factor
        p = jnp.exp2(scores - lse * LOG2_E)
        p = p if mask is None else jnp.where(mask, p, 0.0)
        dv_acc[at, :] += dot(p.astype(d_out.dtype), d_out)
        ds = (p * (row_dot(values, d_out) - di)).astype(queries.dtype)
        dk_acc[at, :] += dot(ds, queries)
        dq = contract(ds, keys, 0, 0)
        for g in range(groups):
            part = dq[g * (block_q - skip) : (g + 1) * (block_q - skip)]
            rows = slice(g * block_q + skip, (g + 1) * block_q)
            dq_acc[rows, :] = part if whole else dq_acc[rows, :] + part

    def take_masked(first: jax.Array, size: int, skip: int = 0) -> None:
        at, shape = pl.ds(pl.multiple_of(first, size), size), (size, block_q - skip)
        key = outer_ref[place] * block_kv + first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        visible = key <= query * block_q + skip + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        if seg_k_ref is not None and seg_q_ref is not None:
            visible &= lanes(seg_k_ref[at, :], block_q - skip) == seg_q_ref[:1, skip:]
        take(at, jnp.concatenate([visible] * groups, axis=1), skip=skip)

    def take_diagonal(first: jax.Array) -> None:
        size = max(chunk // DIAGONAL_PARTS, LANES)
        for skip in range(0, chunk, size):
            take_masked(first + skip, size, skip)

    @pl.when(bits & FULL != 0)
    def _() -> None:
        take(slice(None), whole=True)

    @pl.when((bits != 0) & (bits & FULL == 0))
    def _() -> None:
        start, count = whole_chunks(bits)
        dq_acc[...] = jnp.zeros_like(dq_acc)

        def one(index: jax.Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(index * chunk, chunk), chunk)

            @pl.when((index >= start) & (index < start + count))
            def _() -> None:
                take(at)

            mixed, first = is_mixed(bits, index), index * chunk
            on_diagonal = outer_ref[place] * block_kv + first == query * block_q
            if chunk == block_q:
                pl.when(mixed & on_diagonal)(lambda: take_diagonal(first))
            if segmented or chunk != block_q:
                elsewhere = ~on_diagonal if chunk == block_q else True
                pl.when(mixed & elsewhere)(lambda: take_masked(first, chunk))

        jax.lax.fori_loop(0, block_kv // chunk, one, None)

    @pl.when(bits != 0)
    def _() -> None:
        # The write before this one leaves from the same buffer.
        pl.when((number > 0) & ~returns)(write.wait)

        @pl.when(bits & NEW != 0)
        def _() -> None:
            for g in range(groups):
                dq_out[:, g * width : (g + 1) * width] = dq_acc[g * block_q : (g + 1) * block_q, :]

        @pl.when(bits & NEW == 0)
        def _() -> None:
            read.wait()
            for g in range(groups):
                at = slice(g * width, (g + 1) * width)
                dq_out[:, at] = dq_in[:, at] + dq_acc[g * block_q : (g + 1) * block_q, :]

        write.start()
        pl.when(bits & END != 0)(write.wait)

    @pl.when(bits & LAST != 0)
    def _() -> None:
        dk_ref[...] = (dk_acc[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)


def flash_backward(
    residuals: tuple[jax.Array, ...],
    d_out: jax.Array,
    d_lse: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    sizes: Sizes,
    interpret: Any = False,
    query_ids: jax.Array | None = None,
    deal: Deal | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v.

    Args:
        residuals: q, k, v, out and lse of `flash_forward`.
        d_out: `[B, T, N, H]`, gradient of out.
        d_lse: `[B, N, T]` float32, gradient of lse.
        segment_ids: As in the forward.
        scale: As in the forward.
        sizes: Tiles; they need not be those of the forward.
        interpret: For `pl.pallas_call`.
        query_ids: As in the forward; gradients of queries that are not wanted are whatever memory held.
        deal: As in the forward.
    """
    q, k, v, out, lse = residuals
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    steps = plan_steps(T, segment_ids, **sizes.lists, by_key=True, query_ids=query_ids, deal=deal)
    block_q, block_kv = sizes.block_q, sizes.block_kv
    shared = jnp.shape(steps.bits)[0] == 1
    at = lambda ref, b, p, i: ref[0 if shared else b, p, i]  # noqa: E731
    key = lambda b, h, p, i, outer, inner, bits: (b, at(outer, b, p, i), h)  # noqa: E731
    query = lambda b, h, p, i, outer, inner, bits: (b, at(inner, b, p, i), h)  # noqa: E731
    keys, queries = pl.BlockSpec((None, block_kv, H), key), pl.BlockSpec((None, block_q, G * H), query)
    per_row = pl.BlockSpec((None, None, G, block_q), lambda b, h, *a: (b, h, 0, query(b, h, *a)[1]))
    in_specs = [keys, keys, queries, queries, per_row, per_row]
    # ds = p * (dp - sum(d_out * out) + d_lse): the last two are one number a row.
    di = jnp.einsum("btnh,btnh->bnt", d_out.astype(jnp.float32), out.astype(jnp.float32)) - d_lse
    inputs = [k.reshape(B, T, K * H), v.reshape(B, T, K * H), q.reshape(B, T, N * H), d_out.reshape(B, T, N * H)]
    inputs += [lse.reshape(B, K, G, T), di.reshape(B, K, G, T)]
    if segment_ids is not None:
        in_specs += [
            pl.BlockSpec((None, block_kv, LANES), lambda b, h, *a: (*key(b, h, *a)[:2], 0)),
            pl.BlockSpec((None, 8, block_q), lambda b, h, *a: (b, 0, query(b, h, *a)[1])),
        ]
        inputs += [
            jnp.broadcast_to(segment_ids[:, :, None], (B, T, LANES)),
            jnp.broadcast_to((segment_ids if query_ids is None else query_ids)[:, None], (B, 8, T)),
        ]
    vmem = lambda *shape: pltpu.VMEM(shape, jnp.float32)  # noqa: E731
    dk, dv, dq = pl.pallas_call(
        functools.partial(
            _backward_kernel, groups=G, scale=scale, chunk=sizes.chunk, segmented=segment_ids is not None
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, *jnp.shape(steps.bits)[1:]),
            in_specs=in_specs,
            out_specs=[keys, keys, pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[
                vmem(block_kv, H),
                vmem(block_kv, H),
                vmem(G * block_q, H),
                vmem(block_q, G * H),
                vmem(block_q, G * H),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, T, K * H), k.dtype),
            jax.ShapeDtypeStruct((B, T, K * H), v.dtype),
            jax.ShapeDtypeStruct((sizes.parts, B, T, N * H), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=100 << 20
        ),
        interpret=interpret,
        name="flash_backward",
    )(*steps, *inputs)
    if sizes.parts > 1:  # a part leaves what it has not visited as it was in memory
        dq = jnp.where(jnp.repeat(visited_inner(steps, T // block_q), block_q, axis=2)[..., None], dq, 0)
    dq = (dq.sum(0) * scale).astype(q.dtype)
    if query_ids is not None:  # keys that none of these queries sees were not visited
        seen = jnp.repeat(visited_outer(steps, T // block_kv), block_kv, axis=1)[..., None]
        dk, dv = (jnp.where(seen, x, 0) for x in (dk, dv))
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


class Options(NamedTuple):
    """What is static about a call of `flash_attention`."""

    scale: float
    forward: Sizes
    backward: Sizes
    interpret: Any = False
    deal: Deal | None = None


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    options: Options,
    query_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal grouped-query attention of any length, differentiable in q, k and v.

    Rows are filled up to whole blocks and heads to 128 wide; what fills up is its own segment and costs no visit.

    Args:
        q: `[B, T, N, H]`.
        k: `[B, T, K, H]`, N a multiple of K.
        v: `[B, T, K, H]`.
        segment_ids: `[B, T]` int32, larger than `steps.PADDING`; None: one segment a row.
        options: Scale and tiles.
        query_ids: See `plan_steps`.

    Returns:
        `[B, T, N, H]` in the dtype of q, and the logarithm of the softmax's denominator `[B, N, T]` in float32.
    """
    T, H = q.shape[1], q.shape[3]
    block = math.lcm(*(size for sizes in (options.forward, options.backward) for size in sizes[:2]))
    longer, wider = -T % block, -H % LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, longer), (0, 0), (0, wider))) for x in (q, k, v))
    fill = lambda ids: None if ids is None else jnp.pad(ids, ((0, 0), (0, longer)), constant_values=PADDING)  # noqa: E731
    result: Any = _attention(q, k, v, fill(segment_ids), fill(query_ids), options)
    out, lse = result
    return out[:, :T, :, :H], lse[:, :, :T]


Ids = jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: Ids, query_ids: Ids, options: Options
) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, segment_ids, query_ids, options)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: Ids, query_ids: Ids, options: Options
) -> tuple[tuple[jax.Array, jax.Array], tuple[Ids, ...]]:
    out, lse = flash_forward(
        q,
        k,
        v,
        segment_ids,
        scale=options.scale,
        sizes=options.forward,
        interpret=options.interpret,
        query_ids=query_ids,
        deal=options.deal,
    )
    assert lse is not None, "it was asked for"
    return (out, lse), (q, k, v, out, lse, segment_ids, query_ids)


def _backward(
    options: Options, residuals: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    *arrays, segment_ids, query_ids = residuals
    d_out, d_lse = cotangents
    dq, dk, dv = flash_backward(
        tuple(arrays),
        d_out,
        d_lse,
        segment_ids,
        scale=options.scale,
        sizes=options.backward,
        interpret=options.interpret,
        query_ids=query_ids,
        deal=options.deal,
    )
    return dq, dk, dv, None, None


_attention.defvjp(_forward, _backward)
