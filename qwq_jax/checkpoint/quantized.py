"""Quantised projections on disk: what becomes of a Hugging Face matrix, and back.

Hugging Face's matrices are `[out, in]`, with the contraction last: a row is an output channel, and groups of 4 bits are
neighbours in it. Two 4-bit values share a byte, neighbours of the parameter's last dimension, which are neighbouring
rows here. Scales are parameters of their own, `PATH_scale`.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qwq_jax.checkpoint.names import NamePair
from qwq_jax.model.quantize import SCALE, dequantize_host, pack, quantize_host, unpack_host
from qwq_jax.model.spec import ArraySpec


def stored_spec(spec: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
    """The parameters as they lie on disk: 4-bit ones as uint8, `[..., n]` as `[..., n/2]`."""
    return {path: _packed(array) if array.dtype == "int4" else array for path, array in spec.items()}


def _packed(array: ArraySpec) -> ArraySpec:
    return ArraySpec((*array.shape[:-1], array.shape[-1] // 2), np.dtype(np.uint8), array.axes)


@dataclass(frozen=True)
class QuantizedRow:
    """How one Hugging Face matrix becomes a quantised parameter and its scales.

    Attributes:
        kernel: From the matrix `[out, in]` of int8, or `[out/2, in]` of uint8, to the stored parameter.
        scale: From the scales `[out, in/group]` to theirs.
        bits: 8 or 4.
        group: Neighbours in a row that share a scale; ``None`` for a whole row.

    Example:
        o_proj `[D, N*H]` in 4 bits: kernel factors `(D/2, N, H/g, g)` permuted to `[N, H/g, g, D/2]`.
    """

    kernel: NamePair
    scale: NamePair
    bits: int
    group: int | None

    def quantize(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stored matrix and scales of a Hugging Face matrix of any float dtype."""
        q, scale = quantize_host(matrix, self.bits, self.group)
        return (pack(q) if self.bits == 4 else q), scale

    def dequantize(self, stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The float32 matrix `[out, in]`."""
        q = stored if self.bits == 8 else unpack_host(stored)
        return dequantize_host(q, scale)


def quantized_row(row: NamePair, spec: Mapping[str, ArraySpec]) -> QuantizedRow | None:
    """How this row's matrix is quantised in a checkpoint of this (stored) spec; ``None`` if it is not."""
    if row.path + SCALE not in spec:
        return None
    out, width = row.source_shape
    outputs = next(k for k in range(1, len(row.factors)) if math.prod(row.factors[:k]) == out)
    scale = replace(row, path=row.path + SCALE)
    array = spec[row.path]
    if array.dtype == np.int8:
        order = tuple(axis for axis in row.order if axis < outputs)
        scale = replace(scale, source_shape=(out, 1), factors=row.factors[:outputs], order=order)
        return QuantizedRow(row, scale, 8, None)
    last = len(row.factors) - 1
    group = array.shape[row.order.index(last) + 1]
    scale = replace(scale, source_shape=(out, width // group), factors=(*row.factors[:-1], row.factors[-1] // group))
    halved = (*row.factors[: outputs - 1], row.factors[outputs - 1] // 2, *row.factors[outputs:-1])
    order = tuple(new for axis in row.order for new in ((last, last + 1) if axis == last else (axis,)))
    factors = (*halved, row.factors[-1] // group, group)
    kernel = replace(row, source_shape=(out // 2, width), factors=factors, order=order)
    return QuantizedRow(kernel, scale, 4, group)


def digest(matrix: np.ndarray) -> str:
    """Hash of a stored matrix or its scales, in the layout of the Hugging Face matrix."""
    return hashlib.sha256(np.ascontiguousarray(matrix).view(np.uint8).data).hexdigest()
