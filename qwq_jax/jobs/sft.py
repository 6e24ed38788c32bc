"""`qwq-jax sft`: instruction tuning from a config, resumable, ending in an ordinary checkpoint.

::

    OUTPUT_DIR/
      metrics.jsonl          one record a step: loss, eval_loss, grad_norm, learning_rate, tokens, ...
      tensorboard/           the same numbers as events
      checkpoints/           to go on from: parameters, optimizer, data position
      model-000800/          what `generate`, `chat`, `export` take, written when the run ends
      adapter-000800/        with `lora`: the adapters alone, as PEFT has them
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint.directory import explained, sole_writer
from qwq_jax.checkpoint.peft import export_adapter
from qwq_jax.checkpoint.store import Checkpoint
from qwq_jax.checkpoint.train_store import TrainStore
from qwq_jax.config.load import load_toml
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.train import SftConfig
from qwq_jax.interrupt import Interrupted, StopRequested
from qwq_jax.jobs.fine_tuning import (
    HOSTS,
    check_model,
    check_output,
    check_tokens,
    final_state,
    fingerprint,
    hosts_file,
    initial_checkpoint,
    progress_bar,
    reporter,
    write_model,
)
from qwq_jax.model.lora import num_adapter_parameters, random_adapters
from qwq_jax.processes import Peers
from qwq_jax.runtime import default_compute_dtype
from qwq_jax.sft.data import Examples, read_examples
from qwq_jax.sft.loss import make_sft_loss
from qwq_jax.sharding import Layout, make_mesh, train_layout
from qwq_jax.train.batch import place_batch
from qwq_jax.train.metrics import METRICS, MetricsLog
from qwq_jax.train.optimizer import make_optimizer, make_schedule
from qwq_jax.train.packing import PackedRows
from qwq_jax.train.state import Params, TrainState, abstract_state, init_state
from qwq_jax.train.step import Loss, make_eval_step, make_train_step
from qwq_jax.train.stream import BatchStream, one_pass, plan_steps
from qwq_jax.train.trainer import Intervals, Trainer, Work, newest_step
from qwq_jax.train.weights import (
    abstract_adapters,
    abstract_params,
    checkpoint_weights,
    merged_weights,
    random_weights,
)

LOG = logging.getLogger(__name__)

# Settings that decide what is computed; the mesh, intervals and micro-batches do not.
IDENTITY = {"model", "init", "sequence_length", "rows_per_step", "steps", "seed"} | {
    "param_dtype",
    "compute_dtype",
    "optimizer",
}


# Of these at least one is in the directory of a run that has begun.
OUTPUTS = {"initial", "checkpoints", METRICS, HOSTS}


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        config: The architecture.
        tokenizer_dir: A local directory.
        checkpoint: Initial weights; ``None`` for random ones.
    """

    config: ModelConfig
    tokenizer_dir: str
    checkpoint: Checkpoint | None


@dataclass(frozen=True)
class SftReport:
    """What a run made.

    Attributes:
        step: Steps taken, earlier runs counted.
        model: The checkpoint with the final weights; ``None`` if adapters were trained and not merged.
        adapter: The directory of the adapters; ``None`` if all weights were trained.
        metrics: The metrics file.
    """

    step: int
    model: str | None
    adapter: str | None
    metrics: str


def sft(config: SftConfig) -> SftReport:
    """Fine-tunes; the same call goes on where an interrupted one stopped.

    Raises:
        ValueError: Bad input, in one sentence.
        Interrupted: A signal asked to stop; everything is saved.
    """
    compute_dtype = config.compute_dtype or default_compute_dtype()
    with sole_writer(config.output_dir) if jax.process_index() == 0 else nullcontext():
        return train(config.model_copy(update={"compute_dtype": compute_dtype}))


def train(config: SftConfig) -> SftReport:
    """The run from its start, or from where it stopped, to its end; `compute_dtype` is decided."""
    layout = train_layout(make_mesh(config.mesh))
    check_output(config.output_dir, OUTPUTS)
    output = epath.Path(config.output_dir)
    start = open_start(config)
    tokenizer = ChatTokenizer.from_directory(start.tokenizer_dir)
    read = partial(
        read_examples, tokenizer=tokenizer, row_length=config.sequence_length, skip_too_long=config.skip_too_long
    )
    examples = read([Path(path) for path in config.train_files])
    held_out = read([Path(path) for path in config.eval_files]) if config.eval_files else None
    check_model(start.config, name=config.model, sequence_length=config.sequence_length, dtype=config.final_dtype)
    segments = [*examples.segments, *(held_out.segments if held_out else ())]
    check_tokens(start.config, segments, tokenizer=start.tokenizer_dir)
    describe(config, start.config, examples, held_out)

    schedule = make_schedule(config.optimizer, steps=config.steps)
    optimizer = make_optimizer(config.optimizer, schedule=schedule)
    stream = make_stream(config, examples)
    identity = run_identity(config, start, examples, held_out)
    store = TrainStore(output / "checkpoints", keep=config.keep)
    target = abstract_state(abstract_trained(config, start.config, layout), optimizer)
    step = newest_step(store, identity=identity) or 0
    if step > config.last_step:
        raise ValueError(f"{output} is at step {step} already, beyond stop_after = {config.last_step}")
    if step:
        LOG.info("going on after step %d of %s", step, output)
        state = store.restore(step, target)
        stream.set_state(store.record(step)["stream"])
    else:
        state = init_state(initial_trained(config, start, layout), optimizer)
    frozen = initial_weights(config, start, layout) if config.lora else None

    loss = make_loss(config, start.config, layout)
    train_step = make_train_step(loss, optimizer, shardings=jax.tree.map(lambda x: x.sharding, target))
    place = partial(place_batch, accumulation=config.accumulation, layout=layout)
    work = Work(
        train_step=partial(train_step, frozen=frozen),
        place=place,
        evaluate=make_evaluate(config, loss, held_out, place=place, frozen=frozen) if held_out else None,
        learning_rate=schedule,
    )
    intervals = Intervals(steps=config.last_step, eval_every=config.eval_every, save_every=config.save_every)
    with ExitStack() as resources:
        resources.enter_context(explained(f"cannot write {output}"))
        log = resources.enter_context(MetricsLog(output, resume_step=step)) if jax.process_index() == 0 else None
        stop = resources.enter_context(StopRequested())
        peers = resources.enter_context(Peers.meet(stop, publish=hosts_file(config.output_dir)))
        progress = resources.enter_context(progress_bar())
        trainer = Trainer(work, stream=stream, store=store, log=log, intervals=intervals, identity=identity)
        report = reporter(progress, done=step, steps=config.last_step)
        outcome = trainer.run(state, should_stop=peers.stopping, report=report)
    if not outcome.finished:
        raise Interrupted(f"step {int(outcome.state.step)} is saved in {output}; the same command goes on from there")
    return finish(config, start, outcome.state, frozen=frozen, store=store, target=target)


def open_start(config: SftConfig) -> Start:
    """Finds architecture, tokenizer and weights; a Hugging Face directory is converted into the output directory."""
    if config.model.endswith(".toml"):
        assert config.tokenizer is not None, "the config requires it"
        return Start(load_toml(config.model, ModelConfig), config.tokenizer, None)
    checkpoint = initial_checkpoint(config.model, output_dir=config.output_dir)
    tokenizer = config.tokenizer or checkpoint.tokenizer_dir
    return Start(checkpoint.config, tokenizer, checkpoint if config.init == "pretrained" else None)


def abstract_trained(config: SftConfig, model: ModelConfig, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """What is trained, before it exists: the adapters, or all weights."""
    if config.lora is not None:
        return abstract_adapters(model, config.lora, layout=layout)
    return abstract_params(model, dtype=config.param_dtype, layout=layout)


def initial_trained(config: SftConfig, start: Start, layout: Layout) -> Params:
    """What is trained, before the first step."""
    if config.lora is not None:
        return random_adapters(start.config, config.lora, jax.random.key(config.seed), layout)
    return initial_weights(config, start, layout)


def initial_weights(config: SftConfig, start: Start, layout: Layout) -> Params:
    """The stacked weights of the whole model."""
    if start.checkpoint is None:
        return random_weights(start.config, seed=config.seed, dtype=config.param_dtype, layout=layout)
    return checkpoint_weights(start.checkpoint, dtype=config.param_dtype, layout=layout)


def make_loss(config: SftConfig, model: ModelConfig, layout: Layout) -> Loss:
    """The loss of a micro-batch, of all parameters; `compute_dtype` is decided."""
    assert config.compute_dtype is not None
    return make_sft_loss(
        model,
        layout,
        compute_dtype=config.compute_dtype,
        logprob_chunk=config.logprob_chunk,
        remat=config.remat,
        lora=config.lora,
    )


def make_stream(config: SftConfig, train: Examples) -> BatchStream:
    """Batches in their order, from the first step on."""
    plan = plan_steps(
        [segment.slots for segment in train.segments],
        row_length=config.sequence_length,
        rows_per_step=config.rows_per_step,
        seed=config.seed,
        steps=config.last_step,
    )
    return BatchStream(train.examples, plan, row_length=config.sequence_length)


def run_identity(config: SftConfig, start: Start, train: Examples, held_out: Examples | None) -> dict[str, Any]:
    """What must not change between the parts of an interrupted run."""
    settings = config.model_dump(mode="json", include=IDENTITY)
    if config.lora is not None:
        # The checkpoints of the run do not hold the frozen weights: each part of it reads them anew.
        assert start.checkpoint is not None, "the config requires one with lora"
        settings |= {"lora": config.lora.model_dump(mode="json"), "frozen_weights": fingerprint(start.checkpoint)}
    return {
        **settings,
        "architecture": start.config.model_dump(mode="json"),
        "train_data": train.fingerprint(),
        "held_out_data": held_out.fingerprint() if held_out else None,  # its loss ranks the checkpoints
    }


def make_evaluate(
    config: SftConfig, loss: Loss, held_out: Examples, *, place: Callable[[PackedRows], Any], frozen: Params | None
) -> Callable[[Params], dict[str, float]]:
    """Builds ``evaluate(params) -> {"loss": mean}`` over every trained token of the held-out examples."""
    batches = one_pass(held_out.examples, row_length=config.sequence_length, rows_per_batch=config.rows_per_step)
    evaluate_batch = make_eval_step(loss)

    def evaluate(params: Params) -> dict[str, float]:
        sums = [evaluate_batch(params, place(batch), frozen) for batch in batches]
        total = np.sum([total for total, _ in sums], dtype=np.float64)
        return {"loss": float(total / sum(int(count) for _, count in sums))}

    return evaluate


def finish(
    config: SftConfig,
    start: Start,
    state: TrainState,
    *,
    frozen: Params | None,
    store: TrainStore,
    target: TrainState,
) -> SftReport:
    """Writes the final weights as a checkpoint, adapters by themselves; `target` describes a state."""
    last = int(state.step)
    chosen, state = final_state(state, final=config.final, store=store, target=target)
    params, adapter, model = state.params, None, None
    if config.lora is not None:
        assert frozen is not None and start.checkpoint is not None
        adapter = f"{config.output_dir}/adapter-{chosen:06d}"
        origin = start.checkpoint.manifest.origin
        export_adapter(adapter, state.params, start.config, config.lora, base_model=origin)
        params = merged_weights(frozen, params, config.lora) if config.merge_adapters else None
    if params is not None:
        model = f"{config.output_dir}/model-{chosen:06d}"
        write_model(
            model,
            params,
            start.config,
            dtype=config.final_dtype,
            tokenizer_dir=start.tokenizer_dir,
            made_by=[run_identity_of(store, chosen), chosen, config.final_dtype],
            origin=f"qwq-jax sft of {config.model}, step {chosen}",
        )
    made = [f"the model is {model}"] * (model is not None) + [f"the adapter is {adapter}"] * (adapter is not None)
    LOG.info("step %d of %d done; %s", last, config.steps, ", ".join(made))
    return SftReport(step=last, model=model, adapter=adapter, metrics=f"{config.output_dir}/metrics.jsonl")


def run_identity_of(store: TrainStore, step: int) -> dict[str, Any]:
    """The identity that a stored step was trained with."""
    return store.record(step)["identity"]


def describe(config: SftConfig, model: ModelConfig, train: Examples, held_out: Examples | None) -> None:
    """Logs what is about to happen."""
    slots = sum(segment.slots for segment in train.segments)
    per_step = config.rows_per_step * config.sequence_length
    if config.lora is not None:
        LOG.info("%.3f M parameters of adapters are trained", num_adapter_parameters(model, config.lora) / 1e6)
    LOG.info(
        "%.3f M parameters; %d sequences of %d tokens, %d of them trained (%d left out as too long); "
        "%d steps of %d tokens, about %.2f epochs",
        model.num_parameters / 1e6,
        len(train.segments),
        slots,
        train.trained_tokens,
        train.too_long,
        config.last_step,
        per_step,
        config.last_step * per_step / slots,
    )
    if held_out is not None:
        LOG.info("held out: %d sequences, %d trained tokens", len(held_out.segments), held_out.trained_tokens)
