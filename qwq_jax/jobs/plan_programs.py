"""The programs of a job and the arrays that they work on, lowered for described chips by the job's own functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.inference import InferenceConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.rl import RlConfig
from qwq_jax.config.train import SftConfig
from qwq_jax.config.weights import choose_weights
from qwq_jax.engine.runner import engine_shape, lower_step, usual_programs
from qwq_jax.engine.step import Program
from qwq_jax.jobs import sft
from qwq_jax.jobs.rl_start import describe_state, engine_layout, engine_settings, make_functions
from qwq_jax.model.cache import CacheSpec, abstract_layer, cache_spec
from qwq_jax.model.spec import model_spec
from qwq_jax.plan.memory import STATE
from qwq_jax.rl.learner import Rows, Total, Updater, make_scorer
from qwq_jax.rl.optimizers import make_optimizers
from qwq_jax.rl.policy import Policy
from qwq_jax.rl.reward_model import make_values, with_scalar_head
from qwq_jax.sharding import Layout, decode_layout, make_mesh, train_layout
from qwq_jax.train.batch import TrainBatch
from qwq_jax.train.optimizer import make_optimizer, make_schedule
from qwq_jax.train.state import Params, TrainState, abstract_state
from qwq_jax.train.step import make_train_step
from qwq_jax.train.weights import abstract_params

# An engine whose pages are not counted yet is described with so many, to learn what one takes.
_SOME_PAGES = 1024


@dataclass(frozen=True)
class Work:
    """A job on described devices.

    Attributes:
        programs: By name, each a function that lowers it.
        held: Arrays that are there at all times.
        engine: Arrays of the engine.
        pages: Pages of one replica of the engine, if the job has one.
        cache: What its cache is like.
        gradients: Sums over micro-batches.
        counts: How many programs of the engine a run compiles, by the name of the largest of them.
    """

    programs: Mapping[str, Callable[[], Any]]
    held: Mapping[str, Any]
    engine: Mapping[str, Any]
    pages: int = 0
    cache: CacheSpec | None = None
    gradients: Any = None
    counts: Mapping[str, int] | None = None


def inference_work(config: InferenceConfig, model: ModelConfig, devices: Sequence[Any]) -> Work:
    """Batch inference or serving: a window of decoding, and a step with prompts."""
    layout = decode_layout(make_mesh(config.mesh, devices))
    return _engine_work(config.engine, model, layout)


def sft_work(config: SftConfig, model: ModelConfig, devices: Sequence[Any]) -> Work:
    """Fine-tuning: one step, all its micro-batches."""
    config = config.model_copy(update={"compute_dtype": config.compute_dtype or "bfloat16"})
    layout = train_layout(make_mesh(config.mesh, devices))
    optimizer = make_optimizer(config.optimizer, schedule=make_schedule(config.optimizer, steps=config.steps))
    target = abstract_state(sft.abstract_trained(config, model, layout), optimizer)
    frozen = abstract_params(model, dtype=config.param_dtype, layout=layout) if config.lora else None
    step: Any = make_train_step(
        sft.make_loss(config, model, layout), optimizer, shardings=jax.tree.map(lambda x: x.sharding, target)
    )
    rows = config.rows_per_step // config.accumulation
    batch = _batch((config.accumulation, rows, config.sequence_length), layout, ())
    held: dict[str, Any] = {STATE: target}
    if frozen is not None:
        held["frozen weights"] = frozen
    return Work({"step": lambda: step.lower(target, batch, frozen)}, held, {})


def rl_work(
    config: RlConfig, model: ModelConfig, devices: Sequence[Any], reward_model: ModelConfig | None = None
) -> Work:
    """Reinforcement learning: the engine's programs, and those of an update.

    Raises:
        ValueError: The job has what is not looked at here.
    """
    if config.critic_or_default is not None:
        raise ValueError("objective ppo: jobs with a critic are not planned")
    config = config.model_copy(update={"compute_dtype": config.compute_dtype or "bfloat16"})
    layout, decode = train_layout(make_mesh(config.mesh, devices)), engine_layout(config, devices)
    optimizers = make_optimizers(config)
    target = describe_state(config, model, layout, optimizers)
    policy = make_functions(config, model, (layout, decode), optimizers, target=target)
    fixed: Any = None
    if config.lora is not None or config.objective.uses_reference:
        fixed = abstract_params(model, dtype=config.compute_dtype, layout=layout)
    held: dict[str, Any] = {STATE: target.policy}
    if fixed is not None:
        held["frozen weights" if config.lora else "reference"] = fixed
    engine = _engine_work(engine_settings(config), model, decode)
    programs = {**engine.programs, **_of_learner(config, policy, target.policy, fixed)}
    if reward_model is not None:
        scalar = with_scalar_head(reward_model)
        params: Any = abstract_params(scalar, dtype=config.compute_dtype, layout=layout)
        values = make_values(scalar, layout, compute_dtype=config.compute_dtype)  # pyright: ignore[reportArgumentType]
        scorer, rows = make_scorer(values, policy.rows), _rows(policy.rows, ())
        programs["reward model"] = lambda: scorer.program.lower(params, rows)
        held["reward model"] = params
    return Work(
        programs,
        held,
        engine.engine,
        engine.pages,
        engine.cache,
        _totals(
            policy.updater, target.policy, _trained_rows(config, policy.rows), fixed if config.lora else None
        ).gradients,
        engine.counts,
    )


def _engine_work(settings: EngineConfig, model: ModelConfig, layout: Layout) -> Work:
    pages = settings.num_pages or _SOME_PAGES
    # Only to have a shape at all: those who ask decide how many pages there are.
    context = min(settings.max_context or model.max_context, pages * settings.page_size)
    settings = settings.model_copy(update={"num_pages": pages, "max_context": context})
    spec = cache_spec(
        model,
        layout,
        replicas=layout.size("replica"),
        pages=pages,
        page_size=settings.page_size,
        dtype=settings.cache_dtype or settings.compute_dtype,
    )
    formats = choose_weights(None, settings.weights, settings.activations)
    weights = {
        path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=layout.sharding(array.axes, array.shape))
        for path, array in model_spec(model, jnp.dtype(settings.compute_dtype), weights=formats).items()
    }
    counts = {"prompts": 0, "decode": 0}
    for program in usual_programs(engine_shape(model, layout, settings)):
        counts["prompts" if program.prefill_tokens else "decode"] += 1
    rows, chunk = settings.max_sequences, settings.prefill_chunk
    return Work(
        {
            "decode": lambda: lower_step(model, layout, settings, Program(rows, 0, 0)),
            "prompts": lambda: lower_step(model, layout, settings, Program(rows, chunk, 0)),
        },
        {},
        {"engine's weights": weights, "key-value cache": (abstract_layer(spec, layout),) * model.num_layers},
        pages,
        spec,
        counts=counts,
    )


def _of_learner(
    config: RlConfig, policy: Policy, state: TrainState, fixed: Params | None
) -> dict[str, Callable[[], Any]]:
    """The programs of an update."""
    frozen = fixed if config.lora is not None else None
    updater: Any = policy.updater
    batch, plain = _trained_rows(config, policy.rows), _rows(policy.rows, ())
    total = _totals(updater, state, batch, frozen)
    programs: dict[str, Callable[[], Any]] = {
        "gradient": lambda: updater.add.lower(total, state.params, batch, frozen),
        "update": lambda: updater.apply.lower(state, total),
        "sync": lambda: policy.sync.lower(state.params, frozen),
    }
    if config.needs_old_logprobs:
        programs["log-probabilities"] = lambda: policy.score.program.lower({**(frozen or {}), **state.params}, plain)
    if config.objective.uses_reference:
        programs["reference"] = lambda: policy.score_reference.program.lower(fixed, plain)
    return programs


def _trained_rows(config: RlConfig, rows: Rows) -> TrainBatch:
    """A micro-batch with the columns that the loss reads."""
    columns = ["advantages", "weights", "rollout_logp"]
    columns += ["old_logp"] if config.needs_old_logprobs else []
    columns += ["ref_logp"] if config.objective.uses_reference else []
    return _rows(rows, columns)


def _rows(rows: Rows, columns: Sequence[str]) -> TrainBatch:
    return _batch((rows.rows_per_micro_batch, rows.row_length), rows.layout, columns)


def _batch(shape: tuple[int, ...], layout: Layout, columns: Sequence[str]) -> TrainBatch:
    place = layout.sharding((None, "batch", None)[-len(shape) :], shape)
    describe: Any = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)  # noqa: E731
    return TrainBatch(
        tokens=describe(jnp.int32),
        targets=describe(jnp.int32),
        loss_mask=describe(jnp.bool_),
        positions=describe(jnp.int32),
        segment_ids=describe(jnp.int32),
        columns={name: describe(np.float32) for name in columns},
    )


def _totals(updater: Updater, state: TrainState, batch: TrainBatch, frozen: Params | None) -> Total:
    """The sums over micro-batches, described: gradients lie as their parameters do."""
    shapes: Total = jax.eval_shape(updater.zero, state, batch, frozen)
    place = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)  # noqa: E731
    whole = jax.tree.leaves(state.step)[0].sharding
    gradients: Any = {name: place(x, state.params[name].sharding) for name, x in shapes.gradients.items()}
    return Total(gradients, jax.tree.map(lambda x: place(x, whole), shapes.terms))
