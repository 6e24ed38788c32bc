"""How a run of reinforcement learning ends: a checkpoint, adapters by themselves, and the page to look at."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath

from qwq_jax.checkpoint.peft import export_adapter
from qwq_jax.checkpoint.train_store import TrainStore
from qwq_jax.config.rl import RlConfig
from qwq_jax.jobs.rl_start import Start
from qwq_jax.rl.evaluate import compare, evaluate
from qwq_jax.rl.heldout import read_judged
from qwq_jax.rl.policy import Policy, RlState
from qwq_jax.rl.report import Curves, Report, Results, ShownTask, write_report
from qwq_jax.rl.trainer import Outcome
from qwq_jax.rl.types import Task
from qwq_jax.train.metrics import METRICS, read_records
from qwq_jax.train.weights import companion_files, merged_weights, write_checkpoint


def finish(
    config: RlConfig,
    start: Start,
    policy: Policy,
    outcome: Outcome,
    *,
    store: TrainStore,
    target: RlState,
    tasks: Sequence[Task],
) -> dict[str, str | None]:
    """Writes what a run leaves; gives the places of ``model``, ``adapter`` and ``report``."""
    chosen = store.best_step() if config.final == "best" else outcome.step
    assert chosen is not None, "the last step is always evaluated"
    state = outcome.state
    if chosen != outcome.step:
        # One state at a time: there may not be room for two.
        jax.tree.map(lambda x: x.delete(), state)
        state = store.restore(chosen, target)
    params, adapter = state.policy.params, None
    if config.lora is not None:
        assert policy.frozen is not None
        adapter = f"{config.output_dir}/adapter-{chosen:06d}"
        origin = start.checkpoint.manifest.origin
        export_adapter(adapter, params, start.config, config.lora, base_model=origin)
        params = merged_weights(policy.frozen, params, config.lora)
    model = f"{config.output_dir}/model-{chosen:06d}"
    identity = [store.record(chosen)["identity"], chosen, config.final_dtype]
    write_checkpoint(
        model,
        params,
        start.config,
        dtype=config.final_dtype,
        files=companion_files(start.tokenizer_dir),
        identity=json.dumps(identity, sort_keys=True),
        origin=f"{config.output_dir} step {chosen}",
    )
    report = write_page(config, tasks, last=chosen) if jax.process_index() == 0 else None
    return {"model": model, "adapter": adapter, "report": report}


def write_page(config: RlConfig, tasks: Sequence[Task], *, last: int) -> str | None:
    """Writes ``report.html`` into a local output directory; None if it is a bucket."""
    if "://" in config.output_dir:
        return None
    output = Path(config.output_dir)
    records = tuple(read_records(output / METRICS))
    results, samples = Results(), ()
    found = [epath.Path(output / "evaluations" / f"{step:06d}.json") for step in (0, last)]
    if all(path.exists() for path in found):
        (before, old), (after, new) = map(read_judged, found)
        samples_of = len(before[0].samples)
        ks = sorted({1, samples_of})
        results = Results(evaluate(before, ks), evaluate(after, ks), compare(before, after, ks))
        samples = tuple(
            ShownTask(task, old.get(task.task_id), new.get(task.task_id)) for task in tasks if task.task_id in new
        )
    seconds = sum(record.get("seconds", 0.0) for record in records)
    report = Report(
        output.name,
        f"{config.objective.name} on {config.model}, {last} steps of {config.rollout.samples_per_step} completions.",
        facts={"steps": str(last), "time of the steps": f"{seconds / 60:.1f} min", "seed": str(config.seed)},
        curves=(Curves(output.name, (records,)),),
        results=results,
        samples=samples,
        config=config.model_dump(mode="json"),
    )
    path = output / "report.html"
    write_report(path, report)
    return str(path)
