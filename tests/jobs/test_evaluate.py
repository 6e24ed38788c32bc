"""`eval` as its users meet it: files and table, stopped and gone on with, compared, refused in a sentence."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwq_jax import __main__ as command_line
from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.evaluate import EvaluateConfig, load_rewards, read_ks
from qwq_jax.config.rewards import (
    ArithmeticConfig,
    CodeConfig,
    InstructionsConfig,
    MathConfig,
    ReasoningGymConfig,
    RewardModelConfig,
)
from qwq_jax.config.tasks import ArithmeticTasks, FileTasks
from qwq_jax.engine.engine import Engine
from qwq_jax.jobs import evaluate as job
from qwq_jax.jobs import generate as generate_job
from qwq_jax.jobs.evaluate import usual_rewards
from qwq_jax.rl.types import Task
from tests.jobs.tiny_checkpoint import make_checkpoint
from tests.multihost.launch import together

ROOT = Path(__file__).parents[2]
SETTINGS = ["engine.max_sequences=8", "engine.page_size=64", "engine.max_context=64", "engine.prefill_chunk=64"]
SETTINGS += ["engine.compute_dtype=float32", "sampling.max_tokens=40", "sampling.stop_token_ids=[87]"]
REWARDS = '[[rewards]]\nkind = "custom"\nfunction = "tests.jobs.even_reward:even"\n'
TASKS, SAMPLES = 6, 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    lines = [
        {"id": f"t{i}", "prompt": "x" * (i + 1), "source": "ab"[i % 2], "answer": str(0.5 * (i % 3 == 0))}
        for i in range(TASKS)
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "rewards.toml").write_text("steps = 3 # of a recipe\n" + REWARDS)
    return folder


def arguments(checkpoint: str, inputs: Path, output: Path, *more: str) -> list[str]:
    files = ["--task", str(inputs / "tasks.jsonl"), "--rewards", str(inputs / "rewards.toml"), "--output", str(output)]
    words = ["eval", checkpoint, *files, "--samples", str(SAMPLES), "--workers", "1", *more]
    return [*words, *(word for setting in SETTINGS for word in ("--set", setting))]


@pytest.fixture(scope="module")
def finished(checkpoint: str, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "eval"
    assert command_line.main(arguments(checkpoint, inputs, output, "--k", "1,2,4")) == 0
    return output


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_scores_are_those_of_the_rewards_for_what_the_engine_drew(finished: Path, checkpoint: str) -> None:
    tokenizer = ChatTokenizer.from_directory(checkpoint)
    answers, scores = lines_of(finished / "answers.jsonl"), lines_of(finished / "scores.jsonl")
    assert [each["custom_id"] for each in answers] == [f"t{i}#{j}" for i in range(TASKS) for j in range(SAMPLES)]
    assert len({tuple(answer["response"]["body"]["choices"][0]["token_ids"]) for answer in answers}) > TASKS
    assert {score["truncated"] for score in scores} == {True, False}, "some replies are meant to end by themselves"
    for number, (answer, score) in enumerate(zip(answers, scores, strict=True), start=1):
        (choice,) = answer["response"]["body"]["choices"]
        text = tokenizer.decode(choice["token_ids"])
        assert score["id"] == answer["id"] == f"batch_req_{number}"
        assert (f"{score['task']}#{score['sample']}", score["tokens"]) == (
            answer["custom_id"],
            len(choice["token_ids"]),
        )
        assert score["correct"] is (len(text) % 2 == 0)
        assert score["reward"] == score["correct"] + 0.5 * (score["task"] in ("t0", "t3"))
        assert score["note"] == f"custom: {len(text)} characters"
        assert score["truncated"] is (choice["finish_reason"] == "length")


def test_the_summary_is_what_the_scores_add_up_to(finished: Path) -> None:
    scores, summary = lines_of(finished / "scores.jsonl"), json.loads((finished / "summary.json").read_text())
    marks = {f"t{i}": [score["correct"] for score in scores if score["task"] == f"t{i}"] for i in range(TASKS)}
    assert [row["source"] for row in summary["rows"]] == ["all", "a", "b"]
    for row, names in zip(summary["rows"], (list(marks), ["t0", "t2", "t4"], ["t1", "t3", "t5"]), strict=True):
        for k in (1, 2, 4):
            expected = np.mean([np.mean([any(s) for s in itertools.combinations(marks[n], k)]) for n in names])
            assert row["measures"][f"pass@{k}"]["value"] == pytest.approx(expected)
            assert row["measures"][f"pass@{k}"]["low"] <= expected <= row["measures"][f"pass@{k}"]["high"]
        assert row["measures"]["avg@4"]["value"] == pytest.approx(np.mean([marks[n] for n in names]))
        assert {"maj@2", "maj@4", "reward"} <= row["measures"].keys()
    assert summary["settings"]["samples"] == SAMPLES and summary["settings"]["sampling"]["max_tokens"] == 40
    report = (finished / "report.html").read_text()
    assert "avg@4 result" in report and "t0" in report and "reply before" not in report and "gain" not in report


def test_a_finished_evaluation_is_shown_again_without_model_or_workers(
    finished: Path, checkpoint: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    monkeypatch.setattr(Engine, "from_checkpoint", None)
    monkeypatch.setattr(job, "RewardPool", None)
    assert command_line.main(arguments(checkpoint, inputs, finished, "--k", "1,2,4")) == 0
    table = capsys.readouterr().out
    summary = json.loads((finished / "summary.json").read_text())
    assert f"{summary['rows'][0]['measures']['pass@2']['value']:.1%}" in table and "a (3)" in table
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


class StopAfter(job.StopRequested):
    """As if a signal came when it is asked for the so manieth time."""

    left = 0

    def __call__(self) -> bool:
        type(self).left -= 1
        return type(self).left < 0


@pytest.mark.parametrize(("module", "calls"), [(generate_job, 2), (job, 1)])
def test_a_signal_stops_and_the_same_command_goes_on(
    module, calls: int, finished: Path, checkpoint: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While replies are drawn, and while they are judged; in the end all files are those of a run without a stop."""
    words = arguments(checkpoint, inputs, tmp_path / "eval", "--k", "1,2,4")
    with monkeypatch.context() as patch:
        patch.setattr(module, "StopRequested", StopAfter)
        patch.setattr(StopAfter, "left", calls)
        assert command_line.main(words) == 42
    names = {path.name for path in (tmp_path / "eval").iterdir()}
    assert "summary.json" not in names and ("scores.jsonl" in names) is (module is job)
    assert command_line.main(words) == 0
    for path in finished.iterdir():
        assert (tmp_path / "eval" / path.name).read_bytes() == path.read_bytes(), path.name


def test_two_evaluations_are_compared(
    finished: Path, checkpoint: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--seed", "1", "--compare", str(finished)]
    assert command_line.main(arguments(checkpoint, inputs, tmp_path / "eval", *more)) == 0
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (finished, tmp_path / "eval"))
    gain = two["rows"][0]["measures"]["avg@4"]["value"] - one["rows"][0]["measures"]["avg@4"]["value"]
    assert gain != 0 and two["gains"]["all"]["avg@4"]["value"] == pytest.approx(gain)
    assert f"{100 * gain:+.1f} (" in capsys.readouterr().out
    report = (tmp_path / "eval" / "report.html").read_text()
    assert "avg@4 before" in report and "avg@4 after" in report
    assert report.count('aria-label="reply before"') == report.count('aria-label="reply after"') == TASKS


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert command_line.main(words) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_commands_are_one_sentence_and_exit_2(
    finished: Path, checkpoint: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "eval"
    short = tmp_path / "short.jsonl"

    def told(sentence: str, *words: str) -> None:
        error = refused(["eval", checkpoint, "--output", str(output), *words], capsys)
        assert error.startswith("error: ") and sentence in error, error

    told("Missing option '--task'")
    told("absent.jsonl: no such file", "--task", "absent.jsonl")
    told("arithmetic:level=1: level: unknown key", "--task", "arithmetic:level=1")
    told("k 5 is more than samples 4", "--task", "arithmetic", "--samples", "4", "--k", "5")
    told("--k 1;2: expected numbers", "--task", "arithmetic", "--k", "1;2")
    told("rewards.0.custom.function", "--task", "arithmetic", "--rewards", str(bad_rewards(tmp_path)))
    told("no finished evaluation", "--task", "arithmetic:count=2", "--compare", str(tmp_path))
    told("sampling.n 3", "--task", "arithmetic:count=2", "--set", "sampling.n=3")
    told("sampling.stop ['x']", "--task", "arithmetic:count=2", "--set", 'sampling.stop=["x"]')
    short.write_text(json.dumps({"id": "long", "prompt": "x" * 70, "answer": "1"}))
    told("task 'long': the prompt has 78 tokens", "--task", str(short), "--set", "engine.max_context=64")
    short.write_text(json.dumps({"id": "free", "prompt": "x"}))
    told("task 'free' holds nothing to judge a reply by", "--task", str(short))
    assert not output.exists(), "nothing was begun"
    words = arguments(checkpoint, inputs, finished, "--k", "1,2,4")
    assert "with another number of samples" in refused([*words, "--samples", "5"], capsys)
    assert "was begun with another seed" in refused([*words, "--seed", "7"], capsys)
    other = tmp_path / "other.toml"
    other.write_text(REWARDS + "weight = 2.0\n")
    assert "was begun with another rewards" in refused([*words, "--rewards", str(other)], capsys)


def bad_rewards(folder: Path) -> Path:
    path = folder / "bad.toml"
    path.write_text('[[rewards]]\nkind = "custom"\nfunction = "nothing"\n')
    return path


def test_a_reward_model_is_refused(checkpoint: str, tmp_path: Path) -> None:
    config = EvaluateConfig(tasks=(ArithmeticTasks(count=1),), rewards=(RewardModelConfig(checkpoint="x"),))
    with pytest.raises(ValueError, match="a reward model is no verifier"):
        job.evaluate_checkpoint(checkpoint, tmp_path / "o", config, engine=None, mesh=None)  # type: ignore[arg-type]


def test_tasks_are_judged_by_what_they_hold() -> None:
    def task(name: str, source: str, **judge: object) -> Task:
        return Task(name, (), source, judge)

    sums = task("1", "arithmetic-2", answer="4")
    maths, code = task("2", "gsm8k", answer="4"), task("3", "mbpp", tests=["assert 1"], answer="x")
    rules, gym = task("4", "ifeval", instructions=[{"rule": "json"}]), task("5", "legs", answer="4", entry={})
    assert usual_rewards([maths]) == (MathConfig(),)
    assert usual_rewards([sums, maths, code, rules, gym]) == (
        ArithmeticConfig(sources=("arithmetic-2",)),
        MathConfig(sources=("gsm8k",)),
        CodeConfig(sources=("mbpp",)),
        InstructionsConfig(sources=("ifeval",)),
        ReasoningGymConfig(sources=("legs",)),
    )
    with pytest.raises(ValueError, match="task '6' is judged by other means than others of source 'gsm8k'"):
        usual_rewards([maths, task("6", "gsm8k", tests=["assert 1"])])
    with pytest.raises(ValueError, match="task '7' holds nothing to judge"):
        usual_rewards([task("7", "")])


def test_settings_of_the_command_line(tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["eval", "--help"]) == 0 and "Example: qwq-jax eval" in capsys.readouterr().out
    assert EvaluateConfig(tasks=(FileTasks(path="x"),), samples=8).measured_ks == (1, 8)
    assert EvaluateConfig(tasks=(FileTasks(path="x"),)).measured_ks == (1,)
    assert EvaluateConfig(tasks=(FileTasks(path="x"),), samples=8, ks=(4, 2, 4)).measured_ks == (2, 4)
    assert read_ks("") == () and read_ks("1, 8") == (1, 8)
    assert [reward.kind for reward in load_rewards(inputs / "rewards.toml")] == ["custom"]
    (tmp_path / "none.toml").write_text("[[reward]]\n")
    with pytest.raises(ValueError, match="none.toml: rewards: missing"):
        load_rewards(tmp_path / "none.toml")


# Runs the command line, and kills itself when it is about to write the so manieth result line, a part of it written.
DYING = """
import os, signal, sys
from qwq_jax import __main__ as command_line
from qwq_jax.jobs import result_file
number, written = int(sys.argv[1]), 0
def write_all(file, raw, write=result_file._write_all):
    global written
    written += 1
    if written == number:
        write(file, raw[: len(raw) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, raw)
result_file._write_all = write_all
sys.exit(command_line.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_while_drawing_and_while_judging_no_sample_is_lost_or_repeated(
    finished: Path, checkpoint: str, inputs: Path, tmp_path: Path
) -> None:
    words = arguments(checkpoint, inputs, tmp_path / "eval", "--k", "1,2,4")
    for number, answered, scored in ((9, 8, 0), (16 + 7, 24, 6)):
        code = subprocess.run([sys.executable, "-c", DYING, str(number), *words], cwd=ROOT, check=False).returncode
        assert code == -9
        for name, expected in (("answers", answered), ("scores", scored)):
            path = tmp_path / "eval" / f"{name}.jsonl"
            whole = path.read_bytes().count(b"\n") if path.exists() else 0
            assert whole == expected
    assert command_line.main(words) == 0
    for path in finished.iterdir():
        assert (tmp_path / "eval" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_give_the_files_of_one(finished: Path, checkpoint: str, inputs: Path, tmp_path: Path) -> None:
    words = arguments(checkpoint, inputs, tmp_path / "eval", "--k", "1,2,4", "--distributed", "--set", "mesh.data=2")
    for end in together("-m", "qwq_jax", *words, "--simulate-devices", "1"):
        assert end.returncode == 0, end.stderr
    for name in ("requests.jsonl", "answers.jsonl", "scores.jsonl", "summary.json", "report.html"):
        assert (tmp_path / "eval" / name).read_bytes() == (finished / name).read_bytes(), name
