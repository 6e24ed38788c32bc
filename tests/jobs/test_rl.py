"""The verb itself: a run that is stopped or killed at any moment and resumed is the run that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwq_jax.__main__ import main
from qwq_jax.checkpoint.directory import sole_writer
from qwq_jax.checkpoint.peft import read_adapter
from qwq_jax.checkpoint.store import open_checkpoint, read_param
from qwq_jax.rl.rollout import Rollouts
from tests.jobs import rl_recipe
from tests.jobs.rl_recipe import STEPS, assert_same_run, draws, order, stored_state, without_times, write_recipe
from tests.jobs.rl_worker import PHASES, Order, noting
from tests.rl.tiny_run import MODEL


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def run(recipe: Path, output: Path, *settings: str) -> int:
    """The verb in this process; what it draws is noted."""
    words = [part for setting in (f"output_dir={output}", *settings) for part in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollouts, "batch", noting(Path(f"{output}.notes")))
        return main(["rl", str(recipe), *words])


@pytest.fixture(scope="module")
def whole(recipe) -> Path:
    output = recipe.parent / "whole"
    assert run(recipe, output) == 0
    return output


def test_a_run_leaves_metrics_evaluations_a_checkpoint_and_a_page(whole):
    records = without_times(whole)
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    assert set(records[0]) > {"eval_accuracy", "eval_reward", "eval_accuracy/sums", "eval_accuracy/words"}
    assert all(record["updates"] == 4 and record["max_rollout_gap"] < 1e-4 for record in records[1:])
    assert sorted(path.name for path in (whole / "evaluations").iterdir()) == [f"{i:06d}.json" for i in range(7)]
    checkpoint = open_checkpoint(f"{whole}/model-{STEPS:06d}")
    assert checkpoint.dtype == np.float32 and {"tokenizer.json", "config.json"} <= set(checkpoint.manifest.files)
    page = (whole / "report.html").read_text()
    assert "dapo on" in page and "one two x" in page, "what it was, and samples of replies"
    assert any((whole / "tensorboard").iterdir())


def test_the_recipe_is_a_test_of_resuming(whole):
    """Refills, prompts that come round again within a step, updates that move the policy, replies of many lengths."""
    drawn = draws(whole)
    cursors = [draw["cursors"] for draw in drawn.values()]
    assert cursors[0][0] == 0 and all(left[1] == right[0] for left, right in zip(cursors, cursors[1:], strict=False))
    assert cursors[-1][1] > 4 * STEPS, "a group was refilled"
    assert any(begin // 11 != (end - 1) // 11 for begin, end in cursors), "a pass ends within a step"
    lengths = {len(tokens) for draw in drawn.values() for tokens in draw["tokens"]}
    assert len(lengths) > 4
    tokens = [tuple(tokens) for draw in drawn.values() for tokens in draw["tokens"]]
    assert len(set(tokens)) > 0.9 * len(tokens), "noise differs between steps"
    assert all(0.001 < record["update_kl"] for record in without_times(whole)[1:4])


def test_asked_to_stop_within_a_rollout_it_saves_and_says_so(recipe, whole, tmp_path, monkeypatch, capsys):
    output, batch = tmp_path / "run", Rollouts.batch

    def interrupted(self, order, cursor, *, step, **options):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, order, cursor, step=step, **options)

    monkeypatch.setattr(Rollouts, "batch", interrupted)
    assert run(recipe, output) == 42
    assert f"interrupted: step 3 is saved in {output}; the same command goes on from there" in capsys.readouterr().err
    record = json.loads((output / "checkpoints" / "step_00000003" / "record.json").read_text())
    assert record["metric"] is None, "no checkpoint that an interruption made is ranked"
    monkeypatch.setattr(Rollouts, "batch", batch)
    assert run(recipe, output) == 0
    assert_same_run(output, whole)


def test_a_finished_run_draws_nothing_more(recipe, whole, monkeypatch, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    monkeypatch.setattr(Rollouts, "draw", lambda *_, **__: pytest.fail("it draws"))
    assert run(recipe, output, "final=best") == 0
    assert without_times(output) == without_times(whole)
    accuracy = {
        record["step"]: record["eval_accuracy"] for record in without_times(whole) if record["step"] in (2, 4, 6)
    }
    best = max(accuracy, key=accuracy.__getitem__)
    model = open_checkpoint(f"{output}/model-{best:06d}")
    stored = stored_state(output, best)["policy|params|embed.embedding"]
    np.testing.assert_array_equal(read_param(model, "embed.embedding"), stored)


def refused(capsys, recipe, output, *settings) -> str:
    """Expects exit code 2 and returns the one sentence."""
    capsys.readouterr()
    assert run(recipe, output, *settings) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("seed=7", "was trained with seed = 0, this run has 7"),
        ("rollout.temperature=0.9", "was trained with rollout = "),
        ("objective.name=grpo", "was trained with objective = "),
        ("optimizer.learning_rate=1e-4", "was trained with optimizer = "),
        ("stop_after=3", "is at step 6 already, beyond stop_after = 3"),
        ('tasks=[{kind="file", path="/absent.jsonl"}]', "/absent.jsonl: no such file"),
        ('rewards=[{kind="custom", function="tests.jobs.even_reward:odd"}]', "tests.jobs.even_reward"),
        ('rewards=[{kind="exact", sources=["sums"]}]', "no reward judges source 'words'"),
        ("rollout.max_tokens=300", "max_prompt_tokens + max_tokens = 332 is beyond the 256 positions"),
        ("rollout.max_prompt_tokens=5", "none of 11 tasks has a prompt of at most 5 tokens"),
        ("tokenizer=/absent", "/absent: no tokenizer.json"),
        ("model=/absent", "/absent"),
        ("curriculum.evaluation=/absent", "/absent: no finished evaluation is there"),
        ("curriculum.order=easy_first", "easy_first needs a difficulty for each task"),
    ],
)
def test_bad_input_is_one_sentence(recipe, whole, capsys, setting, sentence):
    output = whole if "was trained" in sentence or "already" in sentence else whole.parent / "other"
    assert sentence in refused(capsys, recipe, output, setting)
    assert without_times(whole)[-1]["step"] == STEPS


def test_what_is_held_out_is_not_trained_on(recipe, capsys, tmp_path):
    lines = (recipe.parent / "train.jsonl").read_text().splitlines()
    (tmp_path / "leak.jsonl").write_text(lines[3].replace("train d", "another name") + "\n")
    leak = f'evaluation.tasks=[{{kind="file", path="{tmp_path}/leak.jsonl"}}]'
    error = refused(capsys, recipe, tmp_path / "run", leak)
    assert error == "error: task another name of evaluation is one of those that are trained on"


def test_directories_of_others_are_left_alone(recipe, whole, capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    error = refused(capsys, recipe, tmp_path)
    assert error == f"error: {tmp_path} holds something else; give an empty or new directory"
    with sole_writer(str(whole)):
        assert f"{whole} is being written by another process" in refused(capsys, recipe, whole)


def children(orders: list[Order]) -> list[int]:
    """Carries out orders one after the other; their exit codes."""
    words = [sys.executable, "-m", "tests.jobs.rl_worker", *(each.text() for each in orders)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def moments(notes: str, steps: dict[str, int], seed: int) -> list[dict]:
    """One in each phase, at a step of its own and an event by chance, of those that an undisturbed run has there."""
    counts = json.loads(Path(notes + ".counts").read_text())
    chance = random.Random(seed)
    return [
        {"step": step, "phase": phase, "event": chance.randint(1, counts[f"{step} {phase}"])}
        for phase, step in steps.items()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_killed_in_every_phase_it_is_bitwise_the_same_run(recipe, tmp_path, seed):
    """SIGKILL, one phase after the other, each in a later step; between them no run comes to its end."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert children([order(recipe, calm)]) == [0]
    steps = {"evaluation": 0, "rollout": 1, "save": 2, "reward": 3, "update": 3, "sync": 5, "end": 6}
    assert set(steps) == set(PHASES)
    at = moments(f"{calm}.notes", steps, seed)
    orders = [order(recipe, killed, signal=signal.SIGKILL, **moment) for moment in at]
    assert children([*orders, order(recipe, killed)]) == [-signal.SIGKILL] * len(orders) + [0], at
    assert_same_run(killed, calm)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_asked_to_stop_in_any_phase_it_loses_nothing(recipe, whole, tmp_path):
    """SIGTERM: what was under way is finished, saved and never done again; exit 42."""
    output = tmp_path / "run"
    steps = {"evaluation": 0, "update": 2, "reward": 3, "save": 4, "sync": 5}
    orders = [
        order(recipe, output, signal=signal.SIGTERM, step=step, phase=phase, event=2) for phase, step in steps.items()
    ]
    assert children([*orders, order(recipe, output)]) == [42] * len(orders) + [0]
    assert_same_run(output, whole)


OTHERS = {
    "reference and adapters": ["objective.name=grpo", "lora.rank=4", "lora.alpha=8"],
    "critic": ["objective.name=ppo", "critic.learns_first=1"],
    "divergence in the reward": ["objective.name=rloo"],
    "several devices": ["mesh.data=2", "mesh.fsdp=2", "decode_mesh.tensor=2", "decode_mesh.data=2"],
}
QUICK = ("reference and adapters", "critic")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHERS if name not in QUICK)]
)
def test_other_runs_resume_bitwise_too(recipe, tmp_path, name):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    settings = [*OTHERS[name], "steps=3", "evaluation.every=3"]
    assert run(recipe, straight, *settings, "save_every=1") == 0
    for last in ("stop_after=1", "stop_after=3"):
        assert run(recipe, stopped, *settings, "save_every=1", last) == 0
    assert_same_run(stopped, straight, steps=3)
    if name == "critic":
        assert any(key.startswith("critic|params|value_head") for key in stored_state(straight, 3))
    if "adapters" in name:
        adapter = read_adapter(f"{straight}/adapter-000003", MODEL)
        state = stored_state(straight, 3)
        for path, value in adapter.params.items():
            np.testing.assert_array_equal(value, state[f"policy|params|{path}"])
        assert any(value.any() for path, value in adapter.params.items() if path.endswith(".b"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_any_mesh_draws_the_same_tokens(recipe, whole, tmp_path):
    output = tmp_path / "run"
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "decode_mesh.data=4", "decode_mesh.tensor=2"]
    assert run(recipe, output, *mesh, "stop_after=2") == 0
    for left, right in zip(without_times(output), without_times(whole), strict=False):
        assert left["reward"] == right["reward"] if left["step"] else left == right
        assert left.get("loss", 0) == pytest.approx(right.get("loss", 0), rel=1e-3, abs=1e-5)
    drawn = draws(output), draws(whole)
    assert all(drawn[0][step]["tokens"] == drawn[1][step]["tokens"] for step in (1, 2))


def test_what_a_resumed_run_is_compared_by_sees_differences(whole, tmp_path):
    """A comparison that cannot fail would pass anything."""
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    shutil.copy(f"{whole}.notes", f"{other}.notes")
    assert_same_run(other, whole)
    notes = Path(f"{other}.notes")
    lines = notes.read_text().splitlines()
    notes.write_text("\n".join([*lines, lines[2].replace("0x1.", "0x1.0", 1)]))
    with pytest.raises(AssertionError, match="step 3 drew something else"):
        rl_recipe.draws(other)
