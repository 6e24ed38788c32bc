"""The reference kernels against a brute force in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_jax.kernels.attention import PagedLayer, RaggedRows, attention, paged_attention, token_slots

HEADS = [(4, 4), (5, 1), (10, 2), (7, 1)]
# float32 sums of a few hundred terms of size 1.
TOLERANCE = 2e-6


def brute_force(q, k, v, visible):
    """q [T,N,H], k and v [S,K,H], visible [T,S] bool; float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    G = q.shape[1] // k.shape[1]
    out = np.zeros(q.shape)
    for n in range(q.shape[1]):
        scores = q[:, n] @ k[:, n // G].T / np.sqrt(q.shape[2])
        weights = np.where(visible, np.exp(scores - scores.max(initial=-1e9, axis=1, keepdims=True)), 0)
        out[:, n] = weights / weights.sum(1, keepdims=True) @ v[:, n // G]
    return out


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("block_q", [None, 16])
def test_attention_equals_brute_force(heads, block_q, rng):
    (N, K), T, H = heads, 50, 16
    q, k, v = (rng.standard_normal((1, T, n, H)).astype(np.float32) for n in (N, K, K))
    segments = np.sort(rng.integers(0, 4, (1, T)), axis=1)
    visible = np.tril(np.ones((T, T), bool)) & (segments[0][:, None] == segments[0][None])
    out = attention(q, k, v, jnp.asarray(segments), scale=H**-0.5, block_q=block_q)
    np.testing.assert_allclose(out[0], brute_force(q[0], k[0], v[0], visible), atol=TOLERANCE)


def test_attention_gradient_is_that_of_the_formula(rng):
    T, N, K, H = 12, 4, 2, 8
    q, k, v = (jnp.asarray(rng.standard_normal((1, T, n, H)), jnp.float32) for n in (N, K, K))
    loss = lambda q, k, v, block: jnp.sum(jnp.sin(attention(q, k, v, scale=0.3, block_q=block)))  # noqa: E731
    direction = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in (q, k, v)]
    gradient = jax.grad(loss, argnums=(0, 1, 2))(q, k, v, 5)
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(gradient, direction, strict=True))
    step = 1e-2  # central differences: error step^2 from curvature, 1e-7 / step from rounding
    moved = [loss(*(x + s * step * d for x, d in zip((q, k, v), direction, strict=True)), None) for s in (1, -1)]
    assert slope == pytest.approx((float(moved[0]) - float(moved[1])) / (2 * step), rel=2e-3)


def make_batch(rng, decode, chunks, *, heads, page, H=16, max_query=24):
    """Rows as (length before, new tokens); NaN in every page that no row owns and past every row's end."""
    N, K = heads
    rows = [(before, 1) if live else (0, 0) for before, live in decode] + list(chunks)
    lengths = [before + new for before, new in rows]
    widths = [-(-length // page) for length in lengths]
    W, P = max(1, *widths), sum(widths) + 3
    free = list(rng.permutation(P))
    table = np.full((len(rows), W), P - 1, np.int32)
    keys, values = (np.full((K, P, page, H), np.nan, np.float32) for _ in range(2))
    Bd, flat_size = len(decode), len(decode) + max_query * len(chunks)
    q = rng.standard_normal((flat_size, N, H)).astype(np.float32)
    k, v = (rng.standard_normal((flat_size, K, H)).astype(np.float32) for _ in range(2))
    start, positions, expected, at = [], np.zeros(flat_size, np.int32), {}, Bd
    for b, (before, new) in enumerate(rows):
        table[b, : widths[b]] = [free.pop() for _ in range(widths[b])]
        begin = b if b < Bd else at
        start.append(begin)
        at = max(at, begin + new) if b >= Bd else at
        positions[begin : begin + new] = np.arange(before, before + new)
        old = rng.standard_normal((2, before, K, H)).astype(np.float32)
        for s in range(before):
            keys[:, table[b, s // page], s % page] = old[0, s]
            values[:, table[b, s // page], s % page] = old[1, s]
        if new:
            full = [np.concatenate([o, x[begin : begin + new]]) for o, x in zip(old, (k, v), strict=True)]
            visible = np.arange(before + new)[None] <= np.arange(before, before + new)[:, None]
            expected[begin] = brute_force(q[begin : begin + new], *full, visible)
    arrays = (jnp.asarray(x, jnp.int32) for x in (table, lengths, [*start, at], positions))
    return q, k, v, PagedLayer(jnp.asarray(keys), jnp.asarray(values)), tuple(arrays), expected, Bd, max_query


def check_batch(q, k, v, layer, arrays, expected, decode_rows, max_query):
    table, length, start, positions = arrays
    pages, page = layer.k.shape[1:3]
    slots = token_slots(table, length, start, positions, page_size=page, pages=pages)
    rows = RaggedRows(table, length, start, slots)
    run = jax.jit(paged_attention, static_argnames=("scale", "decode_rows", "max_query"))
    out, after = run(q, k, v, layer, rows, scale=q.shape[-1] ** -0.5, decode_rows=decode_rows, max_query=max_query)
    for begin, want in expected.items():
        np.testing.assert_allclose(out[begin : begin + len(want)], want, atol=TOLERANCE)
    owned = {int(s) for s in slots if s < pages * page}
    assert len(owned) == sum(len(want) for want in expected.values())
    untouched = np.array([s not in owned for s in range(pages * page)])
    for pool, new in ((layer.k, after.k), (layer.v, after.v)):
        flat = lambda x: np.asarray(x).reshape(x.shape[0], -1, x.shape[3])  # noqa: E731
        np.testing.assert_array_equal(flat(pool)[:, untouched], flat(new)[:, untouched])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page", [4, 16])
def test_paged_attention_mixes_decode_and_prefill(heads, page, rng):
    decode = [(7, True), (0, False), (page - 1, True), (page, True), (0, True)]
    check_batch(*make_batch(rng, decode, [(0, 9), (0, 0), (page, 24), (5, 1)], heads=heads, page=page))


def test_paged_decode_without_prefill(rng):
    q, k, v, layer, arrays, expected, rows, _ = make_batch(rng, [(3, True), (9, True)], [], heads=(5, 1), page=4)
    check_batch(q, k, v, layer, arrays, expected, rows, 0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    decode=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=4, max_size=4),
    chunks=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 24)), min_size=2, max_size=2),
    seed=st.integers(0, 2**32 - 1),
)
def test_paged_attention_of_any_raggedness(decode, chunks, seed):
    chunks = [(before if new else 0, new) for before, new in chunks]
    check_batch(*make_batch(np.random.default_rng(seed), decode, chunks, heads=(4, 2), page=8))
