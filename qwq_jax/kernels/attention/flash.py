"""Causal attention on TPU, forward: FlashAttention (arXiv 2205.14135) over a list of visible block pairs.

All G query heads of a kv head are rows of one product, so that each key and value is fetched once a group. Scores are
kept in base 2; sums of probabilities stay 128 lanes wide until the last key block, so the loop has no reduction over
lanes but the maximum.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention.steps import FULL, LAST, Deal, is_mixed, plan_steps, whole_chunks

LANES = 128
# Finite, and a masked score stays below the maximum of a row that has seen no key yet: its weight is then 0, not 1.
START = -1e30
MASKED = -2e30
TINY = 1e-30
# A chunk on the diagonal is computed in so many parts, each without what its rows cannot see.
DIAGONAL_PARTS = 4
LOG2_E = math.log2(math.e)


def contract(a: jax.Array, b: jax.Array, dim_a: int, dim_b: int) -> jax.Array:
    """Product of two matrices over one dimension each, in float32.

    The matrix unit takes bfloat16; without being told it would round float32 operands to that.
    """
    exact = jax.lax.Precision.HIGHEST if a.dtype == b.dtype == jnp.float32 else None
    dims = (((dim_a,), (dim_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def row_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`[m, h] x [n, h] -> [m, n]` in float32."""
    return contract(a, b, 1, 1)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`[m, k] x [k, n] -> [m, n]` in float32."""
    return contract(a, b, 1, 0)


def lanes(x: jax.Array, count: int) -> jax.Array:
    """Repeats `[m, 128]`, all of whose lanes are equal, to `[m, count]`."""
    return jnp.concatenate([x] * (count // LANES), axis=1) if count != LANES else x


def group_rows(ref: jax.Array, groups: int, width: int) -> jax.Array:
    """The query heads of a block `[bq, G * H]` one below the other, `[G * bq, H]`."""
    return jnp.concatenate([ref[:, g * width : (g + 1) * width] for g in range(groups)], axis=0)


def _softmax_step(
    scores: jax.Array, state: tuple[jax.Array, ...], values: jax.Array, factor: float
) -> tuple[jax.Array, ...]:
    """Online softmax (arXiv 1805.02867): takes in `scores [m, n]` and `values [n, h]`; state is max, sum (lanes), acc.

    The factor, from scores to exponents of 2, comes after the maximum is subtracted: raw scores are then what waits for
    the maximum, and the compiler keeps half as many values in flight. A factor of 1 costs nothing.
    """
    m, total, acc = state
    m_next = jnp.maximum(m, jnp.max(scores, axis=1, keepdims=True))
    alpha, p = m - m_next, scores - lanes(m_next, scores.shape[1])
    alpha, p = (jnp.exp2(x if factor == 1 else x * factor) for x in (alpha, p))
    total = total * alpha + functools.reduce(jnp.add, [p[:, i : i + LANES] for i in range(0, p.shape[1], LANES)])
    return m_next, total, acc * lanes(alpha, acc.shape[1]) + dot(p.astype(values.dtype), values)


def _forward_kernel(
    outer_ref,
    inner_ref,
    bits_ref,
    q_ref,
    k_ref,
    v_ref,
    *refs,
    groups: int,
    scale: float,
    chunk: int,
    looped: bool,
    segmented: bool,
):  # noqa: ANN001, ANN202
    (seg_q_ref, seg_k_ref), refs = (refs[:2], refs[2:]) if segmented else ((None, None), refs)
    o_ref, *lse_refs, m_ref, l_ref, acc_ref = refs
    place, factor = visit(bits_ref), exponent_factor(scale)
    bits, block_q, block_kv = bits_ref[place], q_ref.shape[0], k_ref.shape[0]
    width = k_ref.shape[1]

    def clear() -> None:
        m_ref[...] = jnp.full_like(m_ref, START)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    pl.when(pl.program_id(3) == 0)(clear)

    def take(at: Any, mask: jax.Array | None = None, *, first: int = 0, count: int = block_q) -> None:
        # Queries `[first, first + count)` of every head.
        rows = [slice(g * block_q + first, g * block_q + first + count) for g in range(groups)]
        rows = [slice(None)] if count == block_q else rows
        state = tuple(jnp.concatenate([ref[r, :] for r in rows], axis=0) for ref in (m_ref, l_ref, acc_ref))
        scores = row_dot(group_rows(q_ref.at[pl.ds(first, count)], groups, width), k_ref[at, :])
        scores = scores if mask is None else jnp.where(mask, scores, MASKED)
        state = _softmax_step(scores, state, v_ref[at, :], factor)
        for ref, value in zip((m_ref, l_ref, acc_ref), state, strict=True):
            for r, part in zip(rows, jnp.split(value, len(rows), axis=0), strict=True):
                ref[r, :] = part

    def take_masked(start: jax.Array, size: int, *, first: int = 0, count: int = block_q) -> None:
        at, shape = pl.ds(pl.multiple_of(start, chunk), size), (count, size)
        row = outer_ref[place] * block_q + first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        visible = row >= inner_ref[place] * block_kv + start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        if seg_q_ref is not None and seg_k_ref is not None:
            visible &= lanes(seg_q_ref[pl.ds(first, count), :], size) == seg_k_ref[:1, at]
        take(at, jnp.concatenate([visible] * groups, axis=0), first=first, count=count)

    def take_diagonal(start: jax.Array) -> None:
        size = max(chunk // DIAGONAL_PARTS, LANES)
        for first in range(0, chunk, size):
            take_masked(start, first + size, first=first, count=size)

    start, count = whole_chunks(bits)
    if looped:
        each = lambda index, _: take(pl.ds(pl.multiple_of(index * chunk, chunk), chunk))  # noqa: E731
        jax.lax.fori_loop(start, start + count, each, None)
    else:
        pl.when(bits & FULL != 0)(lambda: take(slice(None)))

    @pl.when((bits != 0) & (bits & FULL == 0))
    def _() -> None:
        pieces = 0 if looped else 1
        while 0 < 2 * pieces * chunk < block_kv:
            pieces *= 2
        while pieces:

            @pl.when(count & pieces != 0)
            def _(pieces: int = pieces) -> None:
                # Larger pieces come first: those before this one are the higher bits of the count.
                done = count & -(2 * pieces)
                take(pl.ds(pl.multiple_of((start + done) * chunk, chunk), pieces * chunk))

            pieces //= 2

        def one(index: jax.Array, _: None) -> None:
            mixed, first = is_mixed(bits, index), index * chunk
            on_diagonal = outer_ref[place] * block_q == inner_ref[place] * block_kv + first
            if chunk == block_q:
                pl.when(mixed & on_diagonal)(lambda: take_diagonal(first))
            if segmented or chunk != block_q:
                elsewhere = ~on_diagonal if chunk == block_q else True
                pl.when(mixed & elsewhere)(lambda: take_masked(first, chunk))

        jax.lax.fori_loop(0, block_kv // chunk, one, None)

    @pl.when(bits & LAST != 0)
    def _() -> None:
        total = jnp.broadcast_to(jnp.sum(l_ref[...], axis=1, keepdims=True), l_ref.shape)
        # A row of nothing but padding sees no key: its sum is 0, and so are its accumulators.
        inverse = pl.reciprocal(jnp.maximum(total, TINY), full_range=False)
        out = (acc_ref[...] * lanes(inverse, width)).astype(o_ref.dtype)
        for g in range(groups):
            o_ref[:, g * width : (g + 1) * width] = out[g * block_q : (g + 1) * block_q]
        for lse_ref in lse_refs:
            lse = jnp.where(total > 0, m_ref[...] * scale + jnp.log(total), 0.0)
            for g in range(groups):
                # All lanes are equal: a transposition turns the column into a row.
                lse_ref[g : g + 1, :] = lse[g * block_q : (g + 1) * block_q].T[:1]
        clear()  # for the next block


def exponent_factor(scale: float) -> float:
    """From scores to exponents of 2; exactly 1 where the caller has put it into the queries (`scale` is ln 2)."""
    factor = scale * LOG2_E
    return 1.0 if abs(factor - 1) < 1e-7 else factor


def visit(bits_ref: jax.Array) -> tuple[jax.Array, ...]:
    """Where the lists hold this grid step: `(row, part, number)`."""
    return jnp.minimum(pl.program_id(0), bits_ref.shape[0] - 1), pl.program_id(2), pl.program_id(3)


class Sizes(NamedTuple):
    """Tile sizes.

    Attributes:
        block_q: Queries a block.
        block_kv: Keys a block.
        chunk: Keys a chunk of a partly visible block.
        parts: Lists of visits, one a core.
        looped: Of the forward: chunks that are visible throughout come one after another, rather than all that there
            are at once. A third of the time to compile, and as many cycles where it is the matrix unit that binds.
    """

    block_q: int
    block_kv: int
    chunk: int
    parts: int = 1
    looped: bool = False

    @property
    def lists(self) -> dict[str, Any]:
        """What `plan_steps` asks."""
        return {"block_q": self.block_q, "block_kv": self.block_kv, "chunk": self.chunk, "parts": self.parts}


def flash_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    sizes: Sizes,
    with_lse: bool = True,
    interpret: Any = False,
    query_ids: jax.Array | None = None,
    deal: Deal | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of rows that are a multiple of both blocks long; the head dimension is a multiple of 128.

    Args:
        q: `[B, T, N, H]`.
        k: `[B, T, K, H]`.
        v: `[B, T, K, H]`.
        segment_ids: `[B, T]` int32, PADDING for tokens that fill up; None: one segment a row.
        scale: Factor on the scores.
        sizes: Tiles.
        with_lse: Whether the second result is wanted.
        interpret: For `pl.pallas_call`.
        query_ids: See `plan_steps`; results of queries that are not wanted are whatever memory held.
        deal: See `plan_steps`.

    Returns:
        `[B, T, N, H]` in the dtype of q, and the natural logarithm of the softmax's denominator, `[B, N, T]` float32,
        or None.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    steps = plan_steps(T, segment_ids, **sizes.lists, query_ids=query_ids, deal=deal)
    block_q, block_kv = sizes.block_q, sizes.block_kv
    shared = jnp.shape(steps.bits)[0] == 1
    at = lambda ref, b, p, i: ref[0 if shared else b, p, i]  # noqa: E731
    query = lambda b, h, p, i, outer, inner, bits: (b, at(outer, b, p, i), h)  # noqa: E731
    key = lambda b, h, p, i, outer, inner, bits: (b, at(inner, b, p, i), h)  # noqa: E731
    in_specs = [
        pl.BlockSpec((None, block_q, G * H), query),
        pl.BlockSpec((None, block_kv, H), key),
        pl.BlockSpec((None, block_kv, H), key),
    ]
    inputs = [q.reshape(B, T, N * H), k.reshape(B, T, K * H), v.reshape(B, T, K * H)]
    if segment_ids is not None:
        in_specs += [
            pl.BlockSpec((None, block_q, LANES), lambda b, h, *a: (*query(b, h, *a)[:2], 0)),
            pl.BlockSpec((None, 8, block_kv), lambda b, h, *a: (b, 0, key(b, h, *a)[1])),
        ]
        inputs += [
            jnp.broadcast_to((segment_ids if query_ids is None else query_ids)[:, :, None], (B, T, LANES)),
            jnp.broadcast_to(segment_ids[:, None], (B, 8, T)),
        ]
    kernel = functools.partial(
        _forward_kernel,
        groups=G,
        scale=scale,
        chunk=sizes.chunk,
        looped=sizes.looped,
        segmented=segment_ids is not None,
    )
    out_specs = [pl.BlockSpec((None, block_q, G * H), query)]
    out_shape = [jax.ShapeDtypeStruct((B, T, N * H), q.dtype)]
    if with_lse:
        out_specs.append(pl.BlockSpec((None, None, G, block_q), lambda b, h, *a: (b, h, 0, query(b, h, *a)[1])))
        out_shape.append(jax.ShapeDtypeStruct((B, K, G, T), jnp.float32))
    out, *lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, *jnp.shape(steps.bits)[1:]),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((G * block_q, width), jnp.float32) for width in (LANES, LANES, H)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=100 << 20
        ),
        interpret=interpret,
        name="flash_forward",
    )(*steps, *inputs)
    return out.reshape(B, T, N, H), lse[0].reshape(B, N, T) if lse else None
