"""The paged TPU kernels, interpreted: against float64, with races, late waits and NaN in all unused memory."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention import Implementation, Target, paged_attention
from qwq_jax.kernels.attention.paged_blocks import paged_sizes, smem_bytes
from qwq_jax.kernels.attention.ragged import ragged_attention
from qwq_jax.kernels.attention.stream import PagedSizes
from qwq_jax.kernels.attention.tiles import cut_runs, make_tiles
from qwq_jax.kernels.attention.work import find_work
from tests.cases import exhaustive, slow
from tests.kernels.ragged_batches import check, make_batch

# Scores reach 20, and float32 rounds them by 1e-6: that much of a probability, and of outputs of size 4.
TOLERANCE = 2e-5
# Of bfloat16 results of size 4: 8 bits of mantissa in queries, probabilities and outputs.
NARROW = 6e-2


def races_found() -> bool:
    module = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    return module.races.races_found


@functools.cache
def kernel(mode, decode_rows, max_query, block=256, parts=1, races=True, float8=False):
    """Compiled once for all batches of the same shapes: that takes longer than running it."""
    interpret = pltpu.InterpretParams(
        detect_races=races,
        dma_execution_mode=mode,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        num_cores_or_threads=parts,
    )
    how = {"decode": PagedSizes(1, block, 4, parts, float8), "prefill": PagedSizes(32, block, 2, parts)}
    how |= {"decode_rows": decode_rows, "max_query": max_query}

    @jax.jit
    def run(q, k, v, layer, rows):
        work = find_work(rows, layer, tokens=q.shape[0], **how)
        return ragged_attention(q, k, v, layer, work, scale=128**-0.5, interpret=interpret)

    return run


def serve(batch, mode, **sizes):
    run = kernel(mode, batch.decode_rows, batch.max_query, **sizes)
    try:
        return jax.block_until_ready(run(batch.q, batch.k, batch.v, batch.layer, batch.rows))
    except Exception:
        pltpu.reset_tpu_interpret_mode_state()
        raise


# Lengths at the borders of units, pages and blocks, empty rows, chunks that begin and end anywhere.
BATCHES = [
    ([(300, True), (0, False), (127, True), (0, True)], [(100, 40), (0, 0)]),
    ([(255, True), (256, True), (128, True), (31, True)], [(0, 64), (250, 7)]),
    ([(0, False)] * 4, [(0, 0), (0, 0)]),
]


@pytest.mark.parametrize(
    ("heads", "dtype", "mode", "parts"),
    [
        ((5, 1), "float32", "on_wait", 1),
        *(
            slow(heads, dtype, mode, parts)
            for heads, dtype, mode, parts in [
                ((5, 1), "int8", "eager", 1),
            ]
        ),
        *(
            exhaustive(*case)
            for case in [
                ((7, 1), "bfloat16", "on_wait", 1),
                ((5, 1), "float8_e4m3fn", "on_wait", 1),
                ((10, 2), "float32", "on_wait", 2),
                ((40, 8), "float32", "eager", 1),
                ((10, 2), "int8", "on_wait", 1),
                ((5, 1), "float8_e5m2", "eager", 2),
            ]
        ),
    ],
)
def test_kernel_equals_float64(rng, heads, dtype, mode, parts):
    for decode, chunks in BATCHES:
        batch = make_batch(rng, decode, chunks, heads=heads, page=128, H=128, max_query=64, dtype=dtype, width=3)
        check(batch, serve(batch, mode, parts=parts), TOLERANCE)
    assert not races_found()


@pytest.mark.parametrize("parts", [1, exhaustive(2)])
def test_one_very_long_row_among_short_ones(rng, parts):
    """Positions beyond 32,767, where 16 bits end, and one row that both cores share."""
    decode = [(3, True), (33_100, True), (70, True)]
    batch = make_batch(rng, decode, [], heads=(5, 1), page=128, H=128)
    check(batch, serve(batch, "on_wait", parts=parts, block=2048, races=False), TOLERANCE)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_chunk_of_a_prompt_beyond_32_767(rng):
    batch = make_batch(rng, [(5, True)], [(33_000, 40)], heads=(5, 1), page=128, H=128, max_query=40)
    check(batch, serve(batch, "on_wait", block=2048, races=False), TOLERANCE)


@pytest.mark.slow
def test_products_in_float8(rng):
    """Queries and probabilities in two float8 terms: 2^-8 of each, as in bfloat16, and of outputs of size 4."""
    decode, chunks = BATCHES[0]
    batch = make_batch(rng, decode, chunks, heads=(5, 1), page=128, H=128, max_query=64, dtype="float8_e4m3fn", width=3)
    check(batch, serve(batch, "on_wait", float8=True), 4 * 2**-8)
    assert not races_found()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_bfloat16_queries(rng):
    batch = make_batch(rng, *BATCHES[0], heads=(5, 1), page=128, H=128, max_query=64, dtype="bfloat16", width=3)
    narrow = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
    run = kernel("on_wait", batch.decode_rows, batch.max_query)
    out = run(narrow(batch.q), narrow(batch.k), narrow(batch.v), batch.layer, batch.rows).out
    for begin, want, _ in batch.expected:
        np.testing.assert_allclose(np.asarray(out, np.float32)[begin : begin + len(want)], want, atol=NARROW)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    decode=st.lists(
        st.tuples(st.sampled_from([0, 1, 31, 32, 63, 64, 127, 128, 129, 255, 256, 300]), st.booleans()),
        min_size=4,
        max_size=4,
    ),
    chunks=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 64)), min_size=2, max_size=2),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_raggedness(decode, chunks, seed):
    chunks = [(before if new else 0, new) for before, new in chunks]
    rng = np.random.default_rng(seed)
    batch = make_batch(rng, decode, chunks, heads=(5, 1), page=64, H=128, max_query=64, width=6)
    check(batch, serve(batch, "on_wait"), TOLERANCE)
    assert not races_found()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_narrow_heads_in_a_wide_cache(rng):
    """Heads of 64 lie in a cache 128 wide."""
    batch = make_batch(rng, *BATCHES[0], heads=(7, 1), page=128, H=64, max_query=64, width=3)
    wide = batch.layer._replace(kv=jnp.pad(batch.layer.kv, [(0, 0)] * 4 + [(0, 64)]))
    run = kernel("on_wait", batch.decode_rows, batch.max_query)
    scale_up = 128**0.25 / 64**0.25  # the kernel here divides scores by sqrt(128), they should be by sqrt(64)
    out = run(batch.q * scale_up**2, batch.k, batch.v, wide, batch.rows).out
    for begin, want, _ in batch.expected:
        np.testing.assert_allclose(out[begin : begin + len(want)], want, atol=TOLERANCE)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=5, max_size=5),
    kv_heads=st.sampled_from([1, 3]),
    parts=st.sampled_from([1, 2]),
)
def test_items_are_dealt_out_once_and_evenly(lengths, kv_heads, parts):
    length = jnp.asarray(lengths, jnp.int32)
    n = len(lengths)
    make = jax.jit(make_tiles, static_argnames=("block", "kv_heads", "parts"))
    tiles = make(jnp.arange(n), length - 1, length, block=128, kv_heads=kv_heads, parts=parts)
    blocks = [-(-x // 128) for x in lengths]
    items = [(h, t) for h in range(kv_heads) for t in range(n) for _ in range(blocks[t])]
    bounds = [int(x) for x in tiles.bounds]
    assert bounds[0] == 0 and bounds[-1] == len(items)
    assert max(np.diff(bounds)) - min(np.diff(bounds)) <= 1
    for part in range(parts):
        if bounds[part] < bounds[part + 1]:
            head, tile = items[bounds[part]]
            assert int(tiles.begins[part]) == head * n + tile
    live = [t for t in range(n) if lengths[t]]
    for t in range(n):
        assert int(tiles.following[t]) == min((x for x in live if x > t), default=n)
    assert int(tiles.following[n]) == min(live, default=n)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    runs=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 40)), min_size=3, max_size=3),
    gap=st.integers(0, 5),
    aligned=st.booleans(),
)
def test_pieces_hold_each_token_of_a_run_once(runs, gap, aligned):
    size, tokens = 16, 135
    begin = np.cumsum([0] + [new + gap for _, new in runs[:-1]])
    end, position = begin + [new for _, new in runs], np.array([before for before, _ in runs])
    cut = jax.jit(cut_runs, static_argnames=("tokens", "size", "aligned"))
    pieces = cut(*(jnp.asarray(x) for x in (begin, end, position)), tokens=tokens, size=size, aligned=aligned)
    inside, token = np.asarray(pieces.inside), np.asarray(pieces.token)
    row = np.broadcast_to(np.asarray(pieces.row)[:, None], inside.shape)
    want = [(b, t) for b in range(len(runs)) for t in range(begin[b], end[b])]
    assert sorted(zip(row[inside], token[inside], strict=True)) == want
    place = np.asarray(pieces.position)[:, None] + np.arange(size)
    np.testing.assert_array_equal(place[inside], (position[row] + token - begin[row])[inside])
    assert not aligned or (np.asarray(pieces.position)[np.asarray(pieces.live)] % size == 0).all()


CHIP = {"groups": 5, "head_dim": 128, "dtype": "bfloat16", "rows": 256, "tokens": 1280, "table_width": 1024}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("TPU v5 lite", {"page": 48}, "a power of 2 from 32 on"),
        ("TPU v6 lite", {"page": 64, "dtype": "int8"}, "a power of 2 from 128 on"),
        ("TPU v4", {"page": 16384}, r"needs .* MiB of VMEM, and TPU v4 has 15: use pages of 2048"),
        ("TPU v5 lite", {"page": 128, "rows": 100_000}, r"KiB of scalar memory.*at most 31743 rows"),
        ("TPU v9", {"page": 128}, "no tile sizes are known for 'TPU v9'"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(kind, change, message):
    with pytest.raises(ValueError, match=message):
        paged_sizes(kind, **{**CHIP, **change})


def test_blocks_hold_whole_registers_however_short_the_rows():
    """The engine's smallest table holds a page or two."""
    for page, width in ((32, 1), (32, 2), (64, 1), (128, 1)):
        for sizes in paged_sizes("TPU v5 lite", **{**CHIP, "page": page, "table_width": width}):
            assert sizes.block_kv % 128 == 0


@pytest.mark.slow
def test_a_table_narrower_than_a_block(rng):
    batch = make_batch(rng, [(5, True), (63, True)], [(0, 20)], heads=(5, 1), page=64, H=128, width=1)
    check(batch, serve(batch, "on_wait", block=128), TOLERANCE)


def test_advice_is_good():
    paged_sizes("TPU v4", **CHIP, page=2048)
    assert smem_bytes(31_743, 1024) <= 1 << 20 < smem_bytes(31_744, 1024)


def test_a_named_implementation_does_not_fall_back(rng):
    batch = make_batch(rng, [(3, True)], [], heads=(5, 1), page=32, H=128)
    call = functools.partial(
        paged_attention, batch.q, batch.k, batch.v, batch.layer, batch.rows, scale=1.0, decode_rows=1, max_query=0
    )
    with pytest.raises(ValueError, match="for TPU, not for cpu"):
        call(implementation=Implementation.PALLAS)
    with pytest.raises(ValueError, match="no paged attention"):
        call(implementation=Implementation.CUDNN, target=Target("gpu", "NVIDIA H100"))
