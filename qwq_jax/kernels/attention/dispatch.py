"""Which implementation serves a call: the platform's own, or the one that was named.

A named implementation that cannot serve a call raises; none ever stands in for another.
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwq_jax.kernels.attention import native, reference
from qwq_jax.kernels.attention.blocks import MEGACORES, find_chip, tile_sizes
from qwq_jax.kernels.attention.flash import LANES
from qwq_jax.kernels.attention.flash_vjp import Options, flash_attention
from qwq_jax.kernels.attention.paged_blocks import paged_sizes
from qwq_jax.kernels.attention.pages import PagedLayer, PagedOutput, RaggedRows
from qwq_jax.kernels.attention.ragged import ragged_attention
from qwq_jax.kernels.attention.steps import Deal
from qwq_jax.kernels.attention.work import RaggedWork, find_work


class Implementation(enum.Enum):
    """AUTO is PALLAS on TPU, and elsewhere REFERENCE, or CUDNN where a GPU's can serve.

    That is dense attention of 16-bit inputs without a log-sum-exp; segments become a mask as long as the square of the
    row, which AUTO takes while it is small.
    NATIVE is REFERENCE with decode rows by a kernel compiled for this CPU, once `native.load` has made it known.
    """

    AUTO = "auto"
    REFERENCE = "reference"
    PALLAS = "pallas"
    CUDNN = "cudnn"
    NATIVE = "native"


class Target(NamedTuple):
    """What the program is compiled for.

    Attributes:
        platform: As `jax.Device.platform`: "cpu", "gpu" or "tpu".
        device_kind: As `jax.Device.device_kind`, such as "TPU v5 lite"; it chooses tile sizes.
        interpret: For `pl.pallas_call`, where a TPU kernel is to run on a CPU.
    """

    platform: str = "cpu"
    device_kind: str = "cpu"
    interpret: Any = False


CPU = Target()
# Masks of segments that are worth their memory on a GPU: 16 bits for each pair of tokens of a row.
_LARGEST_MASK = 2**28
# Bytes of scores in float32 that the reference may have at once there.
_MOST_SCORES = 2**30


class QueryShard(NamedTuple):
    """The queries of a row that one of several devices computes.

    Attributes:
        query_ids: `[B, T]` int32: the segment of each query of its own, `steps.PADDING` for all others.
        shards: How many devices share the row, as `sharding.zigzag` deals it.
    """

    query_ids: jax.Array
    shards: int


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    scale: float,
    target: Target = CPU,
    implementation: Implementation = Implementation.AUTO,
    shard: QueryShard | None = None,
) -> jax.Array:
    """Causal grouped-query attention within segments, of any length, differentiable; see `reference.attention`.

    Args:
        q: `[B, T, N, H]`.
        k: `[B, T, K, H]`.
        v: `[B, T, K, H]`.
        segment_ids: `[B, T]` int32, or None for one segment a row.
        scale: Factor on the scores before the softmax.
        target: What is compiled for.
        implementation: Which one.
        shard: The queries that are wanted, where others of the same rows are computed elsewhere.

    Returns:
        `[B, T, N, H]` in the dtype of q; arbitrary for queries that are not wanted.

    Raises:
        ValueError: The named implementation cannot serve this call, or its tiles do not fit the chip.
    """
    chosen = _choose(implementation, target)
    small = segment_ids is None or 2 * q.shape[0] * q.shape[1] ** 2 <= _LARGEST_MASK
    if implementation is Implementation.AUTO and _cudnn_serves(q, target, segment_ids) and small and shard is None:
        chosen = Implementation.CUDNN
    if chosen is Implementation.CUDNN:
        return _cudnn(q, k, v, segment_ids, scale, target)
    return attention_with_lse(q, k, v, segment_ids, scale=scale, target=target, implementation=chosen, shard=shard)[0]


def attention_with_lse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    scale: float,
    target: Target = CPU,
    implementation: Implementation = Implementation.AUTO,
    shard: QueryShard | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `attention`, and the natural logarithm of the softmax's denominator, `[B, N, T]` float32."""
    assert shard is None or segment_ids is not None, "a shard of the queries is told by segments"
    ids, shards = (None, 1) if shard is None else shard
    chosen = _choose(implementation, target)
    if chosen is Implementation.REFERENCE:
        block_q = _gpu_block(q) if target.platform == "gpu" else None
        return reference.attention(q, k, v, segment_ids, scale=scale, query_ids=ids, block_q=block_q)
    if chosen is not Implementation.PALLAS:
        raise ValueError(f"{chosen.value} has no dense attention with a log-sum-exp: use pallas or reference")
    _need_tpu(target)
    rows = q.shape[0] * k.shape[2]
    # Rows and heads keep both cores busy; a single one is shared between them.
    parts = 2 if find_chip(target.device_kind) in MEGACORES and rows == 1 else 1
    shape = {"groups": q.shape[2] // k.shape[2], "length": q.shape[1], "head_dim": -(-q.shape[3] // LANES) * LANES}
    forward = tile_sizes("forward", target.device_kind, **shape)._replace(parts=parts)
    backward = tile_sizes("backward", target.device_kind, **shape)._replace(parts=parts)
    deal = None if shard is None else Deal(shards, q.shape[1])
    options = Options(scale, forward, backward, target.interpret, deal)
    return flash_attention(q, k, v, segment_ids, options, ids)


def prepare_rows(
    rows: RaggedRows,
    layer: PagedLayer,
    *,
    tokens: int,
    heads: int,
    decode_rows: int,
    max_query: int,
    target: Target = CPU,
    implementation: Implementation = Implementation.AUTO,
) -> RaggedRows | RaggedWork:
    """What `paged_attention` shall have for `rows` where many layers see the same batch: their common part of it, done.

    Args:
        rows: Layout of the batch.
        layer: Any layer of the cache, or its description.
        tokens: Flat tokens of the batch.
        heads: Query heads, N.
        decode_rows: See `paged_attention`.
        max_query: See `paged_attention`.
        target: What is compiled for.
        implementation: Which one.

    Returns:
        For the Pallas kernels their work; the rows as they are for others.

    Raises:
        ValueError: The named implementation cannot serve this call, or its tiles do not fit the chip.
    """
    if _choose(implementation, target) is not Implementation.PALLAS:
        return rows
    _need_tpu(target)
    K, _, _, page, H = layer.kv.shape
    decode, prefill = paged_sizes(
        target.device_kind,
        groups=heads // K,
        head_dim=H,
        page=page,
        dtype=layer.kv.dtype,
        rows=decode_rows,
        tokens=tokens,
        table_width=rows.page_table.shape[1],
    )
    counts = {"tokens": tokens, "decode_rows": decode_rows, "max_query": max_query}
    return find_work(rows, layer, **counts, decode=decode, prefill=prefill)


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: PagedLayer,
    rows: RaggedRows | RaggedWork,
    *,
    scale: float,
    decode_rows: int,
    max_query: int,
    target: Target = CPU,
    implementation: Implementation = Implementation.AUTO,
) -> PagedOutput:
    """Appends a ragged batch to the paged cache and attends to it; see `reference.paged_attention`.

    Args:
        q: `[T, N, H]` queries of the flat batch.
        k: `[T, K, H]` new keys.
        v: `[T, K, H]` new values.
        layer: Cache of this layer; its heads may be wider than H, and must be a multiple of 128 for the TPU kernel.
        rows: Layout of the batch, B rows; or what `prepare_rows` made of it with the same arguments.
        scale: Factor on the scores.
        decode_rows: Static number of single-token rows, which come first.
        max_query: Static bound on the tokens of any other row; 0 where there are none.
        target: What is compiled for.
        implementation: Which one.

    Raises:
        ValueError: The named implementation cannot serve this call, or its tiles do not fit the chip.
    """
    chosen = _choose(implementation, target)
    counts = {"decode_rows": decode_rows, "max_query": max_query}
    if chosen in (Implementation.REFERENCE, Implementation.NATIVE):
        assert isinstance(rows, RaggedRows), "rows were prepared for another implementation"
        blocks = reference.GPU_BLOCKS if target.platform == "gpu" else reference.CPU_BLOCKS
        decode = _native_decode(q, layer, target) if chosen is Implementation.NATIVE else None
        how = {"scale": scale, **counts, "blocks": blocks, "attend_decode": decode}
        return reference.paged_attention(q, k, v, layer, rows, **how)
    if chosen is not Implementation.PALLAS:
        raise ValueError(f"{chosen.value} has no paged attention: use pallas, native or reference")
    _need_tpu(target)
    if isinstance(rows, RaggedRows):
        how = {"target": target, "implementation": chosen}
        rows = prepare_rows(rows, layer, tokens=q.shape[0], heads=q.shape[1], **counts, **how)
        assert isinstance(rows, RaggedWork)
    assert rows.is_of(q.shape[0], layer, **counts), "rows were prepared for another batch or another cache"
    return ragged_attention(q, k, v, layer, rows, scale=scale, interpret=target.interpret)


def _native_decode(q: jax.Array, layer: PagedLayer, target: Target) -> reference.AttendDecode:
    if target.platform != "cpu" or not native.serves(q.dtype, layer):
        given = f"{q.dtype} and {layer.kv.dtype} in the cache on {target.platform}"
        raise ValueError(f"the native kernel is for float32 on a CPU, not for {given}")
    if not native.is_loaded():
        raise ValueError("the native kernel is not known to XLA: load_native comes first")
    return native.attend_decode


def _choose(implementation: Implementation, target: Target) -> Implementation:
    if implementation is not Implementation.AUTO:
        return implementation
    return Implementation.PALLAS if target.platform == "tpu" else Implementation.REFERENCE


def _need_tpu(target: Target) -> None:
    if target.platform != "tpu":
        raise ValueError(f"the Pallas kernels are for TPU, not for {target.platform}; use implementation reference")


def _gpu_block(q: jax.Array) -> int | None:
    """Queries that the reference takes at once on a GPU; None for its own choice.

    Each block is compiled on its own, which takes long there: a quarter of the row, while its scores are few.
    """
    B, T, N, _ = q.shape
    quarter = -(-T // 4)
    return quarter if 4 * B * N * quarter * T <= _MOST_SCORES else None


def _cudnn_serves(q: jax.Array, target: Target, segment_ids: jax.Array | None) -> bool:
    narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    whole = segment_ids is None or q.shape[1] % 2 == 0  # of rows with a mask, odd ones are not trained on
    return target.platform == "gpu" and narrow and whole and q.shape[3] <= LANES and q.shape[3] % 8 == 0


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, scale: float, target: Target
) -> jax.Array:
    if not _cudnn_serves(q, target, segment_ids):
        raise ValueError(
            f"cuDNN attention needs a GPU, 16-bit inputs, heads of a multiple of 8 up to {LANES} and, with segments, "
            f"rows of even length, not {target.platform}, {q.dtype}, {q.shape[3]} and {q.shape[1]}"
        )
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=True, implementation="cudnn")
