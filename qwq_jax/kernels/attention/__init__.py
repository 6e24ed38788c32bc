"""Attention over dense rows (`attention`) and over a paged cache (`paged_attention`): the kernels' one entry."""

from qwq_jax.kernels.attention.dispatch import (
    CPU,
    Implementation,
    QueryShard,
    Target,
    attention,
    attention_with_lse,
    paged_attention,
    prepare_rows,
)
from qwq_jax.kernels.attention.flash import LANES
from qwq_jax.kernels.attention.native import load as load_native
from qwq_jax.kernels.attention.native import serves as native_serves
from qwq_jax.kernels.attention.pages import (
    PagedLayer,
    PagedOutput,
    RaggedRows,
    check_page,
    is_quantized,
    scales_shape,
    token_slots,
)
from qwq_jax.kernels.attention.steps import PADDING

__all__ = [
    "CPU",
    "LANES",
    "Implementation",
    "PagedLayer",
    "PADDING",
    "PagedOutput",
    "QueryShard",
    "RaggedRows",
    "Target",
    "attention",
    "attention_with_lse",
    "check_page",
    "is_quantized",
    "load_native",
    "native_serves",
    "paged_attention",
    "prepare_rows",
    "scales_shape",
    "token_slots",
]
