"""The TPU kernels of dense attention, interpreted: against the reference, with races, late waits and NaN looked for."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention import attention
from qwq_jax.kernels.attention.flash import Sizes
from qwq_jax.kernels.attention.flash_vjp import Options, flash_attention
from qwq_jax.kernels.attention.steps import FIRST, FULL, LAST, PADDING, Deal, is_mixed, plan_steps, whole_chunks
from qwq_jax.sharding import zigzag
from tests.cases import exhaustive, slow

# float32 sums of some hundred terms of size 1; gradients sum as many again.
OUT, GRADIENT = 3e-6, 5e-5
SMALL = Sizes(128, 256, 128)
HEADS = [(5, 1), (7, 1), (10, 2)]


def interpret(mode: str) -> pltpu.InterpretParams:
    """Memory that was never written reads as NaN, and a copy happens when it starts or not before it is waited for."""
    return pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode, uninitialized_memory="nan")


def races_found() -> bool:
    module = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    return module.races.races_found


def draw(rng, shape, heads, dtype=jnp.float32):
    B, T, H = shape
    N, K = heads
    return [jnp.asarray(rng.standard_normal((B, T, n, H)), dtype) for n in (N, K, K, N)]


def both(q, k, v, d_out, segments, options):
    """Outputs and gradients of the kernels, and of the reference."""
    kernel = lambda q, k, v: flash_attention(q, k, v, segments, options)[0]  # noqa: E731
    plain = lambda q, k, v: attention(q, k, v, segments, scale=options.scale)  # noqa: E731
    results = []
    for function in (kernel, plain):
        out, vjp = jax.vjp(function, q, k, v)
        results.append((out, *vjp(d_out)))
    return results


CHOSEN = [((5, 1), True, "on_wait")]
CASES = [(heads, packed, mode) for heads in HEADS for packed in (False, True) for mode in ("eager", "on_wait")]


@pytest.mark.parametrize(
    ("heads", "packed", "mode"),
    [slow(*case) if case in CHOSEN else exhaustive(*case) for case in CASES],
)
def test_kernels_equal_the_reference(rng, heads, packed, mode):
    q, k, v, d_out = draw(rng, (1, 384, 128), heads)
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (1, 384)), axis=1), jnp.int32) if packed else None
    options = Options(128**-0.5, SMALL, Sizes(128, 128, 128), interpret(mode))
    got, want = both(q, k, v, d_out, segments, options)
    for name, left, right in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(left, right, atol=OUT if name == "out" else GRADIENT, err_msg=name)
    assert not races_found()


@pytest.mark.parametrize(("length", "width"), [exhaustive(100, 64), exhaustive(1, 128), exhaustive(257, 128)])
def test_any_length_and_narrow_heads(rng, length, width):
    q, k, v, d_out = draw(rng, (2, length, width), (4, 2))
    got, want = both(q, k, v, d_out, None, Options(width**-0.5, SMALL, SMALL, interpret("on_wait")))
    for left, right in zip(got, want, strict=True):
        assert left.shape == right.shape
        np.testing.assert_allclose(left, right, atol=GRADIENT)


@pytest.mark.parametrize(
    ("packed", "looped", "heads"),
    [
        *(exhaustive(packed, looped, (2, 1)) for packed in (False, True) for looped in (False, True)),
        slow(False, True, (1, 1)),
    ],
)
def test_diagonal_in_parts(rng, packed, looped, heads):
    """Chunks as long as a query block: those on the diagonal are computed in parts, without what they cannot see."""
    q, k, v, d_out = draw(rng, (1, 768, 128), heads)
    # A border in the middle of a block, one at its end: mixed chunks on the diagonal and off it.
    segments = jnp.asarray(np.repeat([[1, 1, 2, 3, 3, 3]], 128, axis=1), jnp.int32) if packed else None
    forward, backward = Sizes(256, 768, 256, looped=looped), Sizes(256, 768, 256)
    got, want = both(q, k, v, d_out, segments, Options(0.1, forward, backward, interpret("on_wait")))
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(left, right, atol=GRADIENT)


@pytest.mark.parametrize("parts", [exhaustive(1), slow(2)])
def test_two_cores_share_the_blocks(rng, parts):
    q, k, v, d_out = draw(rng, (1, 512, 128), (2, 1))
    segments = jnp.asarray(np.repeat([[3, 1, 7, 7]], 128, axis=1), jnp.int32)
    sizes = Sizes(128, 128, 128, parts)
    got, want = both(q, k, v, d_out, segments, Options(0.1, sizes, sizes, interpret("on_wait")))
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(left, right, atol=GRADIENT)


@pytest.mark.slow
def test_bfloat16_and_a_scale_in_the_queries(rng):
    """With scale ln 2 the kernel multiplies nothing: the caller has put the real scale into the queries."""
    q, k, v, d_out = draw(rng, (1, 256, 128), (5, 1), jnp.bfloat16)
    options = Options(float(np.log(2)), SMALL, SMALL, interpret("eager"))
    got, _ = both(q / 16, k, v, d_out, None, options)
    exact = [x.astype(jnp.float32) for x in (q / 16, k, v, d_out)]
    _, want = both(*exact, None, options)
    for left, right in zip(got, want, strict=True):
        # 8 bits of mantissa, in probabilities and results.
        np.testing.assert_allclose(left.astype(jnp.float32), right, atol=2**-6 * float(jnp.abs(right).max()))


@pytest.mark.slow
def test_logarithm_of_the_denominator_and_its_gradient(rng):
    q, k, v, _ = draw(rng, (1, 200, 128), (2, 1))
    options = Options(0.1, SMALL, SMALL, interpret("on_wait"))

    def plain(q, k):
        scores = jnp.einsum("btnh,bskh->bnts", q, k) * 0.1
        return jax.nn.logsumexp(jnp.where(np.tril(np.ones((200, 200), bool)), scores, -jnp.inf), axis=-1)

    weight = jnp.asarray(rng.standard_normal((1, 2, 200)), jnp.float32)
    kernel = lambda q, k: flash_attention(q, k, v, None, options)[1]  # noqa: E731
    np.testing.assert_allclose(kernel(q, k), plain(q, k), atol=OUT)
    gradients = [jax.grad(lambda q, k, f=f: jnp.sum(f(q, k) * weight), argnums=(0, 1))(q, k) for f in (kernel, plain)]
    for left, right in zip(*gradients, strict=True):
        np.testing.assert_allclose(left, right, atol=GRADIENT)


@pytest.mark.parametrize("length", [slow(512), exhaustive(640)])
def test_devices_that_share_a_row_add_up_to_it(rng, length):
    """Each with its own queries; what memory held in the place of others' must reach nothing. 640 fills up no block."""
    shards, options = 2, Options(0.1, SMALL, Sizes(128, 256, 128), interpret("on_wait"))
    q, k, v, d_out = draw(rng, (1, length, 128), (2, 1))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (1, length)), axis=1), jnp.int32)
    out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, segments, scale=options.scale), q, k, v)
    dq, dk, dv = vjp(d_out)
    totals = []
    for own in np.split(zigzag(length, shards), shards):
        mine = np.isin(np.arange(length), own)
        ids = jnp.where(mine, segments, PADDING)
        dealt = options._replace(deal=Deal(shards, length))
        found, vjp = jax.vjp(lambda q, k, v, i=ids, o=dealt: flash_attention(q, k, v, segments, o, i)[0], q, k, v)
        np.testing.assert_allclose(found[:, own], out[:, own], atol=OUT)
        of_queries, *of_keys = vjp(jnp.where(mine[:, None, None], d_out, 0))
        np.testing.assert_allclose(of_queries[:, own], dq[:, own], atol=GRADIENT)
        totals.append(of_keys)
    for left, right in zip(map(sum, zip(*totals, strict=True)), (dk, dv), strict=True):
        np.testing.assert_allclose(left, right, atol=GRADIENT)
    assert not races_found()


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("shards", [2, 4, 8])
def test_devices_that_share_a_row_make_as_many_visits(shards, by_key):
    """Of a row of 32,768 tokens, each within a twentieth of the mean, on a list no longer than the longest."""
    length = 32_768
    ids = jnp.zeros((1, length), jnp.int32)
    visits, room = [], []
    for own in np.split(zigzag(length, shards), shards):
        wanted = jnp.where(np.isin(np.arange(length), own), ids, PADDING)
        sizes = {"block_q": 512, "block_kv": 512, "chunk": 512, "by_key": by_key}
        steps = plan_steps(length, ids, **sizes, query_ids=wanted, deal=Deal(shards, length))
        visits.append(int((np.asarray(steps.bits) != 0).sum()))
        room.append(steps.bits.shape[-1])
    blocks = length // 512
    assert sum(visits) == blocks * (blocks + 1) // 2, "together they are those of the whole row"
    assert max(visits) <= 1.05 * np.mean(visits) and set(room) == {max(visits)}


@functools.cache
def visible_pairs(length: int, segments: bytes | None) -> np.ndarray:
    visible = np.tril(np.ones((length, length), bool))
    if segments is not None:
        ids = np.frombuffer(segments, np.int32)
        visible &= ids[:, None] == ids[None]
    return visible


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    borders=st.lists(st.integers(1, 1023), max_size=6),
    sizes=st.sampled_from([(128, 256, 128), (256, 512, 128), (128, 128, 128), (256, 1024, 256)]),
    by_key=st.booleans(),
    packed=st.booleans(),
    sort=st.booleans(),
)
def test_visits_cover_each_visible_pair_once_and_claim_no_other_whole(borders, sizes, by_key, packed, sort):
    length, (block_q, block_kv, chunk) = 1024, sizes
    ids = np.searchsorted(np.sort(borders), np.arange(length), side="right").astype(np.int32)
    ids = ids if sort else ids % 2
    steps = plan_steps(
        length,
        jnp.asarray(ids[None]) if packed else None,
        block_q=block_q,
        block_kv=block_kv,
        chunk=chunk,
        by_key=by_key,
    )
    visible = visible_pairs(length, ids.tobytes() if packed else None)
    covered = np.zeros_like(visible, int)
    outer, inner, bits = (np.asarray(x)[0, 0] for x in steps)
    visits = bits != 0
    assert not visits[np.argmin(visits) :].any() or visits.all()
    for o, i, b in zip(outer[visits], inner[visits], bits[visits], strict=True):
        query, key = (i, o) if by_key else (o, i)
        rows = slice(query * block_q, (query + 1) * block_q)
        start, count = (int(x) for x in whole_chunks(b))
        for index in range(block_kv // chunk):
            columns = slice(key * block_kv + index * chunk, key * block_kv + (index + 1) * chunk)
            whole = bool(b & FULL) or start <= index < start + count
            assert not whole or visible[rows, columns].all()
            if whole or is_mixed(b, index):
                covered[rows, columns] += 1
    assert (covered[visible] == 1).all() and covered.max() == 1
    for block in np.unique(outer[visits]):
        of_block = bits[visits][outer[visits] == block]
        assert [bool(b & FIRST) for b in of_block] == [True] + [False] * (len(of_block) - 1)
        assert [bool(b & LAST) for b in of_block] == [False] * (len(of_block) - 1) + [True]
