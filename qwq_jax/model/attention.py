"""The ways tokens see each other: the `attend` argument of the model.

Each binds a kernel to a batch's layout. On a tensor axis wider than K, kv heads are repeated so that every shard owns
whole heads (`Layout.kv_copies`); the kernel then runs on each device's own heads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.kernels.attention import (
    PADDING,
    Implementation,
    PagedLayer,
    QueryShard,
    RaggedRows,
    Target,
    attention,
    paged_attention,
    prepare_rows,
    token_slots,
)
from qwq_jax.model.cache import CACHE_AXES
from qwq_jax.model.layers import Attend
from qwq_jax.sharding import Layout, zigzag


def target_of(layout: Layout) -> Target:
    """What programs on this layout's mesh are compiled for; its devices may be described rather than present."""
    device = layout.mesh.devices.flat[0]
    return Target(device.platform, device.device_kind)


def causal_attend(segment_ids: jax.Array | None, layout: Layout | None = None) -> Attend:
    """Causal attention within segments, without a cache: training and scoring.

    Args:
        segment_ids: `[B, T]` int32, or None for one sequence a row.
        layout: The mesh: rows are shared out by its batch axes and heads by its tensor axis. None: a single CPU device.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        scale = q.shape[-1] ** -0.5
        if layout is None:
            return attention(q, k, v, segment_ids, scale=scale), cache
        target, axes = target_of(layout), layout.mesh_axes("tokens")
        heads, shared = (layout.spec(("batch", "tokens", name, None)) for name in ("heads", "kv_shared"))
        ids = () if segment_ids is None else (segment_ids,)
        whole = partial(attention, scale=scale, target=target)
        if layout.size("tokens") > 1:
            ids = ids or (jnp.zeros(q.shape[:2], jnp.int32),)
            whole = partial(_attend_shard, whole, axes=axes, shards=layout.size("tokens"))
        # Each device attends to its own rows and heads: a kernel call is opaque to the partitioner.
        local = jax.shard_map(
            whole,
            mesh=layout.mesh,
            in_specs=(heads, shared, shared, *(layout.spec(("batch", "tokens")) for _ in ids)),
            out_specs=heads,
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        return local(q, _share(layout, q, k), _share(layout, q, v), *ids), cache

    return attend


def _attend_shard(
    attend: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    axes: tuple[str, ...],
    shards: int,
) -> jax.Array:
    """Attention of this device's tokens, dealt by `zigzag`, to those of all that share its rows.

    Keys and values of all are gathered: under grouped queries they are a small part of the activations (Llama 3, arXiv
    2407.21783, section 3.3.2, does so for the same reason). Queries take their places in rows that are otherwise empty,
    of which the kernel visits nothing.

    Args:
        attend: `attention` of whole rows.
        q: `[B, T / n, N, H]`.
        k: `[B, T / n, K, H]`.
        v: `[B, T / n, K, H]`.
        segment_ids: `[B, T / n]` int32.
        axes: Mesh axes of the n devices.
        shards: n.
    """
    piece = q.shape[1] // 2
    order = np.argsort(zigzag(2 * shards, shards))
    first = jax.lax.axis_index(axes) * piece
    last = (2 * shards - 1) * piece - first

    def gathered(x: jax.Array) -> jax.Array:
        x = jax.lax.all_gather(x, axes, axis=1, tiled=True)
        pieces = x.reshape(x.shape[0], 2 * shards, piece, *x.shape[2:])
        return pieces[:, order].reshape(x.shape)

    def spread(x: jax.Array, empty: int) -> jax.Array:
        rows = jnp.full((x.shape[0], x.shape[1] * shards, *x.shape[2:]), empty, x.dtype)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, x[:, :piece], first, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(rows, x[:, piece:], last, axis=1)

    shard = QueryShard(spread(segment_ids, PADDING), shards)
    out = attend(spread(q, 0), gathered(k), gathered(v), gathered(segment_ids), shard=shard)
    return jnp.concatenate([jax.lax.dynamic_slice_in_dim(out, at, piece, axis=1) for at in (first, last)], axis=1)


class PagedBatch(NamedTuple):
    """The layout of one engine step; see `RaggedRows`. Every array has a leading replica axis R.

    Attributes:
        page_table: `[R, B, W]` int32.
        kv_length: `[R, B]` int32.
        query_start: `[R, B+1]` int32.
        positions: `[R, T]` int32.
    """

    page_table: jax.Array
    kv_length: jax.Array
    query_start: jax.Array
    positions: jax.Array


def paged_attend(
    layout: Layout,
    batch: PagedBatch,
    *,
    decode_rows: int,
    max_query: int,
    heads: int,
    layer: PagedLayer,
    implementation: Implementation = Implementation.AUTO,
) -> Attend:
    """Attention over the paged cache for one engine step.

    Args:
        layout: The mesh; replicas lie on its data axes.
        batch: Rows of every replica.
        decode_rows: See `paged_attention`.
        max_query: See `paged_attention`.
        heads: Query heads of the model.
        layer: Any layer of the cache, for its shapes.
        implementation: Which one.
    """
    _, kv_heads, pages, _, page_size, _ = layer.kv.shape
    how: dict[str, Any] = {
        "decode_rows": decode_rows,
        "max_query": max_query,
        "target": target_of(layout),
        "implementation": implementation,
    }
    cache_spec, replica = layout.spec(CACHE_AXES), layout.spec(("replica",))
    on_device = partial(jax.shard_map, mesh=layout.mesh, check_vma=False)  # kernels do not say over what results vary
    local_layer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(layout.sharding(CACHE_AXES, x.shape).shard_shape(x.shape)[1:], x.dtype), layer
    )
    local_heads = heads // kv_heads * local_layer.kv.shape[0]

    def prepare(rows: RaggedRows) -> Any:
        tokens = batch.positions.shape[1]
        return _add_replica(prepare_rows(_own_replica(rows), local_layer, tokens=tokens, heads=local_heads, **how))

    slots = jax.vmap(lambda *a: token_slots(*a, page_size=page_size, pages=pages))
    rows = RaggedRows(batch.page_table, batch.kv_length, batch.query_start, slots(*batch))
    # Of each replica, and the same for its tensor shards.
    prepared = on_device(prepare, in_specs=(replica,), out_specs=replica)(rows)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: PagedLayer) -> tuple[jax.Array, PagedLayer]:
        def local(*arguments: Any):
            out, _, layer = paged_attention(*_own_replica(arguments), scale=q.shape[-1] ** -0.5, **how)
            return _add_replica((out, layer))

        by_head = layout.spec(("replica", None, "heads", None))
        shared = layout.spec(("replica", None, "kv_shared", None))
        sharded = on_device(
            local, in_specs=(by_head, shared, shared, cache_spec, replica), out_specs=(by_head, cache_spec)
        )
        return sharded(q, _share(layout, q, k), _share(layout, q, v), cache, prepared)

    return attend


def _own_replica(tree: Any) -> Any:
    """What a device has of arrays with a replica axis, where vmap would turn the kernels' branches into selects."""
    return jax.tree.map(lambda x: x[0], tree)


def _add_replica(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _share(layout: Layout, q: jax.Array, kv: jax.Array) -> jax.Array:
    copies = layout.kv_copies(q.shape[2], kv.shape[2])
    return kv if copies == 1 else jnp.repeat(kv, copies, axis=2)
