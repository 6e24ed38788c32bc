"""The reference kernels against a brute force in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_jax.kernels.attention import Target, attention, dispatch, paged_attention, reference
from tests.cases import exhaustive
from tests.kernels.ragged_batches import brute_force, check, held, make_batch

HEADS = [(4, 4), (5, 1), (10, 2), (7, 1)]
# float32 sums of a few hundred terms of size 1.
TOLERANCE = 2e-6
GPU = Target("gpu", "NVIDIA H200")


@pytest.mark.parametrize(
    ("heads", "block_q"),
    [*((heads, None) for heads in HEADS), *(exhaustive(heads, 16) for heads in HEADS[:1] + HEADS[2:]), (HEADS[1], 16)],
)
def test_attention_equals_brute_force(heads, block_q, rng):
    (N, K), T, H = heads, 50, 16
    q, k, v = (rng.standard_normal((1, T, n, H)).astype(np.float32) for n in (N, K, K))
    segments = np.sort(rng.integers(0, 4, (1, T)), axis=1)
    visible = np.tril(np.ones((T, T), bool)) & (segments[0][:, None] == segments[0][None])
    out, lse = reference.attention(q, k, v, jnp.asarray(segments), scale=H**-0.5, block_q=block_q)
    want, want_lse = brute_force(q[0], k[0], v[0], visible)
    np.testing.assert_allclose(out[0], want, atol=TOLERANCE)
    np.testing.assert_allclose(lse[0], want_lse.T, atol=TOLERANCE)


@pytest.mark.slow
def test_attention_gradient_is_that_of_the_formula(rng):
    T, N, K, H = 12, 4, 2, 8
    q, k, v = (jnp.asarray(rng.standard_normal((1, T, n, H)), jnp.float32) for n in (N, K, K))
    loss = lambda q, k, v, block: jnp.sum(jnp.sin(reference.attention(q, k, v, scale=0.3, block_q=block)[0]))  # noqa: E731
    direction = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in (q, k, v)]
    gradient = jax.grad(loss, argnums=(0, 1, 2))(q, k, v, 5)
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(gradient, direction, strict=True))
    step = 1e-2  # central differences: error step^2 from curvature, 1e-7 / step from rounding
    moved = [loss(*(x + s * step * d for x, d in zip((q, k, v), direction, strict=True)), None) for s in (1, -1)]
    assert slope == pytest.approx((float(moved[0]) - float(moved[1])) / (2 * step), rel=2e-3)


def serve(batch, **how):
    run = jax.jit(partial(paged_attention, **how), static_argnames=("scale", "decode_rows", "max_query"))
    return run(
        batch.q,
        batch.k,
        batch.v,
        batch.layer,
        batch.rows,
        scale=batch.q.shape[-1] ** -0.5,
        decode_rows=batch.decode_rows,
        max_query=batch.max_query,
    )


@pytest.mark.parametrize(
    ("heads", "page"),
    [*((heads, 4) for heads in HEADS), *(exhaustive(heads, 16) for heads in HEADS[:1] + HEADS[2:]), (HEADS[1], 16)],
)
def test_paged_attention_mixes_decode_and_prefill(heads, page, rng):
    decode = [(7, True), (0, False), (page - 1, True), (page, True), (0, True)]
    batch = make_batch(rng, decode, [(0, 9), (0, 0), (page, 24), (5, 1)], heads=heads, page=page)
    check(batch, serve(batch), TOLERANCE)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [((5, 1), "bfloat16"), ((10, 2), "int8"), ((4, 4), "float8_e4m3fn"), exhaustive((10, 2), "float8_e5m2")],
)
def test_paged_attention_over_narrow_caches(heads, dtype, rng):
    batch = make_batch(rng, [(130, True), (7, True)], [(3, 9), (120, 24)], heads=heads, page=128, dtype=dtype)
    check(batch, serve(batch), 4 * TOLERANCE)  # values up to 4 times as large


def test_paged_decode_without_prefill(rng):
    batch = make_batch(rng, [(3, True), (9, True)], [], heads=(5, 1), page=4)
    check(batch, serve(batch), TOLERANCE)


@pytest.mark.parametrize("chunks", [[], [(0, 9), (0, 0), (40, 24), (5, 1)]])
def test_what_a_gpu_computes_at_once_gives_the_same(chunks, rng):
    """One turn of the loop for all rows, and chunks of many queries."""
    batch = make_batch(rng, [(7, True), (0, False), (60, True)], chunks, heads=(10, 2), page=4)
    check(batch, serve(batch, target=GPU), TOLERANCE)


@pytest.mark.parametrize(
    ("rows", "length", "segments", "dtype", "chosen"),
    [
        (1, 8192, False, jnp.bfloat16, "cudnn"),
        (1, 8192, True, jnp.bfloat16, "cudnn"),
        (3, 8192, True, jnp.bfloat16, "reference"),
        (3, 8192, False, jnp.bfloat16, "cudnn"),
        (1, 8192, True, jnp.float32, "reference"),
        (1, 191, True, jnp.bfloat16, "reference"),  # cuDNN has no gradient of a mask of odd length
        (1, 191, False, jnp.bfloat16, "cudnn"),
    ],
)
def test_a_gpu_takes_cudnn_where_its_mask_is_small_and_even(rows, length, segments, dtype, chosen, monkeypatch):
    taken = []
    monkeypatch.setattr(dispatch, "_cudnn", lambda q, *_: taken.append("cudnn") or q)
    monkeypatch.setattr(reference, "attention", lambda q, *_, **__: taken.append("reference") or (q, q))
    q, k = (jax.ShapeDtypeStruct((rows, length, n, 128), dtype) for n in (10, 2))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32) if segments else None
    jax.eval_shape(partial(attention, scale=1.0, target=GPU), q, k, k, ids)
    assert taken == [chosen]


@pytest.mark.parametrize(("length", "block_q"), [(2048, 512), (191, 48), (16_384, None)])
def test_a_gpu_s_blocks_are_few_while_their_scores_are(length, block_q, monkeypatch):
    found = []
    monkeypatch.setattr(reference, "attention", lambda q, *_, block_q, **__: found.append(block_q) or (q, q))
    q, k = (jax.ShapeDtypeStruct((2, length, n, 128), jnp.float32) for n in (40, 8))
    jax.eval_shape(partial(attention, scale=1.0, target=GPU), q, k, k)
    assert found == [block_q]


@pytest.mark.parametrize("before", [0, 126, 127, 128, 254, 255, 256, 400])
def test_a_row_alone_reads_as_many_pages_as_hold_it(before, rng):
    """Around the bounds of the narrower ways to read it, of 128 and 256 tokens."""
    batch = make_batch(rng, [(before, True)], [], heads=(5, 1), page=32, width=16)
    check(batch, serve(batch), TOLERANCE)


@pytest.mark.parametrize(
    ("before", "new"), [(0, 1), (0, 8), (0, 0), (125, 3), (127, 8), (254, 3), exhaustive(120, 8), exhaustive(400, 5)]
)
def test_a_few_tokens_of_a_row_alone_see_each_its_own_past(before, new, rng, monkeypatch):
    """As guesses are checked: without the loops of chunks of prompts, and with room for more tokens than there are."""
    monkeypatch.delattr(jax.lax, "fori_loop")
    batch = make_batch(rng, [], [(before, new)], heads=(10, 2), page=32, width=16, max_query=8)
    check(batch, serve(batch), TOLERANCE)


# Rounding to the nearest of 254 steps between the extremes; to 3 or 2 bits after the leading one.
@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.5 / 127), ("float8_e4m3fn", 2**-4), ("float8_e5m2", 2**-3)])
def test_an_8_bit_cache_is_as_exact_as_its_type(dtype, bound, rng):
    x = rng.standard_normal((50, 64)).astype(np.float32) * np.exp(rng.uniform(-9, 9, (50, 1)))
    x[7] = 0
    error = np.abs(held(x, dtype) - x).max(1)
    assert (error <= bound * np.abs(x).max(1) * 1.01).all()
    assert error.max() > 0


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    decode=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=4, max_size=4),
    chunks=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 24)), min_size=2, max_size=2),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.exhaustive
def test_paged_attention_of_any_raggedness(decode, chunks, seed):
    chunks = [(before if new else 0, new) for before, new in chunks]
    batch = make_batch(np.random.default_rng(seed), decode, chunks, heads=(4, 2), page=8)
    check(batch, serve(batch), TOLERANCE)
