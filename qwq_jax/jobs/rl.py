"""`qwq-jax rl`: reinforcement learning from a config, resumable, ending in an ordinary checkpoint.

::

    OUTPUT_DIR/
      metrics.jsonl          one record a step: reward, accuracy, length, entropy, kl, seconds of each phase, ...
      tensorboard/           the same numbers as events
      evaluations/           held-out replies as they were judged, 000000.json before the first step
      checkpoints/           to go on from: parameters, optimizer, position in the prompts
      model-000200/          what `generate`, `chat`, `serve` and `export` take, written when the run ends
      adapter-000200/        with `lora`: the adapters alone, as PEFT has them
      report.html            the run as one page
      hosts.json             of several processes: how each host does, once a minute
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from etils import epath

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint.directory import explained, sole_writer
from qwq_jax.checkpoint.store import Checkpoint
from qwq_jax.checkpoint.train_store import TrainStore
from qwq_jax.config.rl import RlConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.runner import DeviceRunner
from qwq_jax.interrupt import Interrupted, StopRequested
from qwq_jax.jobs.evaluation_files import EvaluationFiles, judged_tasks, read_scores
from qwq_jax.jobs.fine_tuning import hosts_file
from qwq_jax.jobs.rl_end import finish
from qwq_jax.jobs.rl_start import (
    Start,
    engine_layout,
    engine_settings,
    make_policy,
    make_state,
    open_start,
    reward_scorers,
)
from qwq_jax.processes import Peers
from qwq_jax.rl.dashboard import Dashboard
from qwq_jax.rl.heldout import HeldOut
from qwq_jax.rl.judging import SharedJudge
from qwq_jax.rl.optimizers import make_optimizers
from qwq_jax.rl.policy import LearnConfig
from qwq_jax.rl.prompts import Prompt, PromptOrder, make_prompts, measured, select
from qwq_jax.rl.rewards.graded import check_task
from qwq_jax.rl.rewards.pool import RewardPool
from qwq_jax.rl.rollout import Rollouts
from qwq_jax.rl.tasks import load_tasks
from qwq_jax.rl.trainer import Hands, Outcome, Plan, Trainer
from qwq_jax.rl.types import Task
from qwq_jax.runtime import default_compute_dtype
from qwq_jax.sharding import make_mesh, train_layout
from qwq_jax.train.metrics import METRICS, MetricsLog, read_records
from qwq_jax.train.trainer import newest_step

LOG = logging.getLogger(__name__)

# Settings that decide what is computed; the mesh, intervals, micro-batches and the engine do not.
IDENTITY = {
    *("model", "tasks", "curriculum", "rewards", "rollout", "objective", "critic", "lora", "steps", "updates_per_step"),
    *("passes_per_step", "seed", "param_dtype", "compute_dtype", "optimizer"),
}


@dataclass(frozen=True)
class RlReport:
    """What a run made.

    Attributes:
        step: Steps taken, earlier runs counted.
        model: The checkpoint with the final weights.
        adapter: The directory of the adapters; None if all weights were trained.
        metrics: The metrics file.
        report: The page; None on all processes but the first.
    """

    step: int
    model: str
    adapter: str | None
    metrics: str
    report: str | None


@dataclass(frozen=True)
class Tasks:
    """What is asked in a run: tasks to train on, and those that are held out."""

    train: list[Task]
    held_out: list[Task]


def rl(config: RlConfig) -> RlReport:
    """Trains; the same call goes on where an interrupted one stopped.

    Raises:
        ValueError: Bad input, in one sentence.
        Interrupted: A signal asked to stop; everything is saved.
    """
    compute_dtype = config.compute_dtype or default_compute_dtype()
    with sole_writer(config.output_dir) if jax.process_index() == 0 else nullcontext():
        return train(config.model_copy(update={"compute_dtype": compute_dtype}))


def train(config: RlConfig) -> RlReport:
    """The run from its start, or from where it stopped, to its end; `compute_dtype` is decided."""
    layout = train_layout(make_mesh(config.mesh))
    tasks = read_tasks(config)
    start = open_start(config)
    tokenizer = ChatTokenizer.from_directory(start.tokenizer_dir)
    prompts = make_prompts(tasks.train, tokenizer, longest=config.rollout.max_prompt_tokens)
    order = PromptOrder(prompts, seed=config.seed, easy_first=config.curriculum.order == "easy_first")
    output = epath.Path(config.output_dir)
    store = TrainStore(output / "checkpoints", keep=config.keep)
    identity = run_identity(config, start.checkpoint, tasks)
    step = newest_step(store, identity=identity) or 0
    if step > config.last_step:
        raise ValueError(f"{output} is at step {step} already, beyond stop_after = {config.last_step}")
    optimizers = make_optimizers(config)
    state, target = make_state(config, start, layout, optimizers, store=store, step=step)
    policy = make_policy(config, start, layout, optimizers, target=target)
    cursor = store.record(step)["cursor"] if step else 0
    LOG.info("%s, %s", describe(config, tasks, prompts), f"going on after step {step}" if step else f"into {output}")
    with ExitStack() as resources:
        resources.enter_context(explained(f"cannot write {output}"))
        log = resources.enter_context(MetricsLog(output, resume_step=step)) if jax.process_index() == 0 else None
        pool = resources.enter_context(RewardPool(config.rewards, workers=config.reward_workers))
        stop = resources.enter_context(StopRequested())
        peers = resources.enter_context(Peers.meet(stop, publish=hosts_file(config.output_dir)))
        judge = SharedJudge(config.rewards, pool, reward_scorers(config, tokenizer, policy.rows), tokenizer)
        engine = make_engine(config, start, policy.engine_params(state))
        rollouts = Rollouts(engine, tokenizer, judge, config.rollout)
        evaluate = make_evaluation(config, tasks, tokenizer, rollouts, output) if tasks.held_out else None
        records = read_records(log.path) if log is not None and step else []
        dashboard = resources.enter_context(
            Dashboard(output.name, steps=config.last_step, history=records, shown=jax.process_index() == 0)
        )
        trainer = Trainer(
            policy=policy,
            learning=learn_config(config),
            engine=engine,
            rollouts=rollouts,
            order=order,
            store=store,
            log=log,
            plan=Plan(config.last_step, config.evaluation.every if config.evaluation else 0, config.save_every),
            identity=identity,
            evaluate=evaluate,
            learning_rate=optimizers.schedule,
            hands=Hands(make_stopping(peers), dashboard.phase, dashboard.update),
        )
        outcome = trainer.run(state, step=step, cursor=cursor)
    if not outcome.finished:
        raise Interrupted(f"step {outcome.step} is saved in {output}; the same command goes on from there")
    return report_of(
        config, outcome, finish(config, start, policy, outcome, store=store, target=target, tasks=tasks.held_out)
    )


def describe(config: RlConfig, tasks: Tasks, prompts: Sequence[Prompt]) -> str:
    """What is about to happen."""
    batch = f"{config.rollout.prompts_per_step} prompts x {config.rollout.group_size} completions"
    return f"{len(prompts)} tasks, {len(tasks.held_out)} held out; {config.last_step} steps of {batch}"


def report_of(config: RlConfig, outcome: Outcome, made: dict[str, str | None]) -> RlReport:
    """What the run made."""
    model = made["model"]
    assert model is not None
    return RlReport(outcome.step, model, made["adapter"], f"{config.output_dir}/{METRICS}", made["report"])


def read_tasks(config: RlConfig) -> Tasks:
    """The tasks of the run, checked against its rewards.

    Raises:
        ValueError: A task cannot be read or judged, or is to be trained on and held out.
    """
    training = load_tasks(config.tasks)
    held_out = load_tasks(config.evaluation.tasks) if config.evaluation else []
    for task in [*training, *held_out]:
        check_task(config.rewards, task)
    asked = {json.dumps(task.messages) for task in training}
    both = next((task.task_id for task in held_out if json.dumps(task.messages) in asked), None)
    if both is not None:
        raise ValueError(f"task {both} of evaluation is one of those that are trained on")
    if config.curriculum.evaluation is not None:
        files = EvaluationFiles(Path(config.curriculum.evaluation))
        training = measured(training, judged_tasks(read_scores(files)))
    return Tasks(select(training, config.curriculum), held_out)


def run_identity(config: RlConfig, checkpoint: Checkpoint, tasks: Tasks) -> dict[str, Any]:
    """What must not change between the parts of an interrupted run."""
    weights = [(record.path, record.stored_sha256) for record in checkpoint.manifest.tensors]
    asked = [[task.task_id, task.messages, task.source, repr(task.judge)] for task in [*tasks.train, *tasks.held_out]]
    return {
        **config.model_dump(mode="json", include=IDENTITY),
        "weights": hashlib.sha256(json.dumps(weights).encode()).hexdigest(),
        "asked": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    }


def make_engine(config: RlConfig, start: Start, params: Any) -> Engine:
    """The engine on the devices of the run, in their DECODE arrangement."""
    runner = DeviceRunner(start.config, params, engine_layout(config), engine_settings(config))
    return Engine(runner, start.config.vocab_size, start.config.eos_token_ids, run_seed=config.seed)


def make_evaluation(
    config: RlConfig, tasks: Tasks, tokenizer: ChatTokenizer, rollouts: Rollouts, output: epath.Path
) -> Any:
    """Builds ``evaluate(step) -> measures`` on the held-out tasks."""
    assert config.evaluation is not None
    params = SamplingParams(
        temperature=config.evaluation.temperature,
        max_tokens=config.evaluation.max_tokens or config.rollout.max_tokens,
        n=config.evaluation.samples,
    )
    prompts = make_prompts(tasks.held_out, tokenizer, longest=config.rollout.max_prompt_tokens)
    directory = output / "evaluations" if jax.process_index() == 0 else None
    return HeldOut(prompts, rollouts, params, directory=directory).measure


def learn_config(config: RlConfig) -> LearnConfig:
    """How a batch is trained on."""
    return LearnConfig(
        config.objective,
        updates=config.updates_per_step,
        passes=config.passes_per_step,
        longest=config.rollout.max_tokens,
        old_logprobs=config.needs_old_logprobs,
        critic_first=critic.learns_first if (critic := config.critic_or_default) else 0,
    )


def make_stopping(peers: Peers) -> Any:
    """Builds the question whether to stop, which all processes answer alike after the same step of the engine."""
    return partial(peers.stopping_together, 0) if peers.count > 1 else peers.stopping
