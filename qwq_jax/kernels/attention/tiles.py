"""What the paged kernel works through: query tiles, each with a row's keys in blocks, shared out to the cores.

A tile is a few consecutive query tokens of one row with all query heads of a kv head. One token a tile serves decode;
tiles of many serve chunks of prompts. All of it is int32 bookkeeping, the same for every layer of a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """n tiles, and the work on them: item `start[t] + j` of a kv head is block j of tile t.

    Attributes:
        row: `[n]` row of the page table.
        first: `[n]` position of the first query.
        length: `[n]` keys that any query of the tile sees, from position 0 on; 0 for an empty tile.
        start: `[n+1]` blocks of the tiles before.
        following: `[n+1]` the next tile that is not empty; the last entry is the first such tile of all.
        bounds: `[parts+1]` items of each part, over all kv heads, which come one after another.
        begins: `[parts]` tile, counted over all kv heads, of each part's first item.
    """

    row: jax.Array
    first: jax.Array
    length: jax.Array
    start: jax.Array
    following: jax.Array
    bounds: jax.Array
    begins: jax.Array


def make_tiles(row: jax.Array, first: jax.Array, length: jax.Array, *, block: int, kv_heads: int, parts: int) -> Tiles:
    """Counts the blocks of each tile and deals them out evenly, so that one long row keeps every core busy.

    Args:
        row: `[n]` int32.
        first: `[n]` int32.
        length: `[n]` int32.
        block: Keys a block.
        kv_heads: Local kv heads.
        parts: Cores.
    """
    n = row.shape[0]
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(-(-length // block), dtype=jnp.int32)])
    index = jnp.arange(n, dtype=jnp.int32)
    # From the back: the nearest tile after this one that is not empty.
    nearest = jax.lax.cummin(jnp.where(length > 0, index, n), axis=0, reverse=True)
    following = jnp.concatenate([nearest[1:], jnp.full(1, n, jnp.int32), nearest[:1]])
    total = kv_heads * start[n]
    bounds = jnp.asarray([total // parts * p + total % parts * p // parts for p in range(parts)] + [total], jnp.int32)
    per_head = jnp.maximum(start[n], 1)
    head, item = bounds[:-1] // per_head, bounds[:-1] % per_head
    begins = head * n + jnp.searchsorted(start, item, side="right").astype(jnp.int32) - 1
    to_int = lambda x: x.astype(jnp.int32)  # noqa: E731
    return Tiles(*map(to_int, (row, first, length, start, following, bounds, begins)))


def merge_parts(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joins what parts made of the same queries over keys of their own: a part's share is that of the denominator.

    Args:
        out: `[parts, K, n, R, H]`.
        lse: `[parts, K, n, R]`.
    """
    if out.shape[0] == 1:
        return out[0], lse[0]
    return jnp.einsum("pknr,pknrh->knrh", jax.nn.softmax(lse, axis=0), out), jax.nn.logsumexp(lse, axis=0)


class Pieces(NamedTuple):
    """How runs of tokens, one a row, are cut into pieces of `size` for tiles or for parts of a page.

    Attributes:
        row: `[n]` row of each piece; the last row for pieces that no run needs.
        live: `[n]` bool.
        token: `[n, size]` flat token of each place, clipped; meaningless where `inside` is false.
        position: `[n]` position in its row of the piece's first place.
        inside: `[n, size]` bool, whether the place holds a token of the run.
    """

    row: jax.Array
    live: jax.Array
    token: jax.Array
    position: jax.Array
    inside: jax.Array


def cut_runs(begin: jax.Array, end: jax.Array, position: jax.Array, *, tokens: int, size: int, aligned: bool) -> Pieces:
    """Cuts the runs `begin[b] : end[b]` of a flat batch of `tokens`, whose first token stands at `position[b]`.

    Args:
        begin: `[B]` int32.
        end: `[B]` int32.
        position: `[B]` int32.
        tokens: Static size of the flat batch, a bound on the runs' sum.
        size: Places a piece.
        aligned: Pieces start at positions that are multiples of `size`, else at the run's first token.
    """
    B = begin.shape[0]
    offset = position % size if aligned else jnp.zeros_like(position)
    count = jnp.where(end > begin, -(-(end - begin + offset) // size), 0)
    before = jnp.cumsum(count) - count
    index = jnp.arange(tokens // size + (2 if aligned else 1) * B)
    row = jnp.clip(jnp.searchsorted(before + count, index, side="right"), 0, B - 1)
    shift = (index - before[row]) * size - offset[row]
    token = (begin[row] + shift)[:, None] + jnp.arange(size)
    live = index < before[-1] + count[-1]
    inside = live[:, None] & (token >= begin[row][:, None]) & (token < end[row][:, None])
    return Pieces(row, live, jnp.clip(token, 0, tokens - 1), position[row] + shift, inside)
