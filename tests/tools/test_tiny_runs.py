"""The data of the tiny stages, and the reports of the tiny runs: that they are right, and that they can fail."""

import io
import json
import sys
from pathlib import Path

import pytest
from etils import epath

from qwq_jax.config.load import load_toml
from qwq_jax.config.preference import PreferenceConfig
from qwq_jax.config.rl import RlConfig
from qwq_jax.config.train import SftConfig
from qwq_jax.rl.evaluate import JudgedTask, Sample
from qwq_jax.rl.heldout import write_judged
from qwq_jax.rl.rewards.arithmetic import Split
from qwq_jax.rl.rewards.programs import read_tests
from qwq_jax.rl.rewards.rules import RULES as CHECKS
from qwq_jax.rl.tasks import parse_task
from tools import make_tiny_stages, tiny_grpo_report, tiny_stages_report
from tools.make_tiny_stages import PLAIN, RULES, cold_start, program_tasks, programs, rule_tasks

ROOT = Path(__file__).parents[2]


def test_programs_do_what_their_words_say(monkeypatch, capsys):
    tasks = {each["id"]: each for split in Split for each in program_tasks(split)}
    assert len(tasks) == len(programs()) == 450
    for index in range(0, 450, 31):
        code = programs()[index].reply.partition("```python\n")[2].partition("\n```")[0]
        for test in read_tests(parse_task(json.dumps(tasks[f"program-{index}"]).encode(), where="here")):
            monkeypatch.setattr(sys, "stdin", io.StringIO(test.stdin))
            exec(code, {})
            assert capsys.readouterr().out == test.stdout


def test_splits_share_no_expression():
    train, held_out = ({each["prompt"] for each in program_tasks(split)} for split in Split)
    assert not train & held_out and len(held_out) > 50
    shown = {each["messages"][0]["content"] for each in cold_start(1, 2000)}
    assert not shown & held_out and len(shown & train) > 100
    assert not shown & {each["prompt"] for each in rule_tasks(3, Split.HELD_OUT, 200)}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.check["rule"])
def test_a_rule_is_kept_by_the_one_answer_and_not_by_the_other(rule):
    settings = {key: value for key, value in rule.check.items() if key != "rule"}
    check = CHECKS[rule.check["rule"]]
    assert check(rule.keep(42), **settings) and not check(PLAIN(42), **settings)


def test_the_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tool", str(tmp_path), "--cold-start", "30", "--rules", "20", "--held-out", "9"])
    make_tiny_stages.main()
    counts = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    programs = counts.pop("programs.jsonl") + counts.pop("programs_held_out.jsonl")
    assert programs == 450 and counts == {"cold_start.jsonl": 30, "rules.jsonl": 20, "rules_held_out.jsonl": 9}


def write_run(path, accuracy, seconds=30.0):
    path.mkdir()
    records = [{"step": step, "seconds": seconds, "eval_accuracy": value} for step, value in accuracy.items()]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("after", "seconds", "flipped", "problem"),
    [
        (0.93, 30.0, 0.3, None),
        (0.89, 30.0, 0.3, "the runs end at 89.0%, below 90%"),
        (0.93, 301.0, 0.3, "b took 602 s"),
        (0.93, 30.0, 0.6, "c did not fall: 50.0% before, 60.0% after"),
    ],
)
def test_the_report_of_seeds_says_what_fell_short(tmp_path, after, seconds, flipped, problem):
    write_run(tmp_path / "a", {0: 0.5, 9: after})
    write_run(tmp_path / "b", {0: 0.6, 9: after}, seconds)
    write_run(tmp_path / "c", {0: 0.5, 3: flipped})
    runs = [tiny_grpo_report.read(tmp_path / name) for name in "abc"]
    text, short = tiny_grpo_report.table(runs[:2], runs[2])
    assert "| a | 50.0% |  | 93.0% | 60 |" in text or after != 0.93
    assert short == ([problem] if problem else [])


def write_stage(root, name, before, after):
    """Evaluations of ten tasks of each kind, so many of them solved: sums, programs and, in stage 2, rules."""
    folder = epath.Path(root / name / "evaluations")
    folder.mkdir(parents=True)
    (root / name / "metrics.jsonl").write_text('{"step": 1, "seconds": 2.0}\n')
    for step, solved in ((0, before), (9, after)):
        tasks = [
            JudgedTask(f"{source}{i}", source, (Sample(1.5 * (i < count), i < count, None, 5, False),), votes=False)
            for source, count in zip(("sum", "program", "rule"), solved, strict=False)
            for i in range(10)
        ]
        write_judged(folder / f"{step:06d}.json", tasks, [])


@pytest.mark.parametrize(
    ("end", "problem"),
    [
        ((7, 9, 8), None),
        ((6, 9, 8), "stage 2 cost 5.0% of stage 1's accuracy, more than 2%"),
        ((8, 9, 5), "stage 2 did not raise its reward: 0.750 before, 0.750 after"),
    ],
)
def test_the_report_of_stages_says_what_fell_short(tmp_path, end, problem):
    write_stage(tmp_path, "stage-1", (5, 5), (7, 9))
    write_stage(tmp_path, "stage-2", (7, 9, 5), end)
    text, short = tiny_stages_report.table(tmp_path)
    assert "| all | 50.0% | 80.0% |" in text
    assert short == ([problem] if problem else [])


def test_the_recipes_of_the_stages_follow_each_other():
    folder = ROOT / "configs" / "rl" / "tiny_stages"
    cold = load_toml(folder / "cold_start.toml", SftConfig)
    judge = load_toml(folder / "reward_model.toml", PreferenceConfig)
    first, second = (load_toml(folder / f"{name}.toml", RlConfig) for name in ("stage1", "stage2"))
    end = lambda config: f"{config.output_dir}/model-{config.last_step:06d}"  # noqa: E731
    assert judge.model == first.model == f"{cold.output_dir}/model-{cold.steps:06d}"
    assert second.model == end(first)
    (scorer,) = second.reward_models
    assert scorer.checkpoint == f"{judge.output_dir}/model-{judge.last_step:06d}" and judge.final == "last"
    assert {reward.kind for reward in first.rewards} == {"arithmetic", "code"}
    # What stage 1 was judged by is asked again after stage 2.
    assert first.evaluation is not None and second.evaluation is not None
    assert set(first.evaluation.tasks) < set(second.evaluation.tasks)
