"""The paged cache of one layer: its layout, its 8-bit forms, and where the tokens of a ragged batch go in it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Largest magnitude that each 8-bit type holds.
LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
KEY, VALUE = 0, 1
SCALE_RUN = 128


class PagedLayer(NamedTuple):
    """The cache of one layer; a page of one kv head is one contiguous block of memory.

    Attributes:
        kv: `[K, P, 2, page, H]`, rotated keys at KEY and values at VALUE.
        scales: `[K, P, page / run, 2, run]` float32 with runs of 128 tokens (or a whole smaller page): what each
            token's 8-bit key or value is multiplied by; None for wider types.
    """

    kv: jax.Array
    scales: jax.Array | None = None


class RaggedRows(NamedTuple):
    """Which tokens of a flat batch belong to which row, and where each row's cache lies.

    Row `b` keeps its token at position `s` in page `page_table[b, s // page]`, slot `s % page`.

    Attributes:
        page_table: `[B, W]` int32, page ids of each row in order; entries past a row's length may be any page id.
        kv_length: `[B]` int32, tokens of the row in the cache once this step's tokens are in; 0 marks an empty row.
        query_start: `[B+1]` int32, first flat token of each row; the tokens of row b are its last ones.
        slots: `[T]` int32 from `token_slots`.
    """

    page_table: jax.Array
    kv_length: jax.Array
    query_start: jax.Array
    slots: jax.Array


class PagedOutput(NamedTuple):
    """What attention over a paged cache gives.

    Attributes:
        out: `[T, N, H]` in the dtype of the queries; zero, or arbitrary but finite, for tokens that belong to no row.
        lse: `[T, N]` float32, natural logarithm of the softmax's denominator; arbitrary for such tokens.
        layer: The cache with the new keys and values.
    """

    out: jax.Array
    lse: jax.Array
    layer: PagedLayer


def token_slots(
    page_table: jax.Array,
    kv_length: jax.Array,
    query_start: jax.Array,
    positions: jax.Array,
    *,
    page_size: int,
    pages: int,
) -> jax.Array:
    """Flat cache slot `page * page_size + offset` of every token of a flat batch.

    Args:
        page_table: `[B, W]` int32.
        kv_length: `[B]` int32; tokens of rows of length 0 get no slot.
        query_start: `[B+1]` int32.
        positions: `[T]` int32, position of each token in its row.
        page_size: Tokens a page.
        pages: Pages of the pool.

    Returns:
        `[T]` int32; tokens that belong to no row get `pages * page_size`, which lies outside the pool.
    """
    flat = jnp.arange(positions.shape[0])
    row = jnp.clip(jnp.searchsorted(query_start, flat, side="right") - 1, 0, kv_length.shape[0] - 1)
    page = jnp.take_along_axis(page_table[row], (positions // page_size)[:, None], axis=1, mode="clip")[:, 0]
    held = (flat < query_start[-1]) & (positions < kv_length[row])
    return jnp.where(held, page * page_size + positions % page_size, pages * page_size).astype(jnp.int32)


def is_quantized(dtype: Any) -> bool:
    """Whether a cache of this dtype has scales."""
    return jnp.dtype(dtype).name in LIMITS


def unit_tokens(dtype: Any) -> int:
    """Tokens of the least part of a page that the TPU kernel copies: whole tiles of memory, whole runs of scales."""
    return SCALE_RUN if is_quantized(dtype) else 32


def check_page(page: int, dtype: Any) -> None:
    """Raises ValueError, with what would work, if the TPU kernels cannot serve pages of this many tokens."""
    unit = unit_tokens(dtype)
    if page % unit or page & (page - 1):
        raise ValueError(
            f"pages of {page} tokens do not fit the TPU kernel for a {jnp.dtype(dtype)} cache: set page_size to "
            f"a power of 2 from {unit} on"
        )


def scales_shape(kv_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a pool `[..., P, 2, page, H]`."""
    *outer, two, page, _ = kv_shape
    run = min(page, SCALE_RUN)
    if page % run:
        raise ValueError(f"pages of {page} tokens cannot hold 8-bit values: use {SCALE_RUN}, a multiple, or fewer")
    return (*outer, page // run, two, run)


def to_cache(new: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Casts `[..., H]` to the cache's dtype; an 8-bit one with one scale a vector, its largest magnitude / LIMITS.

    Returns:
        `[..., H]` in that dtype, and float32 scales `[...]` or None.
    """
    dtype = jnp.dtype(dtype)
    if not is_quantized(dtype):
        return new.astype(dtype), None
    limit = LIMITS[dtype.name]
    wide = new.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    scales = jnp.where(largest > 0, largest / limit, 1.0)
    scaled = jnp.clip(wide / scales[..., None], -limit, limit)
    return (jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype), scales


def append_to_pages(layer: PagedLayer, k: jax.Array, v: jax.Array, slots: jax.Array) -> PagedLayer:
    """Writes `k` and `v` `[T, K, H]` at `slots [T]`; slots outside the pool are dropped."""
    page_size = layer.kv.shape[3]
    page, offset = slots // page_size, slots % page_size
    values, scales = to_cache(jnp.stack([k, v], axis=2), layer.kv.dtype)  # [T, K, 2, H]
    kv = layer.kv.at[:, page, :, offset].set(values, mode="drop")
    if layer.scales is None or scales is None:
        return PagedLayer(kv)
    run = layer.scales.shape[-1]
    return PagedLayer(kv, layer.scales.at[:, page, offset // run, :, offset % run].set(scales, mode="drop"))


def widen(x: jax.Array, width: int) -> jax.Array:
    """`[..., H]` filled up with zeros to the width of a pool's heads; neither scores nor sums change by them."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) if width > x.shape[-1] else x
