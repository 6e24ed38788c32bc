"""The device side of the engine: the compiled programs, and the cache and parameters that they work on."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from qwq_jax.config.engine import CACHE_SHARE, EngineConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.weights import WeightFormat, choose_weights
from qwq_jax.engine.arrays import pack, packed_size
from qwq_jax.engine.pages import pages_for
from qwq_jax.engine.program import Carry, Outcome, Step
from qwq_jax.engine.step import Draws, EngineShape, Program, StepPlan, StepResult
from qwq_jax.kernels.attention import Implementation, PagedLayer, load_native, native_serves
from qwq_jax.model.attention import target_of
from qwq_jax.model.cache import abstract_layer, cache_maker, cache_spec
from qwq_jax.model.params import Params, bind, fuse_projections
from qwq_jax.model.spec import model_spec
from qwq_jax.runtime import cache_directory
from qwq_jax.sampling import Sampled
from qwq_jax.sharding import Layout

_LOG = logging.getLogger(__name__)
# As `CACHE_SHARE`, of a machine whose memory is not the engine's alone.
_CACHE_SHARE_OF_HOST = 0.25
# See `EngineShape.growth`: TPUs and GPUs are compiled for longer, a CPU computes for longer.
_GROWTH, _GROWTH_ON_CPU = 8, 2
# Tokens a call: enough to hide the host, few enough that an early end wastes little.
_WINDOW = 16
# There the compiler copies weights that a loop reads into another tiling, all of them: a call draws one token.
_NO_LOOP = "TPU7x"
# Programs, each of which takes some GB of the host while it is compiled.
_COMPILE_AT_ONCE = 8


class DeviceRunner:
    """Runs steps on the devices of a layout; a program is compiled the first time it is needed, or by `warm_up`.

    One array carries all of a step's numbers to the devices: a transfer costs more than its bytes.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Params,
        layout: Layout,
        config: EngineConfig,
        weights: WeightFormat | None = None,
    ) -> None:
        self.shape = engine_shape(model, layout, config)
        self._model = model
        # How kernels lie in memory matters to a CPU alone: compilers for TPUs lay them out as they need.
        fuses = weights is None and layout.size("heads") == 1 and target_of(layout).platform == "cpu"
        self._prepare = partial(fuse_projections, num_layers=model.num_layers) if fuses else dict
        self._params: Params | None = self._prepare(params)
        self._described = _described(self._params)
        self._layout = layout
        self._dtype = jnp.dtype(config.compute_dtype)
        self._weights = weights
        self._new_cache = cache_maker(_cache_spec(model, layout, config, self.shape.num_pages), layout)
        self._cache: Any = self._new_cache()
        self._attention = _choose_attention(layout, self._dtype, self._cache[0])
        self._carry = _empty_carry(self.shape, layout)
        self._programs: dict[Program, Any] = {}

    @property
    def compiles(self) -> int:
        """How many programs it has compiled."""
        return len(self._programs)

    def submit(self, plan: StepPlan) -> Outcome:
        """Start a step; its results arrive in the order of the calls."""
        host = pack(plan, self.shape)
        # Every process of several has the same numbers and gives its devices their part.
        packed = jax.make_array_from_callback(host.shape, self._layout.sharding(("replica", None)), host.__getitem__)
        run = self._compiled(plan.program)
        self._cache, self._carry, outcome = run(self._params, self._cache, self._carry, packed)
        return outcome

    def collect(self, ticket: Outcome) -> StepResult:
        """Wait for a step's tokens."""
        outcome = jax.device_get(ticket)
        return StepResult(_draws(outcome.decode), *(drawn and _draws(drawn) for drawn in outcome[1:]))

    def release(self) -> None:
        """Leave the memory of weights and cache to others until `replace_weights`; the programs stay."""
        self._params = self._cache = None

    def replace_weights(self, params: Params) -> None:
        """Work with these from the next step on; the programs stay, so shapes, types and places must too."""
        params = self._prepare(params)
        assert _described(params) == self._described, "other shapes, types or places"
        self._params = params
        if self._cache is None:
            self._cache = self._new_cache()

    def warm_up(self, programs: tuple[Program, ...], progress: Callable[[int], None] = lambda done: None) -> None:
        """Compile programs ahead of need, several at a time; `progress` is told how many are ready."""
        missing = [program for program in programs if program not in self._programs]
        ready = len(programs) - len(missing)
        progress(ready)
        # Tracing is Python's and goes on in this thread; the compiler leaves Python to the others while it works.
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _COMPILE_AT_ONCE)) as pool:
            try:
                running = {pool.submit(self._lowered(program).compile): program for program in missing}
                for done, future in enumerate(as_completed(running), start=1):
                    self._programs[running[future]] = future.result()
                    progress(ready + done)
            finally:  # of what failed or was interrupted, the rest is not begun
                pool.shutdown(cancel_futures=True)

    def _compiled(self, program: Program) -> Any:
        if program not in self._programs:
            self._programs[program] = self._lowered(program).compile()
        return self._programs[program]

    def _lowered(self, program: Program) -> Any:
        shape = (self.shape.replicas, packed_size(self.shape, program))
        packed = jax.ShapeDtypeStruct(shape, np.int32, sharding=self._layout.sharding(("replica", None)))
        step = Step(self._layout, self.shape, program, self._attention)
        run = step_program(self._model, step, self._dtype, self._weights)
        return run.lower(self._params, self._cache, self._carry, packed)


def usual_programs(shape: EngineShape) -> tuple[Program, ...]:
    """The programs that serve requests of any length without the rarer wishes."""
    windows = [Program(rows, 0, width) for width in shape.table_widths for rows in shape.row_counts]
    mixed = [Program(shape.max_sequences, chunk, width) for width in shape.table_widths for chunk in shape.chunk_sizes]
    drafts = [program._replace(drafts=shape.drafts) for program in windows if shape.drafts]
    return (*mixed, *windows, *drafts)


def step_program(model: ModelConfig, step: Step, dtype: Any, weights: WeightFormat | None = None) -> Any:
    """The jitted step `(params, cache, carry, packed) -> (cache, carry, Outcome)`; cache and carry are donated."""

    def run(params: Params, cache: Any, carry: Carry, packed: jax.Array) -> tuple[Any, Carry, Outcome]:
        cache, carry, outcome = step.run(bind(model, params, dtype=dtype, weights=weights), cache, carry, packed)
        # Whole on every device, so that each of several processes can read it.
        outcome = jax.tree.map(lambda x: step.layout.constrain(x, (None,) * x.ndim), outcome)
        carry = jax.tree.map(lambda x: step.layout.constrain(x, ("replica", None)), carry)
        return cache, carry, outcome

    return jax.jit(run, donate_argnums=(1, 2))


def lower_step(model: ModelConfig, layout: Layout, config: EngineConfig, program: Program) -> Any:
    """The step of an engine that need not exist, on a mesh of devices that need not either, ready to `compile()`.

    Args:
        model: The architecture.
        layout: The mesh; its devices may be those of a described TPU topology.
        config: The engine; `num_pages` must be given.
        program: Which of its programs; a table width of 0 is that of the longest context.
    """
    shape, dtype = engine_shape(model, layout, config), jnp.dtype(config.compute_dtype)
    weights = choose_weights(None, config.weights, config.activations)
    program = program._replace(table_width=program.table_width or shape.max_table_width)
    describe = lambda x, axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(axes, x.shape))  # noqa: E731
    params: Any = {
        path: describe(array, array.axes) for path, array in model_spec(model, dtype, weights=weights).items()
    }
    layer = abstract_layer(_cache_spec(model, layout, config, shape.num_pages), layout)
    carry = jax.tree.map(partial(describe, axes=("replica", None)), _carry_spec(shape))
    packed = jax.ShapeDtypeStruct((shape.replicas, packed_size(shape, program)), jnp.int32)
    step = step_program(model, Step(layout, shape, program), dtype, weights)
    return step.lower(params, (layer,) * model.num_layers, carry, describe(packed, ("replica", None)))


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
    device = layout.mesh.devices.flat[0]
    return EngineShape(
        replicas=layout.size("replica"),
        max_sequences=config.max_sequences,
        max_context=max_context,
        num_pages=num_pages,
        page_size=config.page_size,
        prefill_chunk=config.prefill_chunk,
        max_prefill_sequences=config.max_prefill_sequences,
        vocab_size=model.vocab_size,
        decode_window=config.decode_window or (1 if device.device_kind.startswith(_NO_LOOP) else _WINDOW),
        drafts=config.draft_tokens,
        prefix_cache=config.prefix_cache,
        growth=_GROWTH_ON_CPU if device.platform == "cpu" else _GROWTH,
        scaled_logprobs=config.logprobs == "temperature",
    )


def _choose_attention(layout: Layout, dtype: Any, layer: PagedLayer) -> Implementation:
    """On a CPU the kernel that is compiled for it, where it serves this dtype and cache and there is a compiler."""
    if target_of(layout).platform != "cpu" or not native_serves(dtype, layer):
        return Implementation.AUTO
    loaded = True
    try:
        load_native(cache_directory() / "native")
    except (ValueError, OSError, RuntimeError) as error:  # the last of a user without a home directory
        _LOG.warning("this CPU decodes without a kernel of its own, which takes longer: %s", error)
        loaded = False
    if layout.mesh.is_multi_process:  # one program on all
        loaded = bool(multihost_utils.process_allgather(np.array(loaded)).all())
    return Implementation.NATIVE if loaded else Implementation.AUTO


def _carry_spec(shape: EngineShape) -> Carry:
    rows = (shape.replicas, shape.max_sequences)
    return Carry(jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.bool_))  # pyright: ignore


def _empty_carry(shape: EngineShape, layout: Layout) -> Carry:
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _carry_spec(shape))  # noqa: E731
    sharding = layout.sharding(("replica", None))
    return jax.jit(zeros, out_shardings=Carry(sharding, sharding))()  # pyright: ignore


def _described(params: Params) -> dict[str, Any]:
    return {path: (x.shape, x.dtype, x.sharding) for path, x in params.items()}


def _draws(drawn: Sampled) -> Draws:
    tops = (drawn.top_ids, drawn.top_logprobs) if drawn.top_ids.shape[-1] else ()
    return Draws(np.asarray(drawn.tokens), np.asarray(drawn.logprobs), *map(np.asarray, tops))


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
        budget = min(CACHE_SHARE * (each["bytes_limit"] - each["bytes_in_use"]) for each in stats)
    else:
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        budget = _CACHE_SHARE_OF_HOST * host / len(stats)
    if budget < page:
        raise ValueError(f"no memory is left for the cache: a page of {config.page_size} tokens needs {page} bytes")
    pages = int(budget // page)
    if layout.mesh.is_multi_process:  # the schedule must be the same everywhere
        pages = int(multihost_utils.process_allgather(np.array(pages)).min())
    return pages
