"""The paged KV cache: one pool of pages a replica and layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qwq_jax.config.model import ModelConfig
from qwq_jax.kernels.attention import LANES, PagedLayer, check_page, is_quantized, scales_shape
from qwq_jax.sharding import Axes, Layout

# Of both arrays of a layer: pages, what follows, and the head's width are never cut.
CACHE_AXES: Axes = ("replica", "kv_shared", None, None, None, None)


@dataclass(frozen=True)
class CacheSpec:
    """Shape of a cache: every layer holds keys and values `[replicas, K', pages, 2, page_size, H']`.

    K' is K, or more where kv heads are shared by tensor shards (`Layout.kv_copies`). H' is the head dimension, on TPU
    a multiple of LANES, the width of its registers. An 8-bit cache has float32 scales beside it, one a token, kv head,
    and key or value.
    """

    num_layers: int
    shape: tuple[int, int, int, int, int, int]
    dtype: Any

    @property
    def scales(self) -> tuple[int, ...] | None:
        """Shape of a layer's scales; None where there are none."""
        return scales_shape(self.shape) if is_quantized(self.dtype) else None

    @property
    def nbytes(self) -> int:
        """Bytes of all layers on all devices."""
        size = math.prod(self.shape) * jnp.dtype(self.dtype).itemsize
        return self.num_layers * (size + (4 * math.prod(self.scales) if self.scales else 0))


def cache_spec(
    config: ModelConfig, layout: Layout, *, replicas: int, pages: int, page_size: int, dtype: Any
) -> CacheSpec:
    """The cache of this model on this layout.

    Raises:
        ValueError: Pages of this size cannot hold this dtype.
    """
    heads = config.num_kv_heads * layout.kv_copies(config.num_heads, config.num_kv_heads)
    on_tpu = layout.mesh.devices.flat[0].platform == "tpu"
    width = -(-config.head_dim // LANES) * LANES if on_tpu else config.head_dim
    if on_tpu:
        check_page(page_size, dtype)
    shape = (replicas, heads, pages, 2, page_size, width)
    if is_quantized(dtype):
        scales_shape(shape)  # refuses pages that runs of scales do not divide
    return CacheSpec(config.num_layers, shape, jnp.dtype(dtype))


def abstract_layer(spec: CacheSpec, layout: Layout) -> Any:
    """A layer's arrays, described: a `PagedLayer` of `jax.ShapeDtypeStruct`."""

    def describe(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(CACHE_AXES, shape))

    return PagedLayer(describe(spec.shape, spec.dtype), describe(spec.scales, jnp.float32) if spec.scales else None)


def allocate_cache(spec: CacheSpec, layout: Layout) -> Sequence[PagedLayer]:
    """Zeroed pages, each device making its own part. One entry a layer."""
    return cache_maker(spec, layout)()


def cache_maker(spec: CacheSpec, layout: Layout) -> Callable[[], Sequence[PagedLayer]]:
    """Builds what `allocate_cache` does, for those who do it often: it is compiled once."""
    layer = abstract_layer(spec, layout)
    zeros = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), layer),
        out_shardings=jax.tree.map(lambda x: x.sharding, layer),
    )
    return lambda: tuple(zeros() for _ in range(spec.num_layers))
