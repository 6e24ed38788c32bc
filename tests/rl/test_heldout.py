"""Held-out tasks: the same noise each time, measures by their names, files that can be read again."""

import json

import pytest
from etils import epath

from qwq_jax.config.rl import RolloutConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.rl.heldout import HeldOut, judged_task, read_judged
from qwq_jax.rl.report import ShownReply
from qwq_jax.rl.rewards.graded import Graded
from qwq_jax.rl.rollout import Group, Rollouts, Sample
from qwq_jax.rl.types import Reply, Score
from tests.rl.scripted import END, Letters, ScriptedEngine, ScriptedJudge, make_completion, make_prompt, make_sample

PARAMS = SamplingParams(temperature=0.5, max_tokens=9, n=2)
CONFIG = RolloutConfig(prompts_per_step=2, group_size=4, max_prompt_tokens=4, max_tokens=6)


class Judge(ScriptedJudge):
    """Right where the text is that of the first sample."""

    def submit(self, prompt, completion, reply):
        claim = super().submit(prompt, completion, reply)
        right = completion.index == 0
        self.submitted[claim] = Graded(float(right), right, {"exact": Score(float(right), right, reply.text)})
        return claim


def held_out(directory, prompts=5, shown=3):
    engine = ScriptedEngine(lambda name, index: [97 + int(name.split("/")[1]), *[98] * index, *[END] * (1 - index)])
    rollouts = Rollouts(engine, Letters(), Judge(lambda *_: 0.0), CONFIG)
    path = None if directory is None else epath.Path(directory) / "evaluations"
    return HeldOut([make_prompt(i) for i in range(prompts)], rollouts, PARAMS, shown=shown, directory=path), engine


def test_the_same_is_asked_every_time(tmp_path):
    held, engine = held_out(tmp_path)
    first = held.measure(0)
    asked = list(engine.requests)
    assert held.measure(40) == first, "no step in the noise: replies differ by the weights only"
    assert engine.requests == asked * 2
    assert all(request.params == PARAMS for request in asked) and len({r.request_id for r in asked}) == 5
    assert not any(request.request_id.split("/")[0].isdecimal() for request in asked), "no name of a training step"


def test_measures(tmp_path):
    held, _ = held_out(None)
    assert held.measure(3) == {
        "eval_reward": 0.5,
        "eval_accuracy": 0.5,
        "eval_length": 2.0,
        "eval_truncated": 0.5,
    }
    assert list(tmp_path.iterdir()) == [], "other processes write nothing"


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    held, _ = held_out(tmp_path)
    held.measure(0)
    held.measure(120)
    assert sorted(p.name for p in (tmp_path / "evaluations").iterdir()) == ["000000.json", "000120.json"]
    tasks, shown = read_judged(epath.Path(tmp_path) / "evaluations" / "000120.json")
    assert [task.task_id for task in tasks] == [f"t{i}" for i in range(5)]
    assert all(task.source == "letters" and task.votes for task in tasks)
    assert [(s.reward, s.correct, s.tokens, s.truncated) for s in tasks[1].samples] == [
        (1.0, True, 2, False),
        (0.0, False, 2, True),
    ]
    assert list(shown) == ["t0", "t1", "t2"]
    assert shown["t1"] == ShownReply(
        thought=None, answer="b", reward=1.0, correct=True, tokens=2, truncated=False, note="exact: b"
    )


def test_a_write_that_fails_leaves_the_evaluation_of_before(tmp_path, monkeypatch):
    held, _ = held_out(tmp_path)
    held.measure(0)
    path = tmp_path / "evaluations" / "000000.json"
    before = path.read_text()
    monkeypatch.setattr(type(epath.Path(path)), "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        held.measure(0)
    assert path.read_text() == before and json.loads(before)["tasks"]


def test_what_nothing_judges_has_no_accuracy():
    group = Group(make_prompt(0), (make_sample([97, END], 0.3), make_sample([98, END], 0.5, index=1)))
    task = judged_task(group)
    assert [sample.correct for sample in task.samples] == [None, None]
    assert [sample.reward for sample in task.samples] == [0.3, 0.5]


def test_thoughts_without_an_end_are_shown_as_they_are(tmp_path):
    held, _ = held_out(tmp_path, prompts=1)
    reply = Reply("on and on", None, "", 3, truncated=True)
    sample = Sample(make_completion([97, 98, 99]), reply, Graded(0.0, False))
    held.rollouts.draw = lambda named, seconds, params: [Group(named[0][1], (sample, sample))]
    held.measure(1)
    _, shown = read_judged(epath.Path(tmp_path) / "evaluations" / "000001.json")
    assert shown["t0"].answer == "on and on" and shown["t0"].thought is None
