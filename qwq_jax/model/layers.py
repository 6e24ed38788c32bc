"""The parts of a block: norm, attention projections, feed-forward. Each declares its arrays with logical axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwq_jax.config.lora import LoraConfig
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


def turned_product(x: jax.Array, kernel: nnx.Param) -> jax.Array:
    """The product of x `[B,T,in]` and a kernel `[out,in]` that `fuse_projections` turned: `[B,T,out]`, dtype of x."""
    return jnp.einsum("bti,oi->bto", x, kernel[...].astype(x.dtype))


class Adapter(nnx.Module):
    """What LoRA adds to a projection (arXiv 2106.09685, section 4.1): scale * (x A) B; A B itself is never made.

    Each matrix keeps the dimensions of its side of the kernel, with their logical axes, so that the products are cut
    over the mesh as the kernel's own are. Both are float32, and cast to the activations' dtype where they are used.
    """

    def __init__(self, shape: tuple[int, ...], axes: Axes, lora: LoraConfig):
        """Declares a `[in..., rank]` and b `[rank, out...]` for a kernel `[in..., out...]`."""
        contracted = 2 if axes[0] == "heads" else 1  # what comes from heads sums over their width too
        self.a = param((*shape[:contracted], lora.rank), (*axes[:contracted], None), own_dtype=jnp.float32)
        self.b = param((lora.rank, *shape[contracted:]), (None, *axes[contracted:]), own_dtype=jnp.float32)
        self.scale = lora.scale

    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        """The addition to `einsum(equation, x, kernel)`, in the dtype of x."""
        left, right, out = equation.replace("->", ",").split(",")
        summed = "".join(letter for letter in right if letter in left)
        kept, rows = right.replace(summed, ""), left.replace(summed, "")
        assert "r" not in equation and right.startswith(summed) and left.endswith(summed), equation
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        inner = jnp.einsum(f"{left},{summed}r->{rows}r", x, a, preferred_element_type=jnp.float32)
        return jnp.einsum(f"{rows}r,r{kept}->{out}", (inner * self.scale).astype(x.dtype), b)


def adapter(module: str, shape: tuple[int, ...], axes: Axes, lora: LoraConfig | None) -> Adapter | None:
    """The adapter of a projection, if it has one; `module` is the name that Hugging Face gives it."""
    return Adapter(shape, axes, lora) if lora is not None and module in lora.target_modules else None


def adapted(y: jax.Array, equation: str, x: jax.Array, adapter: Adapter | None) -> jax.Array:
    """The product y of a projection with x, with what its adapter adds."""
    return y if adapter is None else y + adapter(equation, x)


def take_tokens(x: jax.Array, kept: jax.Array | None) -> jax.Array:
    """The tokens at `kept` `[B, S]` of x `[B, T, ...]`, as `[B, S, ...]`; all of them where it is None."""
    return x if kept is None else jnp.take_along_axis(x, kept.reshape(*kept.shape, *(1,) * (x.ndim - 2)), axis=1)


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

    def __init__(self, config: ModelConfig, weights: WeightFormat | None = None, lora: LoraConfig | None = None):
        """Declares q `[D,N,H]`, k and v `[D,K,H]`, o `[N,H,D]`, and biases of q, k, v where the model has them."""
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.weights = weights
        q, o = ((D, N, H), ("embed", "heads", None)), ((N, H, D), ("heads", None, "embed"))
        kv = (D, K, H), ("embed", "kv_heads", None)
        self.has_bias = config.qkv_bias
        self.q_kernel, self.q_kernel_scale = kernel(*q, weights)
        self.k_kernel, self.k_kernel_scale = kernel(*kv, weights)
        self.v_kernel, self.v_kernel_scale = kernel(*kv, weights)
        if self.has_bias:
            self.q_bias, self.k_bias, self.v_bias = (param(shape[1:], axes[1:]) for shape, axes in (q, kv, kv))
        self.o_kernel, self.o_kernel_scale = kernel(*o, weights)
        self.q_lora = adapter("q_proj", *q, lora)
        self.k_lora = adapter("k_proj", *kv, lora)
        self.v_lora = adapter("v_proj", *kv, lora)
        self.o_lora = adapter("o_proj", *o, lora)

    def __call__(
        self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend, cache: Any
    ) -> tuple[jax.Array, Any]:
        """`[B,T,D]` to `[B,T,D]`, or the tokens that `attend` gives; `rotary` is cosine and sine `[B,T,H/2]`.

        The cache goes through `attend`.
        """
        q, k, v = self._inputs(x)
        out, cache = attend(rotate(q, *rotary), rotate(k, *rotary), v, cache)
        return adapted(self._output(out), "btnh,nhd->btd", out, self.o_lora), cache

    def _inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q = project("btd,dnh->btnh", x, self.q_kernel, self.q_kernel_scale, self.weights)
        k = project("btd,dkh->btkh", x, self.k_kernel, self.k_kernel_scale, self.weights)
        v = project("btd,dkh->btkh", x, self.v_kernel, self.v_kernel_scale, self.weights)
        q = adapted(q, "btd,dnh->btnh", x, self.q_lora)
        k = adapted(k, "btd,dkh->btkh", x, self.k_lora)
        v = adapted(v, "btd,dkh->btkh", x, self.v_lora)
        if self.has_bias:
            q += self.q_bias[...].astype(x.dtype)
            k += self.k_bias[...].astype(x.dtype)
            v += self.v_bias[...].astype(x.dtype)
        return q, k, v

    def _output(self, out: jax.Array) -> jax.Array:
        if self.o_kernel_scale is not None:
            return project("btnh,nhd->btd", out, self.o_kernel, self.o_kernel_scale, self.weights)
        # One axis of N x H, not two: for a sum over two XLA:CPU transposes the kernel anew in every step.
        o_kernel = self.o_kernel[...].astype(out.dtype)
        merged = out.reshape(*out.shape[:2], -1)
        return jnp.einsum("btm,md->btd", merged, o_kernel.reshape(-1, o_kernel.shape[-1]))


class FusedAttention(nnx.Module):
    """`Attention` whose arrays `fuse_projections` joined and turned."""

    def __init__(self, config: ModelConfig):
        """Declares qkv `[(N+2K)H,D]`, all heads of q, then k, then v, its bias `[(N+2K)H]`, and o `[D,NH]`."""
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.heads, self.has_bias = (N, K), config.qkv_bias
        self.qkv_kernel = param(((N + 2 * K) * H, D), (None, "embed"))
        if self.has_bias:
            self.qkv_bias = param(((N + 2 * K) * H,), (None,))
        self.o_kernel = param((D, N * H), ("embed", None))

    def __call__(
        self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], attend: Attend, cache: Any
    ) -> tuple[jax.Array, Any]:
        """As `Attention`."""
        y = turned_product(x, self.qkv_kernel)
        if self.has_bias:
            y += self.qkv_bias[...].astype(x.dtype)
        N, K = self.heads
        y = y.reshape(*x.shape[:-1], N + 2 * K, -1)
        q, k, v = y[..., :N, :], y[..., N : N + K, :], y[..., N + K :, :]
        out, cache = attend(rotate(q, *rotary), rotate(k, *rotary), v, cache)
        return turned_product(out.reshape(*out.shape[:2], -1), self.o_kernel), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, weights: WeightFormat | None = None, lora: LoraConfig | None = None):
        """Declares gate and up `[D,F]`, down `[F,D]`."""
        D, F = config.hidden_size, config.intermediate_size
        self.weights = weights
        inward, down = ((D, F), ("embed", "mlp")), ((F, D), ("mlp", "embed"))
        self.gate_kernel, self.gate_kernel_scale = kernel(*inward, weights)
        self.up_kernel, self.up_kernel_scale = kernel(*inward, weights)
        self.down_kernel, self.down_kernel_scale = kernel(*down, weights)
        self.gate_lora = adapter("gate_proj", *inward, lora)
        self.up_lora = adapter("up_proj", *inward, lora)
        self.down_lora = adapter("down_proj", *down, lora)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,T,D]` to `[B,T,D]`."""
        gate = project("btd,df->btf", x, self.gate_kernel, self.gate_kernel_scale, self.weights)
        up = project("btd,df->btf", x, self.up_kernel, self.up_kernel_scale, self.weights)
        gate = adapted(gate, "btd,df->btf", x, self.gate_lora)
        up = adapted(up, "btd,df->btf", x, self.up_lora)
        inner = jax.nn.silu(gate) * up
        down = project("btf,fd->btd", inner, self.down_kernel, self.down_kernel_scale, self.weights)
        return adapted(down, "btf,fd->btd", inner, self.down_lora)


class FusedMLP(nnx.Module):
    """`MLP` whose arrays `fuse_projections` joined and turned."""

    def __init__(self, config: ModelConfig):
        """Declares gate_up `[2F,D]`, gate before up, and down `[D,F]`."""
        D, F = config.hidden_size, config.intermediate_size
        self.gate_up_kernel = param((2 * F, D), (None, "embed"))
        self.down_kernel = param((D, F), ("embed", "mlp"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B,T,D]` to `[B,T,D]`."""
        gate, up = jnp.split(turned_product(x, self.gate_up_kernel), 2, axis=-1)
        return turned_product(jax.nn.silu(gate) * up, self.down_kernel)


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind its norm, each added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightFormat | None = None,
        lora: LoraConfig | None = None,
        *,
        fused: bool = False,
    ):
        """Declares the arrays of one layer."""
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        assert not fused or (weights is None and lora is None), "fused arrays have neither scales nor adapters"
        self.attention = FusedAttention(config) if fused else Attention(config, weights, lora)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FusedMLP(config) if fused else MLP(config, weights, lora)

    def __call__(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        attend: Attend,
        cache: Any,
        kept: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """`[B,T,D]` to `[B,T,D]`, or `[B,S,D]` of the tokens at `kept` `[B,S]`; and the layer's cache."""

        def attend_kept(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            out, cache = attend(q, k, v, cache)
            return take_tokens(out, kept), cache

        out, cache = self.attention(self.attention_norm(x), rotary, attend_kept, cache)
        x = take_tokens(x, kept) + out
        return x + self.mlp(self.mlp_norm(x)), cache
