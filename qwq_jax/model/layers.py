"""The parts of a block: norm, attention projections, feed-forward. Each declares its arrays with logical axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwq_jax.config.model import ModelConfig
from qwq_jax.model.rope import rotate
from qwq_jax.sharding import Axes

# (q [B,T,N,H], k [B,T,K,H], v [B,T,K,H], layer cache) -> (out [B,T,N,H], layer cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def param(shape: tuple[int, ...], axes: Axes, fill: float = 0.0) -> nnx.Param:
    """A parameter of this shape that names the logical axis of each dimension; its values are filled in later."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jnp.full(shape, fill, jnp.float32), axes=axes)


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

    def __init__(self, config: ModelConfig):
        """Declares q `[D,N,H]`, k and v `[D,K,H]`, o `[N,H,D]`, and biases of q, k, v where the model has them."""
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_kernel = param((D, N, H), ("embed", "heads", None))
        self.k_kernel = param((D, K, H), ("embed", "kv_heads", None))
        self.v_kernel = param((D, K, H), ("embed", "kv_heads", None))
        self.o_kernel = param((N, H, D), ("heads", None, "embed"))
        self.has_bias = config.qkv_bias
        if self.has_bias:
            self.q_bias = param((N, H), ("heads", None))
            self.k_bias = param((K, H), ("kv_heads", None))
            self.v_bias = param((K, H), ("kv_heads", None))

    def __call__(
        self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend, cache: Any
    ) -> tuple[jax.Array, Any]:
        """`[B,T,D]` to `[B,T,D]`; `rotary` is cosine and sine `[B,T,H/2]`; the cache goes through `attend`."""
        q = jnp.einsum("btd,dnh->btnh", x, self.q_kernel[...].astype(x.dtype))
        k = jnp.einsum("btd,dkh->btkh", x, self.k_kernel[...].astype(x.dtype))
        v = jnp.einsum("btd,dkh->btkh", x, self.v_kernel[...].astype(x.dtype))
        if self.has_bias:
            q += self.q_bias[...].astype(x.dtype)
            k += self.k_bias[...].astype(x.dtype)
            v += self.v_bias[...].astype(x.dtype)
        out, cache = attend(rotate(q, *rotary), rotate(k, *rotary), v, cache)
        # One axis of N x H, not two: for a sum over two XLA:CPU transposes the kernel anew in every step.
        o_kernel = self.o_kernel[...].astype(x.dtype)
        merged = out.reshape(*out.shape[:2], -1)
        return jnp.einsum("btm,md->btd", merged, o_kernel.reshape(-1, o_kernel.shape[-1])), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        """Declares gate and up `[D,F]`, down `[F,D]`."""
        D, F = config.hidden_size, config.intermediate_size
        self.gate_kernel = param((D, F), ("embed", "mlp"))
        self.up_kernel = param((D, F), ("embed", "mlp"))
        self.down_kernel = param((F, D), ("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,T,D]` to `[B,T,D]`."""
        gate = jnp.einsum("btd,df->btf", x, self.gate_kernel[...].astype(x.dtype))
        up = jnp.einsum("btd,df->btf", x, self.up_kernel[...].astype(x.dtype))
        return jnp.einsum("btf,fd->btd", jax.nn.silu(gate) * up, self.down_kernel[...].astype(x.dtype))


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind its norm, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        """Declares the arrays of one layer."""
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(
        self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend, cache: Any
    ) -> tuple[jax.Array, Any]:
        """`[B,T,D]` to `[B,T,D]`, and the layer's cache."""
        out, cache = self.attention(self.attention_norm(x), rotary, attend, cache)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), cache
