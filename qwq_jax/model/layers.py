"""The parts of a block: norm, attention projections, feed-forward. Each declares its arrays with logical axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwq_jax.config.model import ModelConfig
from qwq_jax.config.weights import WeightFormat
from qwq_jax.model.quantize import DTYPES, kernel_format, project
from qwq_jax.model.rope import rotate
from qwq_jax.sharding import Axes

# (q [B,T,N,H], k [B,T,K,H], v [B,T,K,H], layer cache) -> (out [B,T,N,H], layer cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def param(shape: tuple[int, ...], axes: Axes, fill: float = 0.0, *, own_dtype: Any = None) -> nnx.Param:
    """A parameter of this shape that names the logical axis of each dimension; its values are filled in later.

    Its dtype is the model's, or its own.
    """
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jnp.full(shape, fill, own_dtype or jnp.float32), axes=axes, own_dtype=own_dtype)


def kernel(shape: tuple[int, ...], axes: Axes, weights: WeightFormat | None) -> tuple[nnx.Param, nnx.Param | None]:
    """A projection, and its scales if it is quantised."""
    if weights is None:
        return param(shape, axes), None
    format = kernel_format(weights, shape, axes)
    scale = param(*format.scale(shape, axes), own_dtype=jnp.float32)
    return param(*format.kernel(shape, axes), own_dtype=DTYPES[format.bits]), scale


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (arXiv 1910.07467); statistics in float32: squares of bfloat16 activations lose the mean."""

    def __init__(self, size: int, epsilon: float):
        """Declares scale `[size]`."""
        self.scale = param((size,), (None,), 1.0)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last dimension; `[..., D]` to `[..., D]` in the dtype of x."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention: projections and rotation; how tokens see each other is the caller's `attend`."""

    def __init__(self, config: ModelConfig, weights: WeightFormat | None = None):
        """Declares q `[D,N,H]`, k and v `[D,K,H]`, o `[N,H,D]`, and biases of q, k, v where the model has them."""
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.weights = weights
        self.q_kernel, self.q_kernel_scale = kernel((D, N, H), ("embed", "heads", None), weights)
        self.k_kernel, self.k_kernel_scale = kernel((D, K, H), ("embed", "kv_heads", None), weights)
        self.v_kernel, self.v_kernel_scale = kernel((D, K, H), ("embed", "kv_heads", None), weights)
        self.o_kernel, self.o_kernel_scale = kernel((N, H, D), ("heads", None, "embed"), weights)
        self.has_bias = config.qkv_bias
        if self.has_bias:
            self.q_bias = param((N, H), ("heads", None))
            self.k_bias = param((K, H), ("kv_heads", None))
            self.v_bias = param((K, H), ("kv_heads", None))

    def __call__(
        self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend, cache: Any
    ) -> tuple[jax.Array, Any]:
        """`[B,T,D]` to `[B,T,D]`; `rotary` is cosine and sine `[B,T,H/2]`; the cache goes through `attend`."""
        q = project("btd,dnh->btnh", x, self.q_kernel, self.q_kernel_scale, self.weights)
        k = project("btd,dkh->btkh", x, self.k_kernel, self.k_kernel_scale, self.weights)
        v = project("btd,dkh->btkh", x, self.v_kernel, self.v_kernel_scale, self.weights)
        if self.has_bias:
            q += self.q_bias[...].astype(x.dtype)
            k += self.k_bias[...].astype(x.dtype)
            v += self.v_bias[...].astype(x.dtype)
        out, cache = attend(rotate(q, *rotary), rotate(k, *rotary), v, cache)
        if self.o_kernel_scale is not None:
            return project("btnh,nhd->btd", out, self.o_kernel, self.o_kernel_scale, self.weights), cache
        # One axis of N x H, not two: for a sum over two XLA:CPU transposes the kernel anew in every step.
        o_kernel = self.o_kernel[...].astype(x.dtype)
        merged = out.reshape(*out.shape[:2], -1)
        return jnp.einsum("btm,md->btd", merged, o_kernel.reshape(-1, o_kernel.shape[-1])), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, weights: WeightFormat | None = None):
        """Declares gate and up `[D,F]`, down `[F,D]`."""
        D, F = config.hidden_size, config.intermediate_size
        self.weights = weights
        self.gate_kernel, self.gate_kernel_scale = kernel((D, F), ("embed", "mlp"), weights)
        self.up_kernel, self.up_kernel_scale = kernel((D, F), ("embed", "mlp"), weights)
        self.down_kernel, self.down_kernel_scale = kernel((F, D), ("mlp", "embed"), weights)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,T,D]` to `[B,T,D]`."""
        gate = project("btd,df->btf", x, self.gate_kernel, self.gate_kernel_scale, self.weights)
        up = project("btd,df->btf", x, self.up_kernel, self.up_kernel_scale, self.weights)
        return project("btf,fd->btd", jax.nn.silu(gate) * up, self.down_kernel, self.down_kernel_scale, self.weights)


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind its norm, each added to the residual stream."""

    def __init__(self, config: ModelConfig, weights: WeightFormat | None = None):
        """Declares the arrays of one layer."""
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, weights)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, weights)

    def __call__(
        self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend, cache: Any
    ) -> tuple[jax.Array, Any]:
        """`[B,T,D]` to `[B,T,D]`, and the layer's cache."""
        out, cache = self.attention(self.attention_norm(x), rotary, attend, cache)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), cache
