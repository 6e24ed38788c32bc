"""Cases of paged attention for `kernel_schedule`: 16 rows that decode a token each, all with a context of T tokens.

5 query heads of 128 over one kv head; pages of 128 tokens in bf16 for jax's, others and 8-bit caches too for ours. The
kernels fetch pages themselves, so what counts is the bundles of the loop's body against the time its bytes take.

A new kernel: a function `Shape -> Case` as in `schedule_cases`, entered in PAGED.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from schedule_cases import BF16, HEADS, WIDTH, Case, Kernel, Part, Shape, array, on_first_core

from qwq_jax.kernels.attention import PagedLayer, PagedOutput, RaggedRows, is_quantized, scales_shape
from qwq_jax.kernels.attention.decode import SHORT
from qwq_jax.kernels.attention.paged_blocks import paged_sizes
from qwq_jax.kernels.attention.pages import unit_tokens
from qwq_jax.kernels.attention.ragged import ragged_attention
from qwq_jax.kernels.attention.stream import PagedSizes
from qwq_jax.kernels.attention.work import find_work

KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}

ROWS, PAGE = 16, 128
POOL = 1 << 21  # tokens of the pool: one that fits in VMEM, XLA would put there


def ideal_decode(tokens: int) -> int:
    """Bytes of all keys and values once, of the queries and the results."""
    return ROWS * (tokens * 2 + 2 * HEADS) * WIDTH * BF16


def _ragged(shape: Shape) -> Case:
    """Jax's ragged paged attention; sizes are pages and queries a block."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    pages, queries = shape.sizes
    row_pages = shape.tokens // PAGE
    blocks = -(-row_pages // pages)
    grid = -(-ROWS // queries)
    total = ROWS * blocks
    block = Part("key block", total, (Part("fetch the next", total - 1),), loop=True)
    # Loops whose trips are not known are entered through a test.
    row = Part("row", ROWS, (Part("any key block", ROWS, (block,)),), loop=True)
    step = (Part("any row", grid, (row,)),)
    parts = step if grid == 1 else (Part("grid", grid + 2, (Part("step", grid, step),), loop=True),)
    moved = total * pages * PAGE * 2 * WIDTH * BF16
    return Case(
        lambda q, kv, lens, table, starts, count: ragged_paged_attention(
            q,
            kv,
            lens,
            table,
            starts,
            count,
            num_kv_pages_per_block=pages,
            num_queries_per_block=queries,
            vmem_limit_bytes=(12 if shape.chip == "v4" else 48) << 20,
        ),
        (
            array(ROWS, HEADS, WIDTH),
            array(ROWS * row_pages, PAGE, 2, WIDTH),
            array(ROWS, dtype=jnp.int32),
            array(ROWS, row_pages, dtype=jnp.int32),
            array(ROWS + 1, dtype=jnp.int32),
            array(1, dtype=jnp.int32),
        ),
        (
            Kernel(
                "ragged_paged_attention_kernel",
                on_first_core(shape, parts),
                {"q, out": 2 * ROWS * HEADS * WIDTH * BF16, "pages": moved},
            ),
        ),
        ideal_decode(shape.tokens),
    )


def _ours(dtype: str, shape: Shape) -> Case:
    """Our decode kernel; the size is the tokens a page. Every core that shares the call has an even part of it."""
    page, width = shape.sizes[0], shape.tokens // shape.sizes[0]
    decode, prefill = paged_sizes(
        KINDS[shape.chip],
        groups=HEADS,
        head_dim=WIDTH,
        page=page,
        dtype=dtype,
        rows=ROWS,
        tokens=ROWS,
        table_width=width,
    )
    units = decode.block_kv // unit_tokens(dtype)
    trips = ROWS * -(-shape.tokens // decode.block_kv)
    full, last = trips - (decode.depth - 1) * decode.parts, ROWS
    parts = _our_parts(shape.chip, decode, units, trips, full, last)
    kv = (1, POOL // page, 2, page, WIDTH)
    pool: Any = array(*kv, dtype=dtype)
    scales: Any = array(*scales_shape(kv), dtype=jnp.float32) if is_quantized(dtype) else None
    token = WIDTH * jnp.dtype(dtype).itemsize + 4 * is_quantized(dtype)
    numbers: list[Any] = [array(*shape, dtype=jnp.int32) for shape in ((ROWS, width), (ROWS,), (ROWS + 1,), (ROWS,))]

    def step(q: jax.Array, k: jax.Array, v: jax.Array, layer: Any, rows: Any) -> PagedOutput:
        work = find_work(rows, layer, tokens=ROWS, decode_rows=ROWS, max_query=0, decode=decode, prefill=prefill)
        return ragged_attention(q, k, v, layer, work, scale=WIDTH**-0.5)

    queries, sums = ROWS * 8 * WIDTH * BF16, decode.parts * ROWS * 8 * (WIDTH + 2 * 128) * 4
    moved = {"q": queries, "sums": sums, "pages": ROWS * shape.tokens * 2 * token, "new": ROWS * 4 * 32 * WIDTH}
    ideal = ROWS * 2 * (shape.tokens * WIDTH * jnp.dtype(dtype).itemsize + HEADS * WIDTH * BF16)
    one = (array(ROWS, 1, WIDTH), array(ROWS, 1, WIDTH))
    arguments = (array(ROWS, HEADS, WIDTH), *one, PagedLayer(pool, scales), RaggedRows(*numbers))
    return Case(step, arguments, (Kernel("paged_decode", parts, moved),), ideal)


def _our_parts(chip: str, sizes: PagedSizes, units: int, trips: int, full: int, last: int) -> tuple[Part, ...]:
    """Regions of `decode_kernel` in the order of the text, for rows of whole blocks."""
    cores, ahead = sizes.parts, (sizes.depth - 1) * sizes.parts

    def fetch(runs: int) -> tuple[Part, ...]:
        return (Part("copy a full block", runs, optional=True), Part("copy a part", 0, opaque=True))

    def move(runs: int) -> Part:
        rows = Part("rows on the way", runs, (Part("row", runs, loop=True),))
        return Part("next row", runs, (rows,))

    begin = Part(
        "begin",
        cores,
        (
            Part("zero the buffers", cores * sizes.depth * units // math.gcd(units, 16), loop=True),
            Part(
                "fill the pipeline",
                ahead,
                (Part("any", ahead, (*fetch(ahead), Part("next row", 0, opaque=True))),),
                loop=True,
                trips=(sizes.depth - 1,),
            ),
        ),
    )
    short = () if sizes.block_kv <= SHORT else (Part("short trip", 0, opaque=True),)
    trip = Part(
        "trip",
        trips + cores,
        (
            Part("wait", trips, (Part("append", last),)),
            Part("trip, copies hidden", full),
            Part("trip", trips + cores - full),
            *short,
            Part("other copies", 0, opaque=True),
            Part("advance", full, (move(last),)),
        ),
        loop=True,
    )
    drain = tuple(Part(f"unused row {i}", cores) for i in range(1, 7))
    body = (begin, Part("any block", cores, (Part("any trip", cores, (trip,)),)), Part("end", cores, drain))
    if cores == 1 or chip == "v5p":  # whose cores each run a program of their own
        return body
    return (Part("grid", cores + 2, (Part("step", cores, body),), loop=True, trips=(cores + 2,)),)


PAGED: dict[tuple[str, str], Callable[[Shape], Case]] = {
    ("decode", "ragged"): _ragged,
    ("decode", "ours"): functools.partial(_ours, "bfloat16"),
    ("decode", "ours_int8"): functools.partial(_ours, "int8"),
    ("decode", "ours_float8"): functools.partial(_ours, "float8_e4m3fn"),
}
