"""The paged KV cache: one pool of pages a replica and layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qwq_jax.config.model import ModelConfig
from qwq_jax.kernels.attention import PagedLayer
from qwq_jax.sharding import Axes, Layout

CACHE_AXES: Axes = ("replica", "kv_shared", None, None, None)


@dataclass(frozen=True)
class CacheSpec:
    """Shape of a cache: every layer holds k and v of shape `[replicas, K', pages, page_size, H]`.

    K' is K, or more where kv heads are shared by tensor shards (`Layout.kv_copies`).
    """

    num_layers: int
    shape: tuple[int, int, int, int, int]
    dtype: Any

    @property
    def nbytes(self) -> int:
        """Bytes of all layers on all devices."""
        size = jnp.dtype(self.dtype).itemsize
        for extent in self.shape:
            size *= extent
        return 2 * self.num_layers * size


def cache_spec(
    config: ModelConfig, layout: Layout, *, replicas: int, pages: int, page_size: int, dtype: Any
) -> CacheSpec:
    """The cache of this model on this layout."""
    heads = config.num_kv_heads * layout.kv_copies(config.num_heads, config.num_kv_heads)
    return CacheSpec(config.num_layers, (replicas, heads, pages, page_size, config.head_dim), jnp.dtype(dtype))


def allocate_cache(spec: CacheSpec, layout: Layout) -> Sequence[PagedLayer]:
    """Zeroed pages, each device making its own part. One entry a layer."""
    sharding = layout.sharding(CACHE_AXES, spec.shape)
    zeros = jax.jit(lambda: jnp.zeros(spec.shape, spec.dtype), out_shardings=sharding)
    return tuple(PagedLayer(zeros(), zeros()) for _ in range(spec.num_layers))
