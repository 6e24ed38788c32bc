"""What the paged kernels are told to do, against plain Python: every token of every chunk, wherever it stands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_jax.kernels.attention import PagedLayer, RaggedRows, token_slots
from qwq_jax.kernels.attention.stream import PagedSizes
from qwq_jax.kernels.attention.work import find_work

TOKENS, CHUNKS, WIDTH, SIZE = 200, 3, 640, 32
SIZES = {"decode": PagedSizes(1, 256), "prefill": PagedSizes(SIZE, 256)}


@functools.cache
def finder(page, dtype, decode_rows, max_query):
    pool = PagedLayer(jax.ShapeDtypeStruct((2, 1, 2, page, 128), dtype))
    counts = {"tokens": decode_rows + TOKENS * (max_query > 0), "decode_rows": decode_rows, "max_query": max_query}
    return jax.jit(lambda rows: find_work(rows, pool, **counts, **SIZES)), pool, counts


def batch_of(decoded, chunks, page, tokens, rng):
    """Rows of these lengths, whose pages lie in disorder; tokens beyond the chunks belong to none."""
    B = len(decoded) + len(chunks)
    table = rng.permutation(B * WIDTH).reshape(B, WIDTH)
    length = [*decoded, *(before + new if new else 0 for before, new in chunks)]
    start = np.cumsum([0] + [1] * len(decoded) + [new for _, new in chunks])
    position = np.zeros(tokens, np.int32)
    for b, total in enumerate(length):
        count = start[b + 1] - start[b]
        position[start[b] : start[b + 1]] = np.arange(total - count, total)
    table, length, start = (jnp.asarray(x, jnp.int32) for x in (table, length, start))
    slots = token_slots(table, length, start, jnp.asarray(position), page_size=page, pages=B * WIDTH)
    return RaggedRows(table, length, start, slots)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    decoded=st.lists(st.integers(0, 40_000), min_size=2, max_size=2),
    chunks=st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 66)), min_size=CHUNKS, max_size=CHUNKS),
    kind=st.sampled_from([("bfloat16", 64), ("int8", 128), ("int8", 256)]),
    decodes=st.booleans(),
    prefills=st.booleans(),
)
def test_each_token_has_one_place(decoded, chunks, kind, decodes, prefills):
    dtype, page = kind
    decoded, chunks = decoded if decodes else [], chunks if prefills or not decodes else []
    D, unit = len(decoded), 32 if dtype == "bfloat16" else 128
    find, pool, counts = finder(page, dtype, D, 66 if chunks else 0)
    rows = batch_of(decoded, chunks, page, counts["tokens"], np.random.default_rng(0))
    work = jax.device_get(find(rows))
    table = np.asarray(rows.page_table)
    assert (work.decode is None, work.chunks is None) == (not decoded, not chunks)
    assert all(work.decode.page[b] == table[b, (n - 1) // page] for b, n in enumerate(decoded) if n)
    if decoded:
        assert work.decode.tiles.length.tolist() == decoded
    begin = 0
    for b, (before, new) in enumerate(chunks):
        for i in range(new):
            check_token(work.chunks, begin + i, before + i, (D + b, table[D + b]), page, unit)
        begin += new
    if chunks:
        append, tiles = work.chunks.append, work.chunks.tiles
        assert (append.high - append.low).sum() == begin and append.token.shape[0] % 16 == 0
        assert np.count_nonzero(tiles.length) == sum(-(-new // SIZE) for _, new in chunks)
    assert work.is_of(counts["tokens"], pool, decode_rows=D, max_query=counts["max_query"])
    assert not work.is_of(counts["tokens"] + 1, pool, decode_rows=D, max_query=counts["max_query"])
    assert not work.is_of(counts["tokens"], pool, decode_rows=D + 1, max_query=counts["max_query"])


def check_token(chunks, token, position, row, page, unit):
    """That this token goes into its page once, and that its tile is of its row and sees what comes before it."""
    append, (b, pages) = chunks.append, row
    place = np.arange(unit)
    written = (append.token == token) & (place >= append.low[:, None]) & (place < append.high[:, None])
    ((i,), (j,)) = written.nonzero()
    assert append.page[i] == pages[position // page]
    assert append.unit[i] * unit + j == position % page
    tile, within = chunks.tile[token], chunks.place[token]
    assert chunks.token[tile, within] == token and chunks.tiles.row[tile] == b
    assert chunks.tiles.first[tile] + within == position < chunks.tiles.length[tile]


def test_pages_that_the_kernels_cannot_serve_are_refused():
    rows = batch_of([5], [], 48, 1, np.random.default_rng(0))
    layer = PagedLayer(jax.ShapeDtypeStruct((1, WIDTH, 2, 48, 128), "bfloat16"))
    with pytest.raises(ValueError, match="pages of 48 tokens do not fit"):
        find_work(rows, layer, tokens=1, decode_rows=1, max_query=0, **SIZES)
