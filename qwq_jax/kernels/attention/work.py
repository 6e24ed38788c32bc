"""What the paged kernels of all layers share: where a ragged batch has its tiles, units and pages, found once a step.

Were it left to each layer, the compiler would have to see that they all do the same. For tpu7x libtpu does not.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwq_jax.kernels.attention.flash import LANES
from qwq_jax.kernels.attention.pages import PagedLayer, RaggedRows, check_page, unit_tokens
from qwq_jax.kernels.attention.stream import PagedSizes
from qwq_jax.kernels.attention.tiles import Pieces, Tiles, cut_runs, make_tiles

PIECES = 16  # units that one grid step appends


class DecodeWork(NamedTuple):
    """Rows of one token each.

    Attributes:
        tiles: One a row.
        page: `[n]` int32, where the token of each goes.
    """

    tiles: Tiles
    page: jax.Array


class AppendWork(NamedTuple):
    """Units of pages that chunks of prompts fill, in part or wholly; a multiple of `PIECES` of them.

    Attributes:
        token: `[n, unit]` int32, the chunks' token for each place; meaningless where none is written.
        page: `[n]` int32.
        unit: `[n]` int32, within the page.
        low: `[n]` int32, the first place that is written.
        high: `[n]` int32, the place after the last.
    """

    token: jax.Array
    page: jax.Array
    unit: jax.Array
    low: jax.Array
    high: jax.Array


class ChunkWork(NamedTuple):
    """Chunks of prompts.

    Attributes:
        append: How they go into the cache.
        tiles: Of `size` tokens each.
        token: `[n, size]` int32, the chunks' token at each place of each tile; meaningless where there is none.
        tile: `[Tp]` int32, where each of the chunks' tokens is: in this tile,
        place: `[Tp]` int32, and at this place of it.
    """

    append: AppendWork
    tiles: Tiles
    token: jax.Array
    tile: jax.Array
    place: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedWork:
    """What the kernels do for a batch, whatever the layer. All arrays are those of one replica.

    Attributes:
        kv_heads: Local kv heads of the cache; static, as the sizes are.
        decode_sizes: What the rows of one token are served with.
        chunk_sizes: What chunks of prompts are served with.
        table: `[B, 1, W']` int32, the page table as rows that can be copied one by one; W' is a multiple of 128.
        decode: None where no row decodes.
        chunks: None where there are none.
    """

    kv_heads: int = field(metadata={"static": True})
    decode_sizes: PagedSizes = field(metadata={"static": True})
    chunk_sizes: PagedSizes = field(metadata={"static": True})
    table: jax.Array
    decode: DecodeWork | None
    chunks: ChunkWork | None

    def is_of(self, tokens: int, layer: PagedLayer, *, decode_rows: int, max_query: int) -> bool:
        """Whether it was made for so many flat tokens, such rows, and such a cache."""
        decoded = 0 if self.decode is None else self.decode.page.shape[0]
        known = self.kv_heads == layer.kv.shape[0] and decoded == decode_rows
        if self.chunks is None:
            return known and not max_query and tokens == decoded
        places = self.chunks.append.token.shape[1], self.chunks.tile.shape[0]
        return known and max_query > 0 and places == (unit_tokens(layer.kv.dtype), tokens - decoded)


def find_work(
    rows: RaggedRows,
    layer: PagedLayer,
    *,
    tokens: int,
    decode_rows: int,
    max_query: int,
    decode: PagedSizes,
    prefill: PagedSizes,
) -> RaggedWork:
    """What the kernels shall do for a batch: integers only, of a few times its tokens.

    Args:
        rows: The batch.
        layer: Any layer of the cache, or its description.
        tokens: Flat tokens of the batch.
        decode_rows: Rows of one token each.
        max_query: 0 where there are no other rows.
        decode: Tiles for those rows.
        prefill: Tiles for the others.

    Returns:
        The work, for each layer of such a cache.

    Raises:
        ValueError: The kernels cannot serve such pages.
    """
    _check_pages(layer, decode)
    _check_pages(layer, prefill)
    K, _, _, page, _ = layer.kv.shape
    W = rows.page_table.shape[1]
    table = jnp.pad(rows.page_table, ((0, 0), (0, -W % LANES)))[:, None]
    one = several = None
    if decode_rows:
        row, length = jnp.arange(decode_rows, dtype=jnp.int32), rows.kv_length[:decode_rows]
        tiles = make_tiles(row, length - 1, length, block=decode.block_kv, kv_heads=K, parts=decode.parts)
        one = DecodeWork(tiles, rows.slots[:decode_rows] // page)
    if max_query:
        runs = _chunk_runs(rows, decode_rows)
        append = _append_work(runs, rows.page_table[decode_rows:], tokens - decode_rows, page, layer.kv.dtype)
        several = ChunkWork(append, *_chunk_tiles(runs, decode_rows, tokens - decode_rows, K, prefill))
    return RaggedWork(K, decode, prefill, table, one, several)


def _check_pages(layer: PagedLayer, sizes: PagedSizes) -> None:
    """Raises ValueError, with what would work, if the kernels cannot serve this pool."""
    *_, page, H = layer.kv.shape
    check_page(page, layer.kv.dtype)
    if H % LANES:
        raise ValueError(f"the paged TPU kernel needs a cache with heads a multiple of {LANES} wide, not {H}")
    if sizes.block_kv % page or sizes.block_kv % LANES:
        raise ValueError(f"blocks of {sizes.block_kv} are no multiple of {LANES} and of pages of {page} tokens")


def _chunk_runs(rows: RaggedRows, decode_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First and last token, counted from `decode_rows`, and first position of the rows that are chunks of prompts."""
    length = rows.kv_length[decode_rows:]
    begin, end = (x - decode_rows for x in (rows.query_start[decode_rows:-1], rows.query_start[decode_rows + 1 :]))
    end = jnp.where(length > 0, end, begin)
    return begin, end, length - (end - begin)


def _append_work(
    runs: tuple[jax.Array, jax.Array, jax.Array], table: jax.Array, tokens: int, page: int, dtype: Any
) -> AppendWork:
    unit = unit_tokens(dtype)
    pieces = cut_runs(*runs, tokens=tokens, size=unit, aligned=True)
    at, page_units = pieces.position // unit, page // unit
    pages = jnp.take_along_axis(table[pieces.row], (at // page_units)[:, None], axis=1, mode="clip")[:, 0]
    low = jnp.argmax(pieces.inside, axis=1)
    found = (pieces.token, pages, at % page_units, low, low + _held(pieces))
    # What is added has nothing to write.
    fill = -pieces.row.shape[0] % PIECES
    return AppendWork(*(jnp.pad(x.astype(jnp.int32), ((0, fill), *[(0, 0)] * (x.ndim - 1))) for x in found))


def _chunk_tiles(
    runs: tuple[jax.Array, jax.Array, jax.Array], decode_rows: int, tokens: int, kv_heads: int, sizes: PagedSizes
) -> tuple[Tiles, jax.Array, jax.Array, jax.Array]:
    size = sizes.block_q
    pieces = cut_runs(*runs, tokens=tokens, size=size, aligned=False)
    n = pieces.row.shape[0]
    length = jnp.where(pieces.live, pieces.position + _held(pieces), 0)
    tiles = make_tiles(
        decode_rows + pieces.row, pieces.position, length, block=sizes.block_kv, kv_heads=kv_heads, parts=sizes.parts
    )
    target = jnp.where(pieces.inside, pieces.token, tokens)  # places without a token go beyond the last one
    where = jnp.zeros(tokens + 1, jnp.int32).at[target].set(jnp.arange(n * size, dtype=jnp.int32).reshape(n, size))
    return tiles, pieces.token, where[:tokens] // size, where[:tokens] % size


def _held(pieces: Pieces) -> jax.Array:
    """Tokens of each piece, `[n]` int32."""
    return pieces.inside.sum(1, dtype=jnp.int32)
