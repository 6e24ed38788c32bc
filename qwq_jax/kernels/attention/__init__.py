"""Attention over dense rows (`attention`) and over a paged cache (`paged_attention`).

The page layout, one pool a layer: `k` and `v` are `[K, P, page, H]`, so that a page of one kv head is one contiguous
`[page, H]` block. Row `b` of a ragged batch keeps its token at position `s` in page `page_table[b, s // page]`, slot
`s % page`.
"""

from qwq_jax.kernels.attention.reference import (
    PagedLayer,
    RaggedRows,
    append_to_pages,
    attention,
    paged_attention,
    token_slots,
)

__all__ = ["PagedLayer", "RaggedRows", "append_to_pages", "attention", "paged_attention", "token_slots"]
