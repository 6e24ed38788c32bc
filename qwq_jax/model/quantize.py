"""Projections with 8-bit or 4-bit weights: how they are declared, made, multiplied and turned back.

A projection `[contracted..., out...]` keeps its path, and has float32 scales beside it under `PATH_scale`, with the
logical axes of the dimensions they belong to. Down `[F, D]`, axes (mlp, embed), for example:

| weights | kernel                              | scales                                         |
|---------|-------------------------------------|------------------------------------------------|
| int8    | `[F, D]`, (mlp, embed)              | `[D]`, (embed): one an output channel          |
| int4    | `[F/g, g, D]`, (mlp, None, embed)   | `[F/g, D]`, (mlp, embed): one a group of g     |
|         |                                     | neighbours of the last contracted dimension    |

Symmetric: scale = max|w| / 127 (or 7) and q = round(w / scale), ties to even, in float32. A scale multiplies the
product, of a channel or of a group, so that the weight is read as 8 or 4 bits and no wider copy of it exists: a weight
that is scaled on its way into the product becomes bfloat16 in memory as soon as the compiler cannot fuse it. Groups are
a dimension of the array, and never straddle the shards of a tensor axis of up to 8.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwq_jax.config.weights import SMALLEST_GROUP, WeightFormat
from qwq_jax.kernels.attention import Target
from qwq_jax.sharding import Axes

SCALE = "_scale"
LARGEST = {8: 127, 4: 7}
DTYPES = {8: jnp.int8, 4: jnp.int4}
INT8_CHIPS = ("TPU v5", "TPU v6")  # whose matrix units multiply int8, twice as fast as bfloat16
SHARDS = 8  # the widest tensor axis whose shards hold whole groups


@dataclass(frozen=True)
class KernelFormat:
    """How one projection is quantised.

    Attributes:
        bits: 8 or 4.
        summed: The dimensions of the quantised kernel that share a scale.
        group: Of 4 bits, the size of the one dimension in `summed`, cut from the one before it.
    """

    bits: int
    summed: tuple[int, ...]
    group: int | None = None

    def kernel(self, shape: tuple[int, ...], axes: Axes) -> tuple[tuple[int, ...], Axes]:
        """Shape and axes of the quantised kernel."""
        if self.group is None:
            return shape, axes
        at = self.summed[0]
        shape = (*shape[: at - 1], shape[at - 1] // self.group, self.group, *shape[at:])
        return shape, (*axes[:at], None, *axes[at:])

    def scale(self, shape: tuple[int, ...], axes: Axes) -> tuple[tuple[int, ...], Axes]:
        """Shape and axes of its scales."""
        shape, axes = self.kernel(shape, axes)
        kept = [index for index in range(len(shape)) if index not in self.summed]
        return tuple(shape[index] for index in kept), tuple(axes[index] for index in kept)


def kernel_format(weights: WeightFormat, shape: tuple[int, ...], axes: Axes) -> KernelFormat:
    """The format of a projection of this shape.

    Raises:
        ValueError: No group of a useful size fits it.
    """
    if axes[0] == "vocab":  # the head, whose contraction comes last
        return KernelFormat(8, (1,))
    contracted = 2 if axes[0] == "heads" else 1  # what comes from heads sums over their width too
    if weights.group is None:
        return KernelFormat(8, tuple(range(contracted)))
    whole, axis = shape[contracted - 1], axes[contracted - 1]
    # Of the contracted dimensions, a mesh cuts heads, which lie before the last one, and mlp.
    extent = whole // SHARDS if axis == "mlp" and whole % SHARDS == 0 else whole
    group = math.gcd(weights.group, extent)
    if group < SMALLEST_GROUP or shape[-1] % 2:
        raise ValueError(
            f"4-bit weights need groups of {SMALLEST_GROUP} or more that divide every shard of up to {SHARDS}, and an "
            f"even number of outputs, which a projection of {' x '.join(map(str, shape))} does not have; use int8"
        )
    return KernelFormat(4, (contracted,), group)


def check_activations(weights: WeightFormat | None, target: Target) -> None:
    """Refuses 8-bit activations on a TPU that has no int8 products; a CPU computes them, if slowly.

    Raises:
        ValueError: See above.
    """
    if weights is None or weights.activations == 16 or target.platform != "tpu":
        return
    if not target.device_kind.startswith(INT8_CHIPS):
        raise ValueError(
            f"engine.activations=int8 needs a TPU that multiplies int8 (v5e, v5p, v6e), not {target.device_kind}; "
            "8-bit weights alone need none"
        )


def project(
    equation: str, x: jax.Array, kernel: nnx.Param, scale: nnx.Param | None, weights: WeightFormat | None
) -> jax.Array:
    """`einsum(equation, x, kernel)` in the dtype of x, whatever the kernel is stored in.

    Args:
        equation: Such as ``"btd,dnh->btnh"``; the contracted dimensions are the last of x and the first of the kernel.
        x: Activations, `[B, T, ...]`.
        kernel: The weight, quantised where there is a scale.
        scale: See the module.
        weights: Says whether the activations are quantised too.
    """
    w = kernel[...]
    if scale is None:
        return jnp.einsum(equation, x, w.astype(x.dtype))
    s = scale[...]
    if weights is not None and weights.bits == 4:
        # A product for each group keeps a TPU's matrix unit busy; elsewhere one wide product is several times as fast.
        products = {"tpu": partial(grouped_product, equation), "default": partial(widened_product, equation)}
        return jax.lax.platform_dependent(x, w, s, **products)
    contracted = w.ndim - s.ndim
    assert weights is not None, "scales, but no format"
    # The sum over a contraction that a mesh cuts, of o and down, goes between devices: it stays in x's dtype, as
    # without quantisation, rather than int32.
    whole = contracted == 1 and kernel.axes[0] == "embed"
    if weights.activations == 8 and whole:
        q, row = quantize_rows(x)
        y = jnp.einsum(equation, q, w, preferred_element_type=jnp.int32)
        return (y.astype(jnp.float32) * row.reshape(*row.shape[:-1], *(1,) * s.ndim) * s).astype(x.dtype)
    y = jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=jnp.float32 if whole else x.dtype)
    return (y.astype(jnp.float32) * s).astype(x.dtype)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Activations `[..., D]` as int8 and float32 scales `[..., 1]`, one a token."""
    values = x.astype(jnp.float32)
    scale = _scale(jnp.max(jnp.abs(values), axis=-1, keepdims=True), 8)
    return jnp.round(values * (1 / scale)).astype(jnp.int8), scale


def held_dtype(bits: int, platform: str) -> Any:
    """The dtype in which devices of a platform hold weights of so many bits.

    Only TPUs hold 4 bits as such: JAX describes a CPU's int4 arrays otherwise than its programs ask for, and refuses
    them where a program was compiled ahead.
    """
    return DTYPES[bits] if platform == "tpu" else jnp.int8


def quantize(w: jax.Array, format: KernelFormat, dtype: Any = None) -> tuple[jax.Array, jax.Array]:
    """A projection and its scales, from weights of any float dtype; jit it with the shardings of both.

    The largest weight of a channel is sought over all shards: jax.jit sees the whole array. The dtype may be wider than
    the format's, see `held_dtype`.
    """
    values = w.astype(jnp.float32).reshape(format.kernel(w.shape, (None,) * w.ndim)[0])
    scale = _scale(jnp.max(jnp.abs(values), axis=format.summed, keepdims=True), format.bits)
    return jnp.round(values * (1 / scale)).astype(dtype or DTYPES[format.bits]), jnp.squeeze(scale, format.summed)


def quantize_host(w: np.ndarray, bits: int, group: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The same of a host matrix `[out, in]`, bit for bit: int8 `[out, in]` (also of 4 bits), scales `[out, in/group]`.

    Args:
        w: Any float dtype.
        bits: 8 or 4.
        group: Neighbours that share a scale; all of a row if ``None``.
    """
    out, width = w.shape
    size = group or width
    q = np.empty(w.shape, np.int8)
    scale = np.empty((out, width // size), np.float32)
    step = max(1, (1 << 18) // width)  # rows whose float32 copies stay in a core's cache
    for start in range(0, out, step):
        values = w[start : start + step].astype(np.float32).reshape(-1, width // size, size)
        part = np.abs(values).max(axis=-1) * np.float32(1 / LARGEST[bits])
        part[part == 0] = 1
        values *= (1 / part)[..., None]
        q[start : start + step] = np.rint(values, out=values).reshape(-1, width)
        scale[start : start + step] = part
    return q, scale


def dequantize_host(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 `[out, in]` of int8 `[out, in]` and scales `[out, in/group]`."""
    groups = q.reshape(*scale.shape, -1).astype(np.float32)
    return (groups * scale[..., None]).reshape(q.shape)


def pack(q: np.ndarray) -> np.ndarray:
    """Two 4-bit values a byte: int8 `[R, ...]`, neighbours of the first dimension, to uint8 `[R/2, ...]`."""
    low, high = q[0::2].view(np.uint8) & 15, q[1::2].view(np.uint8) << 4
    return low | high


def unpack_host(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack`."""
    signed = packed.view(np.int8)
    out = np.empty((2 * packed.shape[0], *packed.shape[1:]), np.int8)
    out[0::2], out[1::2] = signed << 4, signed
    return out >> 4


def unpack(packed: jax.Array, dtype: Any = jnp.int4) -> jax.Array:
    """A parameter as stored, uint8 `[..., n/2]`, as `[..., n]`; the low half of a byte comes first."""
    signed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    pair = jnp.stack([jnp.right_shift(jnp.left_shift(signed, 4), 4), jnp.right_shift(signed, 4)], axis=-1)
    return pair.reshape(*packed.shape[:-1], -1).astype(dtype)


def grouped_product(equation: str, x: jax.Array, w: jax.Array, s: jax.Array) -> jax.Array:
    """The product with 4-bit weights: one partial product a group, each times its scale, summed in float32."""
    split, product, out, groups, scales = _with_groups(equation, x, w)
    parts = jnp.einsum(f"{product}->{groups}{out}", split, w.astype(x.dtype), preferred_element_type=jnp.float32)
    # Between devices the sum travels in x's dtype, as without quantisation.
    precise = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": x.dtype}
    return jnp.einsum(f"{groups}{out},{scales}->{out}", parts, s, **precise)


def widened_product(equation: str, x: jax.Array, w: jax.Array, s: jax.Array) -> jax.Array:
    """The same with the weights turned back first."""
    split, product, out, groups, _ = _with_groups(equation, x, w)
    wide = w.astype(jnp.float32) * jnp.expand_dims(s, len(groups))
    return jnp.einsum(f"{product}->{out}", split, wide.astype(x.dtype))


def _with_groups(equation: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, str, str, str, str]:
    """`x` with its last dimension in groups, `c`, and the letters of both operands, the result, groups and scales."""
    left, right, out = equation.replace("->", ",").split(",")
    summed = [letter for letter in right if letter in left]
    last = summed[-1]
    assert "c" not in equation and x.shape[-1] == math.prod(w.shape[len(summed) - 1 : len(summed) + 1])
    split = x.reshape(*x.shape[:-1], -1, w.shape[len(summed)])
    product = f"{left},{right}".replace(last, f"c{last}")
    return split, product, out, "".join([*summed[:-1], "c"]), right.replace(last, "c")


def _scale(largest: jax.Array, bits: int) -> jax.Array:
    # Times the reciprocal, here and of scales, which XLA makes of such divisions anyway: hosts and devices round alike.
    scale = largest * np.float32(1 / LARGEST[bits])
    return jnp.where(scale == 0, 1, scale)
