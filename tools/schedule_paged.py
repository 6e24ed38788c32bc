"""Cases of paged attention for `kernel_schedule`: 16 rows that decode a token each, all with a context of T tokens.

5 query heads of 128 over one kv head, bf16, pages of 128 tokens. The kernels fetch pages themselves, so what counts is
the bundles of the body of the inner loop (one block of keys of one row) against the time its bytes take.

A new kernel: a function `Shape -> Case` as in `schedule_cases`, entered in PAGED.
"""

from collections.abc import Callable

import jax.numpy as jnp
from schedule_cases import BF16, HEADS, WIDTH, Case, Kernel, Part, Shape, array, on_first_core

ROWS, PAGE = 16, 128


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


PAGED: dict[tuple[str, str], Callable[[Shape], Case]] = {
    ("decode", "ragged"): _ragged,
    # Ours belongs here: ("decode", "ours").
}
