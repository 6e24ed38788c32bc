"""`qwq-jax dpo` and `qwq-jax reward-model`: training on preferences from a config, resumable.

::

    OUTPUT_DIR/
      metrics.jsonl          one record a step: loss, accuracy, margin, chosen_reward, rejected_reward, eval_..., ...
      tensorboard/           the same numbers as events
      reference_logprobs.bin of DPO: what the policy thought of every token before the first step
      checkpoints/           to go on from: parameters, optimizer, data position
      model-000800/          the policy, as `generate` and `rl` take it; or the reward model, as `rl` and `export` do
      adapter-000800/        of DPO with `lora`: the adapters alone, as PEFT has them

DPO's reference is the policy at step 0. Its log-probabilities are computed once, before the first step: a second model
beside the one that is trained would be another 65 GB for a 32B, and every further pass over the data another forward.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint.directory import explained, open_directory, sole_writer
from qwq_jax.checkpoint.peft import export_adapter
from qwq_jax.checkpoint.store import Checkpoint
from qwq_jax.checkpoint.train_store import TrainStore
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.preference import PreferenceConfig
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
from qwq_jax.model.lora import random_adapters
from qwq_jax.processes import Peers
from qwq_jax.rl.learner import ForwardConfig, Rows, forward, make_scorer
from qwq_jax.rl.pair_training import (
    REFERENCE_COLUMN,
    REFERENCE_FILE,
    load_reference,
    make_dpo_loss,
    make_pair_evaluation,
    pairs_of,
    save_reference,
)
from qwq_jax.rl.preference_data import Pairs, policy_pair, read_pairs, reward_pair
from qwq_jax.rl.reward_model import HEAD, make_reward_loss, make_values, reading_file, reward_weights, with_scalar_head
from qwq_jax.runtime import default_compute_dtype
from qwq_jax.sharding import Layout, make_mesh, train_layout
from qwq_jax.train.batch import TrainBatch, place_batch
from qwq_jax.train.metrics import METRICS, MetricsLog
from qwq_jax.train.optimizer import make_optimizer, make_schedule
from qwq_jax.train.state import Params, TrainState, abstract_state, init_state
from qwq_jax.train.step import Loss, TrainStep, make_train_step
from qwq_jax.train.stream import BatchStream, one_pass, plan_steps, slots_of
from qwq_jax.train.trainer import Intervals, Trainer, Work, agree, newest_step
from qwq_jax.train.weights import abstract_adapters, abstract_params, checkpoint_weights, merged_weights

LOG = logging.getLogger(__name__)

# Settings that decide what is computed; the mesh, intervals and micro-batches do not.
IDENTITY = {"model", "dpo", "reward_model", "sequence_length", "rows_per_step", "steps", "seed", "lora"} | {
    "param_dtype",
    "compute_dtype",
    "optimizer",
}

# Of these at least one is in the directory of a run that has begun.
OUTPUTS = {"initial", "checkpoints", METRICS, HOSTS, REFERENCE_FILE}

# Sequences whose reference is computed before the next look at whether to stop.
_PART = 4096


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        config: The architecture that is trained: of a reward model, with its scalar head.
        tokenizer_dir: A local directory.
        checkpoint: Initial weights.
    """

    config: ModelConfig
    tokenizer_dir: str
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is held out, if anything is."""

    train: Pairs
    held_out: Pairs | None

    @property
    def all(self) -> list[Pairs]:
        """One or both."""
        return [self.train] if self.held_out is None else [self.train, self.held_out]


@dataclass(frozen=True)
class PreferenceReport:
    """What a run made.

    Attributes:
        step: Steps taken, earlier runs counted.
        model: The checkpoint with the final weights; ``None`` if adapters were trained and not merged.
        adapter: The directory of the adapters; ``None`` if all weights were trained, and of a reward model.
        metrics: The metrics file.
    """

    step: int
    model: str | None
    adapter: str | None
    metrics: str


def dpo(config: PreferenceConfig) -> PreferenceReport:
    """Trains a policy by DPO; the same call goes on where an interrupted one stopped.

    Raises:
        ValueError: Bad input, in one sentence.
        Interrupted: A signal asked to stop; everything is saved.
    """
    if config.dpo is None:
        raise ValueError("dpo: missing; qwq-jax reward-model takes a config with reward_model")
    return _run(config)


def reward_model(config: PreferenceConfig) -> PreferenceReport:
    """Trains a reward model; the same call goes on where an interrupted one stopped. Raises as `dpo` does."""
    if config.reward_model is None:
        raise ValueError("reward_model: missing; qwq-jax dpo takes a config with dpo")
    return _run(config)


def _run(config: PreferenceConfig) -> PreferenceReport:
    compute_dtype = config.compute_dtype or default_compute_dtype()
    with sole_writer(config.output_dir) if jax.process_index() == 0 else nullcontext():
        return train(config.model_copy(update={"compute_dtype": compute_dtype}))


def train(config: PreferenceConfig) -> PreferenceReport:
    """The run from its start, or from where it stopped, to its end; `compute_dtype` is decided."""
    layout = train_layout(make_mesh(config.mesh))
    check_output(config.output_dir, OUTPUTS)
    output = epath.Path(config.output_dir)
    start = open_start(config)
    data = read_data(config, start)
    describe(config, start.config, data)

    schedule = make_schedule(config.optimizer, steps=config.steps)
    optimizer = make_optimizer(config.optimizer, schedule=schedule)
    identity = run_identity(config, start, data)
    store = TrainStore(output / "checkpoints", keep=config.keep)
    target = abstract_state(abstract_trained(config, start.config, layout), optimizer)
    step = newest_step(store, identity=identity) or 0
    if step > config.last_step:
        raise ValueError(f"{output} is at step {step} already, beyond stop_after = {config.last_step}")
    with ExitStack() as resources:
        resources.enter_context(explained(f"cannot write {output}"))
        peers = Peers.meet(resources.enter_context(StopRequested()), publish=hosts_file(config.output_dir))
        stop = resources.enter_context(peers).stopping
        begun = begin(config, start, data, layout, step=step, stop=stop)
        if step:
            LOG.info("going on after step %d of %s", step, output)
        state = store.restore(step, target) if begun.trained is None else init_state(begun.trained, optimizer)
        stream = make_stream(config, begun.data.train)
        if step:
            stream.set_state(store.record(step)["stream"])
        log = resources.enter_context(MetricsLog(output, resume_step=step)) if jax.process_index() == 0 else None
        progress = resources.enter_context(progress_bar())
        shardings = jax.tree.map(lambda x: x.sharding, target)
        update = partial(make_train_step, optimizer=optimizer, shardings=shardings, denominator=pairs_of)
        trainer = Trainer(
            make_work(config, start.config, layout, update=update, begun=begun),
            stream=stream,
            store=store,
            log=log,
            intervals=Intervals(steps=config.last_step, eval_every=config.eval_every, save_every=config.save_every),
            identity=identity,
        )
        report = reporter(progress, done=step, steps=config.last_step)
        outcome = trainer.run(state, should_stop=stop, report=report)
    if not outcome.finished:
        raise Interrupted(f"step {int(outcome.state.step)} is saved in {output}; the same command goes on from there")
    return finish(config, start, outcome.state, frozen=begun.frozen, store=store, target=target)


def open_start(config: PreferenceConfig) -> Start:
    """Finds architecture, tokenizer and weights.

    Raises:
        ValueError: They cannot be read, or cannot be trained so.
    """
    checkpoint = initial_checkpoint(config.model, output_dir=config.output_dir)
    if config.dpo is not None and checkpoint.config.scalar_head:
        raise ValueError(f"model {config.model} is a reward model, and dpo trains a policy")
    model = checkpoint.config if config.dpo is not None else with_scalar_head(checkpoint.config)
    check_model(model, name=config.model, sequence_length=config.sequence_length, dtype=config.final_dtype)
    return Start(model, config.tokenizer or checkpoint.tokenizer_dir, checkpoint)


def read_data(config: PreferenceConfig, start: Start) -> Data:
    """The pairs of the run as its model reads them.

    Raises:
        ValueError: A line is no pair, or a token has no row in the embedding.
    """
    tokenizer = ChatTokenizer.from_directory(start.tokenizer_dir)
    encode = partial(policy_pair, tokenizer=tokenizer)
    if config.reward_model is not None:
        encode = partial(reward_pair, tokenizer=tokenizer, thoughts=config.reward_model.thoughts)
    read = partial(read_pairs, encode=encode, row_length=config.sequence_length, skip_too_long=config.skip_too_long)
    train = read([Path(path) for path in config.train_files])
    data = Data(train, read([Path(path) for path in config.eval_files]) if config.eval_files else None)
    segments = [segment for pairs in data.all for segment in pairs.segments]
    check_tokens(start.config, segments, tokenizer=start.tokenizer_dir)
    return data


def describe(config: PreferenceConfig, model: ModelConfig, data: Data) -> None:
    """Logs what is about to happen."""
    slots = sum(slots_of(pair) for pair in data.train.examples)
    per_step = config.rows_per_step * config.sequence_length
    LOG.info(
        "%.3f M parameters; %d pairs of %d tokens with their prompts (%d left out as too long), %d held out; "
        "%d steps of %d tokens, about %.2f epochs",
        model.num_parameters / 1e6,
        len(data.train.examples),
        slots,
        data.train.too_long,
        len(data.held_out.examples) if data.held_out else 0,
        config.last_step,
        per_step,
        config.last_step * per_step / slots,
    )
    if config.dpo is not None and (unused := sum(pairs.with_margin for pairs in data.all)):
        LOG.warning("%d pairs have a margin, which a reward model learns from and dpo does not", unused)


def run_identity(config: PreferenceConfig, start: Start, data: Data) -> dict[str, Any]:
    """What must not change between the parts of an interrupted run."""
    return {
        **config.model_dump(mode="json", include=IDENTITY),
        "architecture": start.config.model_dump(mode="json"),
        "initial_weights": fingerprint(start.checkpoint),
        "train_data": data.train.fingerprint(),
        "held_out_data": data.held_out.fingerprint() if data.held_out else None,  # its loss ranks the checkpoints
    }


def abstract_trained(config: PreferenceConfig, model: ModelConfig, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """What is trained, before it exists: all weights, or the adapters and, of a reward model, its head."""
    if config.lora is None:
        return abstract_params(model, dtype=config.param_dtype, layout=layout)
    head = {HEAD} if model.scalar_head else set()
    described = abstract_params(model, dtype="float32", layout=layout)
    return abstract_adapters(model, config.lora, layout=layout) | {name: described[name] for name in head}


@dataclass(frozen=True)
class Beginning:
    """What the first step of a run, or of a part of it, finds.

    Attributes:
        data: With the reference beside its tokens, if there is one.
        trained: Parameters that are trained, before the first step of all; ``None`` where the run goes on.
        frozen: Those that are not; ``None`` without adapters.
    """

    data: Data
    trained: Params | None
    frozen: Params | None


def begin(
    config: PreferenceConfig, start: Start, data: Data, layout: Layout, *, step: int, stop: Callable[[], bool]
) -> Beginning:
    """Loads the initial weights where they are needed: for the first step, under adapters, and for the reference."""
    reference = known_reference(config, start, data) if config.dpo is not None else []
    weights = None
    if config.lora is not None or not step or reference is None:
        load = reward_weights if start.config.scalar_head else checkpoint_weights
        weights = load(start.checkpoint, dtype=config.param_dtype, layout=layout)
    if reference is None:
        assert weights is not None
        reference = compute_reference(config, start, data, layout, weights, stop=stop)
    if reference:
        data = with_reference(data, reference)
    if config.lora is None:
        return Beginning(data, None if step else weights, None)
    assert weights is not None
    frozen = {name: array for name, array in weights.items() if name != HEAD}
    trained = random_adapters(start.config, config.lora, jax.random.key(config.seed), layout)
    if start.config.scalar_head:
        trained[HEAD] = weights[HEAD].astype(jnp.float32)
    return Beginning(data, None if step else trained, frozen)


def known_reference(config: PreferenceConfig, start: Start, data: Data) -> list[np.ndarray] | None:
    """What an earlier part of the run computed; ``None``, on all processes, if it has to be computed."""
    directory = open_directory(config.output_dir)
    lengths = [int(segment.trained.sum()) for pairs in data.all for segment in pairs.segments]
    found = load_reference(directory, lengths, identity=reference_identity(config, start, data))
    return None if agree(found is None) else found


def compute_reference(
    config: PreferenceConfig, start: Start, data: Data, layout: Layout, weights: Params, *, stop: Callable[[], bool]
) -> list[np.ndarray]:
    """Log-probabilities of every trained token by `weights`, which are written down.

    Raises:
        Interrupted: A signal asked to stop; the next part of the run begins with the first sequence.
    """
    rows = Rows(config.sequence_length, config.rows_per_step // config.accumulation, layout)
    run = forward(start.config, layout, forward_config(config))
    score = make_scorer(lambda params, batch: run(params, batch)[0], rows)
    segments = [segment for pairs in data.all for segment in pairs.segments]
    LOG.info("computing the reference of %d sequences", len(segments))
    found: list[np.ndarray] = []
    for begin in range(0, len(segments), _PART):
        if agree(stop()):
            raise Interrupted("the reference is not computed yet; the same command begins with it")
        found += score(weights, segments[begin : begin + _PART])
    if jax.process_index() == 0:
        save_reference(open_directory(config.output_dir), found, identity=reference_identity(config, start, data))
    return found


def reference_identity(config: PreferenceConfig, start: Start, data: Data) -> str:
    """Hash of all that decides the log-probabilities of the reference, and their order."""
    known = [fingerprint(start.checkpoint), config.compute_dtype, *(pairs.fingerprint() for pairs in data.all)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def with_reference(data: Data, reference: Sequence[np.ndarray]) -> Data:
    """The data with the reference's log-probabilities beside their tokens."""
    count = len(data.train.segments)
    train = data.train.with_column(REFERENCE_COLUMN, reference[:count])
    held_out = data.held_out and data.held_out.with_column(REFERENCE_COLUMN, reference[count:])
    return replace(data, train=train, held_out=held_out)


def forward_config(config: PreferenceConfig) -> ForwardConfig:
    """How log-probabilities are computed, those of the policy and of the reference."""
    assert config.compute_dtype is not None
    return ForwardConfig(config.compute_dtype, 1.0, config.logprob_chunk, remat=config.remat)


def make_loss(config: PreferenceConfig, model: ModelConfig, layout: Layout) -> Loss:
    """The loss of a micro-batch, of all parameters."""
    if config.dpo is not None:
        return make_dpo_loss(model, layout, forward_config(config), objective=config.dpo, lora=config.lora)
    assert config.reward_model is not None and config.compute_dtype is not None
    values = make_values(model, layout, compute_dtype=config.compute_dtype, remat=config.remat, lora=config.lora)
    return make_reward_loss(values, config.reward_model)


def make_work(
    config: PreferenceConfig,
    model: ModelConfig,
    layout: Layout,
    *,
    update: Callable[[Loss], TrainStep],
    begun: Beginning,
) -> Work:
    """What the loop calls; `update` makes the step of a loss."""
    loss = make_loss(config, model, layout)
    train_step = update(loss)
    count = jax.jit(pairs_of)
    # Of a reward model one slot a sequence counts, which is no number of tokens.
    unsaid = {"tokens"} if model.scalar_head else set()

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        state, metrics = train_step(state, batch, begun.frozen)
        return state, {name: x for name, x in metrics.items() if name not in unsaid} | {"pairs": count(batch)}

    place = partial(place_batch, accumulation=config.accumulation, layout=layout)
    evaluate = None
    if begun.data.held_out is not None:
        batches = one_pass(
            begun.data.held_out.examples, row_length=config.sequence_length, rows_per_batch=config.rows_per_step
        )
        evaluate = make_pair_evaluation(loss, batches, place=place, frozen=begun.frozen)
    schedule = make_schedule(config.optimizer, steps=config.steps)
    return Work(train_step=step, place=place, evaluate=evaluate, learning_rate=schedule)


def make_stream(config: PreferenceConfig, train: Pairs) -> BatchStream:
    """Batches in their order, from the first step on."""
    plan = plan_steps(
        [slots_of(pair) for pair in train.examples],
        row_length=config.sequence_length,
        rows_per_step=config.rows_per_step,
        seed=config.seed,
        steps=config.last_step,
    )
    return BatchStream(train.examples, plan, row_length=config.sequence_length)


def finish(
    config: PreferenceConfig,
    start: Start,
    state: TrainState,
    *,
    frozen: Params | None,
    store: TrainStore,
    target: TrainState,
) -> PreferenceReport:
    """Writes the final weights as a checkpoint, a policy's adapters by themselves; `target` describes a state."""
    last = int(state.step)
    chosen, state = final_state(state, final=config.final, store=store, target=target)
    params, adapter, model = state.params, None, None
    if config.lora is not None:
        assert frozen is not None
        head = {name: array for name, array in params.items() if name == HEAD}
        adapters = {name: array for name, array in params.items() if name != HEAD}
        if config.dpo is not None:
            adapter = f"{config.output_dir}/adapter-{chosen:06d}"
            origin = start.checkpoint.manifest.origin
            export_adapter(adapter, adapters, start.config, config.lora, base_model=origin)
        params = {**merged_weights(frozen, adapters, config.lora), **head} if config.merge_adapters else None
    if params is not None:
        model = f"{config.output_dir}/model-{chosen:06d}"
        write_model(
            model,
            params,
            start.config,
            dtype=config.final_dtype,
            tokenizer_dir=start.tokenizer_dir,
            made_by=[store.record(chosen)["identity"], chosen, config.final_dtype],
            origin=f"qwq-jax {'dpo' if config.dpo else 'reward-model'} of {config.model}, step {chosen}",
            files=reading_file(config.reward_model) if config.reward_model is not None else {},
        )
    made = [f"the model is {model}"] * (model is not None) + [f"the adapter is {adapter}"] * (adapter is not None)
    LOG.info("step %d of %d done; %s", last, config.steps, ", ".join(made))
    return PreferenceReport(step=last, model=model, adapter=adapter, metrics=f"{config.output_dir}/{METRICS}")
