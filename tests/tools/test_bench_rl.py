"""The race of reinforcement learning: what the sides are given, what is read from their records, and what is told."""

import json
import os
import sys
from dataclasses import replace

import pytest

from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.load import load_toml
from qwq_jax.config.rl import RlConfig
from qwq_jax.embedded import TINY_REASONER
from tools.bench_rl import PEERS, Side, check, make_race, measure, our_side, parse, run, shown_command
from tools.rl_race import Race, Record, correct
from tools.rl_race_report import Goal, Outcome, Pace, Setting, markdown, verdicts

CONFIG = "configs/rl/tiny_grpo.toml"
TINY = (
    "rollout.prompts_per_step=2",
    "rollout.group_size=2",
    "rollout.max_tokens=96",
    "row_length=160",
    "rows_per_micro_batch=2",
    "steps=8",
    "stop_after=3",
    "reward_workers=1",
    "engine.max_sequences=4",
    'evaluation.tasks=[{kind="arithmetic", split="held-out", count=6, seed=12}]',
    'tasks=[{kind="arithmetic", count=30, seed=11}]',
)


@pytest.fixture(scope="module")
def config():
    return load_toml(CONFIG, RlConfig, TINY)


@pytest.fixture(scope="module")
def race(config):
    return make_race(config, eval_every=2, threads=2)


def records(seconds, *, accuracies=(), evaluation=0.0):
    """Lines of a side: one step for each of `seconds`, with held-out accuracies by step."""
    held_out = dict(accuracies)
    lines = [{"step": 0, "eval_accuracy": 0.5}]
    for step, each in enumerate(seconds, start=1):
        line = {"step": step, "seconds": each, "length": 50.0, "accuracy": 0.4}
        if step in held_out:
            line |= {"eval_accuracy": held_out[step], "seconds_evaluation": evaluation, "seconds": each + evaluation}
        lines.append(line)
    return lines


def outcome(name, *given, process_seconds=None, **named):
    return Outcome(name, records(*given, **named), {name: "1.0"}, process_seconds)


def test_all_sides_are_given_the_prompts_of_our_run_in_its_order(race, config, tmp_path):
    assert (race.last_step, race.descent.steps, len(race.held_out)) == (3, 8, 6)
    tokenizer = ChatTokenizer.from_directory(TINY_REASONER)
    for question in [*race.prompts, *race.held_out]:
        assert tokenizer.encode(question.text) == question.token_ids
        assert question.text.endswith("<think>\n") and question.messages[0]["content"] in question.text
    assert not {question.text for question in race.prompts} & {question.text for question in race.held_out}
    race.write(tmp_path / "race.json")
    assert Race.read(tmp_path / "race.json") == race
    other = make_race(config.model_copy(update={"seed": 1}), eval_every=2, threads=2)
    assert [question.text for question in other.prompts] != [question.text for question in race.prompts]


@pytest.mark.parametrize(
    "override, said",
    [
        ('objective.name="grpo"', "objective dr_grpo"),
        ("objective.entropy_coefficient=0.1", "objective dr_grpo"),
        ('objective={name="dr_grpo", kl="k3_loss"}', "objective dr_grpo"),
        ("updates_per_step=2", "one update a step"),
        ('rewards=[{kind="arithmetic"}, {kind="format"}]', "the reward arithmetic alone"),
        ("optimizer.weight_decay=0.1", "no weight decay"),
        ("evaluation.temperature=1.0", "greedy evaluation"),
        ("lora={rank=4}", "all weights trained"),
    ],
)
def test_what_the_peers_cannot_be_given_is_refused(override, said):
    with pytest.raises(SystemExit, match=said):
        check(load_toml(CONFIG, RlConfig, [*TINY, override]))


def test_a_completion_is_judged_as_the_reply_that_it_is_part_of():
    assert correct("6*7=42\n</think>\n\nThe answer is \\boxed{42}.", 42)
    assert not correct("6*7=42\n</think>\n\nThe answer is \\boxed{42}.", 41)
    assert not correct("so \\boxed{42}", 42)  # thoughts that never end hold no answer


def test_a_record_keeps_evaluation_apart_and_counts_every_completion(race, tmp_path, monkeypatch):
    times = iter([0.0, 10.0, 14.0, 20.0, 25.0, 26.0, 30.0, 34.0, 35.0])
    monkeypatch.setattr("tools.rl_race.time.perf_counter", lambda: next(times))
    record = Record(race, tmp_path / "lines", ["numpy"])
    right = [f"</think>\\boxed{{{question.answer}}}" for question in race.held_out]
    record.start(lambda: ["", *right[1:]])
    assert record.draw(["</think>\\boxed{3}"] * 2, [3, 4], [5, 6]) == [1.0, 0.0]
    with pytest.raises(AssertionError, match="2 completions in step 1, not 4"):
        record.end_step(lambda: right)
    record = Record(race, tmp_path / "again", ["numpy"])
    for _ in range(2):
        record.draw(["</think>\\boxed{3}"] * 4, [3, 4, 4, 4], [5, 6, 7, 8])
        record.end_step(lambda: right)
    found = Outcome.read("side", tmp_path / "again")
    assert Outcome.read("side", tmp_path / "lines").first == pytest.approx(5 / 6)
    assert list(found.versions) == ["numpy"]
    assert found.records[0] == {"step": 1, "accuracy": 0.25, "length": 6.5, "seconds": 6.0}
    assert found.records[1]["seconds_evaluation"] == 4.0 and found.records[1]["eval_accuracy"] == 1.0
    assert found.training_seconds() == 6.0 + 5.0


def test_speed_is_that_of_the_measured_steps_without_evaluations():
    goal = Goal(0.8, skipped=2, measured=3, limit=100.0)
    found = outcome("side", [90.0, 50.0, 4.0, 2.0, 4.0, 99.0], accuracies=[(4, 0.6)], evaluation=7.0)
    assert Pace.of(found.measured(goal), 20) == Pace(samples=6.0, tokens=300.0, length=50.0)
    assert outcome("side", [1.0] * 4).measured(goal) == []


def test_a_side_is_done_at_the_target_or_the_limit_but_not_before_its_speed_is_known():
    goal = Goal(0.8, skipped=1, measured=3, limit=100.0)
    assert not outcome("side", [1.0] * 3, accuracies=[(2, 0.9)]).enough(goal)
    assert outcome("side", [1.0] * 4, accuracies=[(2, 0.9)]).enough(goal)
    assert not outcome("side", [1.0] * 5, accuracies=[(2, 0.7)]).enough(goal)
    assert outcome("side", [30.0] * 4, accuracies=[(2, 0.7)]).enough(goal)
    assert not outcome("side", [24.0] * 4, accuracies=[(2, 0.7)], evaluation=50.0).enough(goal)
    assert outcome("side", [1.0] * 4).enough(Goal(None, skipped=1, measured=3, limit=100.0))


def scripted(tmp_path, lines, ending):
    """A side that writes these lines at once, and then does something."""
    path = tmp_path / "lines"
    code = f"import sys, time; open({str(path)!r}, 'w').write({''.join(json.dumps(x) + chr(10) for x in lines)!r}); "
    return Side("side", [sys.executable, "-c", code + ending], path, tmp_path / "log", {})


def test_a_side_is_ended_when_all_is_known_and_later_evaluations_are_taken_out_of_its_time(tmp_path):
    lines = records([0.01] * 4, accuracies=[(1, 0.5), (2, 0.9), (3, 0.9)], evaluation=1000.0)
    found = run(scripted(tmp_path, lines, "time.sleep(60)"), Goal(0.8, skipped=1, measured=3, limit=100.0))
    assert found.failure is None and found.reached(0.8) == 2
    assert found.process_seconds is not None and -2000 < found.process_seconds < -1950


def test_a_side_that_fails_or_stops_early_says_why(tmp_path):
    goal = Goal(0.8, skipped=1, measured=3, limit=100.0)
    dead = run(scripted(tmp_path, records([1.0]), "sys.exit('no memory')"), goal)
    assert dead.failure == "ended with 1: no memory"
    short = run(scripted(tmp_path, records([1.0]), "print('bye')"), goal)
    assert short.failure == "only 1 steps: bye"


def setting(config, **changed):
    named = {"goal": Goal(0.8, 1, 3, 100.0), "threads": 2, "load": 1.5, "eval_every": 5, "versions": {"jax": "0"}}
    named |= {"command": "python -m tools.bench_rl"}
    return Setting(config=config, **{**named, **changed})


def test_the_report_compares_our_slower_run_and_names_who_is_left_out(config):
    ours = outcome("qwq_jax", [9.0, 1.0, 1.0, 1.0], accuracies=[(3, 0.85)], process_seconds=14.0)
    again = replace(outcome("qwq_jax, after the peers", [9.0, 2.0, 2.0, 2.0]), speed_alone=True)
    trl = outcome("TRL", [5.0, 7.0, 7.0, 7.0], accuracies=[(4, 0.9)], process_seconds=33.0)
    text = markdown(setting(config), [ours, trl, Outcome("tunix", [], failure="left out: no --tunix-python"), again])
    assert "| qwq_jax | 4.0 | 1 | 200 | 50.0 | 3 | 11 | 14 | 50.0% | 85.0% |" in text
    assert "| qwq_jax, after the peers | 2.0 | 1 | 100 | 50.0 | - | - | - | 50.0% | 50.0% |" in text
    assert "| TRL | 0.6 | 3.50 | 29 | 50.0 | 4 | 26 | 33 | 50.0% | 90.0% |" in text
    assert "- TRL: qwq_jax makes 3.50 times as many samples a second, at least 3; " in text
    assert "80% after 11 s, sooner than it with 26 s" in text
    assert "**tunix: left out: no --tunix-python**" in text
    assert "load average 1.5" in text and "TRL 1.0." in text and "steps 2 to 4" in text


@pytest.mark.parametrize(
    "theirs, accuracy, said",
    [
        ([1.0, 2.0, 2.0, 2.0], 0.9, "less than 3; 80% after 11 s, NOT sooner than it with 7 s"),
        ([9.0, 4.0, 4.0, 4.0], 0.7, "at least 3; 80% after 11 s, not reached by it in 21 s, best 70.0%"),
        ([1.0, 2.0, 2.0, 2.0], 0.7, "it was stopped after 7 s, before qwq_jax's 11 s: nobody knows who is first"),
    ],
)
def test_a_race_that_is_lost_or_undecided_is_told_as_that(config, theirs, accuracy, said):
    ours = outcome("qwq_jax", [9.0, 1.0, 1.0, 1.0], accuracies=[(3, 0.85)], process_seconds=14.0)
    (found,) = verdicts(setting(config), [ours, outcome("TRL", theirs, accuracies=[(4, accuracy)])])
    assert said in found


def test_the_command_is_shown_without_places_of_one_machine():
    given = ["--trl-python", "/home/me/trl/bin/python", "--workdir", "/tmp/x", "--set", "a=[1, 2]", "--once"]
    shown = shown_command([*given, "--tunix-python", "/y/bin/python"])
    assert shown == (
        "python -m tools.bench_rl --trl-python TRL/bin/python --set 'a=[1, 2]' --once --tunix-python TUNIX/bin/python"
    )


def options(tmp_path, *more):
    settings = [part for each in TINY for part in ("--set", each)]
    measured = "--eval-every 2 --skip 1 --measure 2 --once --target 1.0 --threads 1".split()
    return parse([CONFIG, *settings, *measured, "--workdir", str(tmp_path), *more])


@pytest.mark.parametrize("devices", [1, 2])
def test_our_side_has_the_devices_of_its_mesh(tmp_path, devices):
    command = our_side("qwq_jax", options(tmp_path), tmp_path / "ours", devices=devices).command
    simulated = [command[i + 1] for i, word in enumerate(command) if word == "--simulate-devices"]
    assert simulated == ([] if devices == 1 else ["2"])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_our_side_runs_as_the_verb_does_and_absent_peers_are_left_out(tmp_path, config):
    ours, *peers = measure(options(tmp_path), config, tmp_path)
    assert ours.failure is None and len(ours.measured(Goal(1.0, 1, 2, 0.0))) == 2
    assert ours.first is not None and "eval_accuracy" in ours.records[2]
    assert [peer.failure for peer in peers] == ["left out: no --trl-python", "left out: no --tunix-python"]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_answers_as_we_do_before_the_first_step(peer, tmp_path, config):
    python = os.environ.get(f"BENCH_RL_{peer.upper()}_PYTHON")
    if python is None:
        pytest.skip(f"needs an environment with {PEERS[peer]}, named by BENCH_RL_{peer.upper()}_PYTHON")
    given = options(tmp_path, f"--{peer}-python", python, f"--{peer}-micro-batch", "2")
    found = {each.name: each for each in measure(given, config, tmp_path)}
    ours, theirs = found["qwq_jax"], found[PEERS[peer]]
    assert theirs.failure is None
    assert theirs.first == ours.first
    assert [record["step"] for record in theirs.records] == [0, 1, 2, 3]
