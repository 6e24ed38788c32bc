"""Rotary position embedding (arXiv 2104.09864) and its YaRN extension (arXiv 2309.00071)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.config.model import ModelConfig, YarnConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each rotated pair, `[H/2]` float32.

    Without YaRN theta^(-2i/H). With it, frequencies that turn more than `beta_fast` times over the original context
    stay, those that turn fewer than `beta_slow` times are divided by `factor`, and a linear ramp joins them (YaRN,
    section 3.2).

    float32 throughout, in the order of operations of the reference implementation: at position 131,072 a difference in
    the last bit of a frequency is a difference of 0.01 in its angle.
    """
    H = config.head_dim
    power = np.power(np.float32(config.rope_theta), np.arange(0, H, 2, dtype=np.float32) / np.float32(H))
    extrapolated = np.float32(1.0) / power
    if config.yarn is None:
        return extrapolated
    yarn = config.yarn
    interpolated = np.float32(1.0) / (np.float32(yarn.factor) * power)
    low, high = _correction_range(yarn, H, config.rope_theta)
    ramp = (np.arange(H // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = np.float32(1.0) - np.clip(ramp, 0, 1)
    return interpolated * (np.float32(1.0) - keep) + extrapolated * keep


def rotary_tables(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles.

    Args:
        positions: `[...]` int32.
        config: The model.

    Returns:
        Two float32 arrays `[..., H/2]`, scaled by YaRN's attention factor.
    """
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(config))
    # 0.1 ln(factor) + 1, whose square multiplies the scores (YaRN, equation 15).
    factor = config.yarn.attention_scale if config.yarn else 1.0
    tables = (jnp.cos(angles) * factor, jnp.sin(angles) * factor)
    return jax.lax.platform_dependent(*tables, cpu=_computed_once, default=lambda *tables: tables)


def _computed_once(*tables: jax.Array) -> tuple[jax.Array, ...]:
    """The same numbers as results of products, which XLA keeps.

    On a CPU it draws what is elementwise into every use instead: each layer found the cosines anew for each head.
    """
    return tuple(x @ jnp.eye(x.shape[-1], dtype=x.dtype) for x in tables)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head.

    Args:
        x: `[..., heads, H]`.
        cos: `[..., H/2]` float32.
        sin: `[..., H/2]` float32.

    Returns:
        The rotated heads, computed in float32, in the dtype of x.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _correction_range(yarn: YarnConfig, head_dim: int, theta: float) -> tuple[float, float]:
    def dimension(turns: float) -> float:
        context = yarn.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return (low, high + 0.001) if low == high else (low, high)
