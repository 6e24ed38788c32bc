"""The device side of the engine: the one compiled step, its programs by shape, and the cache it owns."""

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.engine.pages import pages_for
from qwq_jax.engine.step import MAX_TOP_LOGPROBS, EngineShape, StepPlan, StepResult
from qwq_jax.model.attention import PagedBatch, paged_attend
from qwq_jax.model.cache import abstract_layer, allocate_cache, cache_spec
from qwq_jax.model.params import Params, bind
from qwq_jax.model.spec import model_spec
from qwq_jax.sampling import Sampled, SamplingArrays, sample
from qwq_jax.sharding import Layout

# What the arrays of a step, the activations and the gathered pages may need beside the cache.
_CACHE_SHARE_OF_DEVICE = 0.9
_CACHE_SHARE_OF_HOST = 0.25


class DeviceRunner:
    """Runs steps on the devices of a layout; a program is compiled the first time its shape is seen.

    One array carries all of a step's numbers to the devices: a transfer costs more than its bytes.
    """

    def __init__(self, model: ModelConfig, params: Params, layout: Layout, config: EngineConfig) -> None:
        self.shape = engine_shape(model, layout, config)
        self._model = model
        self._params = params
        self._layout = layout
        self._dtype = jnp.dtype(config.compute_dtype)
        self._cache: Any = allocate_cache(_cache_spec(model, layout, config, self.shape.num_pages), layout)
        self._programs: dict[Bucket, Any] = {}

    @property
    def compiles(self) -> int:
        """How many programs it has compiled."""
        return len(self._programs)

    def step(self, plan: StepPlan) -> StepResult:
        """Carry out one step and wait for the tokens."""
        numbers = _pack(plan, self.shape)
        # Every process of a mesh has the whole plan, and gives its own devices their part of it.
        packed = jax.make_array_from_callback(
            numbers.shape, self._layout.sharding(("replica", None)), numbers.__getitem__
        )
        bucket = Bucket(plan.prefill_tokens, plan.table_width, plan.want_top)
        if bucket not in self._programs:
            run = step_program(self._model, self._layout, self.shape, self._dtype, bucket)
            self._programs[bucket] = run.lower(self._params, self._cache, packed).compile()
        self._cache, sampled = self._programs[bucket](self._params, self._cache, packed)
        tokens, logprobs, ids, top = jax.device_get(sampled)
        return StepResult(tokens, logprobs, ids, top) if plan.want_top else StepResult(tokens, logprobs)


class Bucket(NamedTuple):
    """What chooses a compiled program: prompt tokens and pages a row, and whether top log-probs are wanted."""

    prefill_tokens: int
    table_width: int
    want_top: bool = False


def step_program(model: ModelConfig, layout: Layout, shape: EngineShape, dtype: Any, bucket: Bucket) -> Any:
    """The jitted step `(params, cache, packed) -> (cache, Sampled)`; the cache is donated."""

    def run(params: Mapping[str, jax.Array], cache: Any, packed: jax.Array) -> tuple[Any, Sampled]:
        arrays = _unpack(packed, shape, bucket.prefill_tokens, bucket.table_width)
        attend = paged_attend(
            layout,
            PagedBatch(*(arrays[name] for name in PagedBatch._fields)),
            decode_rows=shape.max_sequences,
            max_query=bucket.prefill_tokens,
            pool=(shape.num_pages, shape.page_size),
        )
        decoder = bind(model, params, dtype=dtype)
        hidden, cache = decoder(arrays["tokens"], arrays["positions"], attend, cache)
        last = jnp.take_along_axis(hidden, arrays["sample_index"][:, :, None], axis=1)
        sampling = SamplingArrays(**{name: arrays[name] for name in SamplingArrays._fields})
        sampled = sample(decoder.logits(last), sampling, num_top=MAX_TOP_LOGPROBS if bucket.want_top else 0)
        if layout.mesh.is_multi_process:  # each process decides by all tokens
            sampled = Sampled(*(layout.constrain(x, (None,) * x.ndim) for x in sampled))
        return cache, sampled

    return jax.jit(run, donate_argnums=1)


def lower_step(model: ModelConfig, layout: Layout, config: EngineConfig, bucket: Bucket) -> Any:
    """The step of an engine that need not exist, on a mesh of devices that need not either, ready to `compile()`.

    Args:
        model: The architecture.
        layout: The mesh; its devices may be those of a described TPU topology.
        config: The engine; `num_pages` must be given.
        bucket: Which of its programs; a table width of 0 is that of the longest context.
    """
    shape, dtype = engine_shape(model, layout, config), jnp.dtype(config.compute_dtype)
    bucket = bucket._replace(table_width=bucket.table_width or shape.max_table_width)
    describe = lambda x, axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(axes, x.shape))  # noqa: E731
    params = {path: describe(array, array.axes) for path, array in model_spec(model, dtype).items()}
    layer = abstract_layer(_cache_spec(model, layout, config, shape.num_pages), layout)
    numbers = sum(math.prod(extent) for extent, _ in _fields(shape, *bucket[:2]).values())
    packed = describe(jax.ShapeDtypeStruct((shape.replicas, numbers), jnp.int32), ("replica", None))
    cache = (layer,) * model.num_layers
    return step_program(model, layout, shape, dtype, bucket).lower(params, cache, packed)


def engine_shape(model: ModelConfig, layout: Layout, config: EngineConfig) -> EngineShape:
    """Sizes of an engine on this mesh; without `num_pages`, room for every row's context as far as memory goes."""
    max_context = config.max_context or model.max_context
    if max_context > model.max_context:
        raise ValueError(f"max_context {max_context} is beyond the {model.max_context} positions of the model")
    wanted = config.max_sequences * pages_for(max_context, config.page_size)
    num_pages = config.num_pages or min(wanted, _affordable_pages(model, layout, config))
    if num_pages * config.page_size < max_context:
        room = num_pages * config.page_size
        cause = "engine.num_pages holds" if config.num_pages else "memory has room for"
        raise ValueError(
            f"{cause} {room} tokens of cache, fewer than one sequence of the context of {max_context}: "
            f"set engine.max_context={room} or less"
        )
    return EngineShape(
        replicas=layout.size("replica"),
        max_sequences=config.max_sequences,
        max_context=max_context,
        num_pages=num_pages,
        page_size=config.page_size,
        prefill_chunk=config.prefill_chunk,
        max_prefill_sequences=config.max_prefill_sequences,
    )


def _cache_spec(model: ModelConfig, layout: Layout, config: EngineConfig, pages: int) -> Any:
    dtype = config.cache_dtype or config.compute_dtype
    replicas = layout.size("replica")
    return cache_spec(model, layout, replicas=replicas, pages=pages, page_size=config.page_size, dtype=dtype)


def _affordable_pages(model: ModelConfig, layout: Layout, config: EngineConfig) -> int:
    """Pages of one replica that fit beside the parameters."""
    devices = layout.mesh.devices.size
    page = _cache_spec(model, layout, config, 1).nbytes // devices
    stats = [device.memory_stats() for device in layout.mesh.local_devices]
    if all(stats):
        budget = min(_CACHE_SHARE_OF_DEVICE * (each["bytes_limit"] - each["bytes_in_use"]) for each in stats)
    else:
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        budget = _CACHE_SHARE_OF_HOST * host / len(stats)
    if budget < page:
        raise ValueError(f"no memory is left for the cache: a page of {config.page_size} tokens needs {page} bytes")
    pages = int(budget // page)
    if layout.mesh.is_multi_process:  # the schedule must be the same everywhere
        pages = int(multihost_utils.process_allgather(np.array(pages)).min())
    return pages


def _fields(shape: EngineShape, prefill_tokens: int, table_width: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape within a replica and dtype of each of a step's arrays, in the order in which they are packed."""
    tokens, rows = (shape.max_sequences + prefill_tokens,), (shape.rows,)
    return {
        "tokens": (tokens, np.int32),
        "positions": (tokens, np.int32),
        "page_table": ((shape.rows, table_width), np.int32),
        "kv_length": (rows, np.int32),
        "query_start": ((shape.rows + 1,), np.int32),
        "sample_index": (rows, np.int32),
        "temperature": (rows, np.float32),
        "top_k": (rows, np.int32),
        "top_p": (rows, np.float32),
        "min_p": (rows, np.float32),
        "seed": (rows, np.uint32),
        "position": (rows, np.int32),
    }


def _pack(plan: StepPlan, shape: EngineShape) -> np.ndarray:
    """All arrays of a step side by side as `[R, n]` int32."""
    arrays = {**vars(plan), **vars(plan.sampling)}
    parts: list[np.ndarray] = []
    for name, (extent, dtype) in _fields(shape, plan.prefill_tokens, plan.table_width).items():
        array = arrays[name]
        assert array.dtype == dtype and array.shape == (shape.replicas, *extent), f"{name}: {array.shape} {array.dtype}"
        parts.append(array.reshape(shape.replicas, -1).view(np.int32))
    return np.concatenate(parts, axis=1)


def _unpack(packed: jax.Array, shape: EngineShape, prefill_tokens: int, table_width: int) -> dict[str, jax.Array]:
    arrays: dict[str, jax.Array] = {}
    begin = 0
    for name, (extent, dtype) in _fields(shape, prefill_tokens, table_width).items():
        size = math.prod(extent)
        part = packed[:, begin : begin + size].reshape(-1, *extent)
        arrays[name] = part if dtype is np.int32 else jax.lax.bitcast_convert_type(part, dtype)
        begin += size
    return arrays
