"""A run of six short steps in which all that a resume has to restore is at work, and whether two runs are the same.

Batches are refilled (DAPO), divided into two updates and gone over twice, so that steps, updates and the position in
the prompts all differ; passes over the tasks end within steps; held-out prompts begin like those of training, and are
answered after every step.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from qwq_jax.checkpoint.store import open_checkpoint, read_param
from qwq_jax.train.metrics import read_records
from tests.jobs.rl_worker import Order
from tests.rl.tiny_run import write_base

STEPS = 6
TIMES = ("seconds", "tokens_per_second")


def write_tasks(path: Path, names: str) -> None:
    """Prompts that differ in their last letter only; replies to every third are worth half a point more."""
    with path.open("w") as file:
        for number, name in enumerate(names):
            task = {
                "id": f"{path.stem} {name}",
                "prompt": f"one two {name}",
                "source": "sums" if number % 2 else "words",
            }
            file.write(json.dumps(task | {"answer": 0.5 * (number % 3 == 0)}) + "\n")


def write_recipe(folder: Path) -> Path:
    """The config, with everything it needs beside it."""
    base = write_base(folder / "made")
    write_tasks(folder / "train.jsonl", "abcdefghijk")
    write_tasks(folder / "held_out.jsonl", "xyz")
    path = folder / "rl.toml"
    path.write_text(f"""
model = "{base}"
output_dir = "{folder}/whole"
steps = {STEPS}
save_every = 2
updates_per_step = 2
passes_per_step = 2
rows_per_micro_batch = 4
reward_workers = 1
remat = false
final_dtype = "float32"
[[tasks]]
kind = "file"
path = "{folder}/train.jsonl"
[[rewards]]
kind = "custom"
function = "tests.jobs.even_reward:even"
[rollout]
prompts_per_step = 4
group_size = 4
max_prompt_tokens = 32
max_tokens = 16
temperature = 0.8
[objective]
name = "dapo"
[evaluation]
every = 1
samples = 2
temperature = 1.0
[[evaluation.tasks]]
kind = "file"
path = "{folder}/held_out.jsonl"
[engine]
max_sequences = 8
page_size = 8
prefill_chunk = 32
max_prefill_sequences = 8
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
""")
    return path


def order(recipe: Path, output: Path, *options: str, notes: str = "", **moment: Any) -> Order:
    """To run the recipe into a directory; `moment` says when to die of what."""
    arguments = ("rl", str(recipe), "--set", f"output_dir={output}", *options)
    return Order(arguments, notes or f"{output}.notes", **moment)


def without_times(output: Path) -> list[dict[str, float]]:
    records = read_records(output / "metrics.jsonl")
    return [{name: value for name, value in record.items() if not name.startswith(TIMES)} for record in records]


def stored_state(output: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    path = output / "checkpoints" / f"step_{step:08d}" / "arrays"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        names = checkpointer.metadata(path).item_metadata.tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def draws(output: Path, suffix: str = "") -> dict[int, dict[str, Any]]:
    """What each step drew; one that was done again drew the same again."""
    found: dict[int, dict[str, Any]] = {}
    for line in Path(f"{output}.notes{suffix}").read_text().splitlines():
        draw = json.loads(line)
        assert found.setdefault(draw["step"], draw) == draw, f"step {draw['step']} drew something else"
    return found


def evaluations(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "evaluations").iterdir())}


def assert_same_run(left: Path, right: Path, *, steps: int = STEPS, notes: str = "") -> None:
    """Bitwise: prompts, tokens and log-probabilities, metrics but for times, parameters, optimizer and position."""
    drawn = draws(left, notes), draws(right, notes)
    assert list(drawn[0]) == list(range(1, steps + 1)) and drawn[0] == drawn[1]
    assert without_times(left) == without_times(right)
    assert [record["step"] for record in without_times(left)] == list(range(steps + 1))
    assert evaluations(left) == evaluations(right)
    states = stored_state(left, steps), stored_state(right, steps)
    assert states[0].keys() == states[1].keys() and any("|mu|" in key for key in states[0])
    for key, value in states[0].items():
        assert value.tobytes() == states[1][key].tobytes(), key
    records = [(run / "checkpoints" / f"step_{steps:08d}" / "record.json").read_text() for run in (left, right)]
    assert records[0] == records[1]
    models = [open_checkpoint(f"{run}/model-{steps:06d}") for run in (left, right)]
    for path in models[0].spec:
        assert read_param(models[0], path).tobytes() == read_param(models[1], path).tobytes(), path
