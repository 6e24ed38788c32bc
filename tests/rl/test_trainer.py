"""The loop by what it does in which order, with hands that only take notes; and that it learns what is rewarded."""

import time
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import pytest

from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.rl.policy import LearnConfig
from qwq_jax.rl.rollout import Batch
from qwq_jax.rl.trainer import Hands, Plan, Trainer


@dataclass
class Notes:
    """Policy, engine, rollouts, store and log in one: the state is a list of what was learnt."""

    stop_at: int | None = None
    accuracy: dict[int, float] = field(default_factory=dict)
    measure: str = "eval_accuracy"
    events: list[tuple] = field(default_factory=list)
    records: dict[int, dict] = field(default_factory=dict)
    saved: dict[int, tuple] = field(default_factory=dict)
    asked: int = 0
    engine_holds: bool = True

    # Policy.
    def engine_params(self, state):
        assert not self.engine_holds, "no room for two engines' weights"
        return f"weights of {state.learnt}"

    def learn(self, state, groups, config, *, step):
        assert not state.donated, "a state that was given away"
        assert not self.engine_holds, "no room for gradients beside the engine"
        state.donated = True
        self.events.append(("learn", step, groups))
        return make_state([*state.learnt, groups]), {"reward": float(step)}

    # Engine.
    def release(self):
        self.engine_holds = False

    def replace_weights(self, params):
        self.engine_holds = True
        self.events.append(("weights", params))

    def forget_pages(self):
        self.events.append(("forget",))

    # Rollouts.
    def batch(self, order, cursor, *, step, refill, stopping):
        self.events.append(("draw", step, cursor, refill))
        if stopping():
            return None
        time.sleep(0.002)
        return Batch((f"groups {cursor}",), cursor + 3, 5, 70, {"rollout": 0.1, "reward": 0.2})

    # Store.
    def save(self, step, state, record, *, metric):
        assert not state.donated
        self.events.append(("save", step))
        self.saved[step] = (list(state.learnt), record, metric)

    # Log.
    def write(self, step, record):
        self.events.append(("write", step))
        assert step not in self.records
        self.records[step] = dict(record)

    def flush(self):
        self.events.append(("flush",))

    def evaluate(self, step):
        self.events.append(("evaluate", step))
        return {self.measure: self.accuracy.get(step, 0.5)}

    def stopping(self):
        self.asked += 1
        return self.stop_at is not None and self.asked >= self.stop_at


def make_state(learnt):
    return SimpleNamespace(learnt=learnt, updates=2 * len(learnt), donated=False)


def trainer(notes, plan, *, objective="dr_grpo", evaluate=True, log=True, hands=None):
    return Trainer(
        policy=notes,
        learning=LearnConfig(ObjectiveConfig(name=objective)),
        engine=notes,
        rollouts=notes,
        order=None,
        store=notes,
        log=notes if log else None,
        plan=plan,
        identity={"seed": 1},
        evaluate=notes.evaluate if evaluate else None,
        learning_rate=lambda updates: 0.1 * updates,
        hands=hands or Hands(stopping=notes.stopping),
    )


def test_a_step_is_drawn_learnt_synced_evaluated_written_and_saved():
    notes = Notes()
    outcome = trainer(notes, Plan(2, save_every=1)).run(make_state([]), step=0, cursor=0)
    assert notes.events == [
        ("weights", "weights of []"),
        ("evaluate", 0),
        ("write", 0),
        ("forget",),
        ("draw", 1, 0, False),
        ("learn", 1, ("groups 0",)),
        ("weights", "weights of [('groups 0',)]"),
        ("evaluate", 1),
        ("write", 1),
        ("flush",),
        ("save", 1),
        ("forget",),
        ("draw", 2, 3, False),
        ("learn", 2, ("groups 3",)),
        ("weights", "weights of [('groups 0',), ('groups 3',)]"),
        ("evaluate", 2),
        ("write", 2),
        ("flush",),
        ("save", 2),
    ]
    assert outcome.finished and outcome.step == 2 and outcome.state.learnt == [("groups 0",), ("groups 3",)]
    assert notes.saved[1] == ([("groups 0",)], {"cursor": 3, "identity": {"seed": 1}}, -0.5)
    assert notes.saved[2][1]["cursor"] == 6


def test_what_is_written():
    notes = Notes(accuracy={0: 0.1, 2: 0.3})
    trainer(notes, Plan(3, eval_every=2)).run(make_state([]), step=0, cursor=0)
    assert notes.records[0] == {"eval_accuracy": 0.1}
    first, second = notes.records[1], notes.records[2]
    assert first["reward"] == 1.0 and first["drawn_groups"] == 5.0 and "eval_accuracy" not in first
    assert second["eval_accuracy"] == 0.3
    assert (first["learning_rate"], second["learning_rate"]) == (0.0, pytest.approx(0.2)), "by updates done before"
    assert (first["seconds_rollout"], first["seconds_reward"]) == (0.1, 0.2)
    assert {"seconds_update", "seconds_sync", "seconds"} < set(first)
    assert first["seconds"] > 0 and first["tokens_per_second"] == pytest.approx(70 / first["seconds"])
    assert "seconds_evaluation" in second and "seconds_evaluation" not in first


@pytest.mark.parametrize(
    ("plan", "evaluated", "saved"),
    [
        (Plan(5), [0, 5], [5]),
        (Plan(5, eval_every=2), [0, 2, 4, 5], [5]),
        (Plan(5, save_every=2), [0, 2, 4, 5], [2, 4, 5]),  # what is saved is ranked
        (Plan(6, eval_every=3, save_every=2), [0, 2, 3, 4, 6], [2, 4, 6]),
    ],
)
def test_when_it_evaluates_and_saves(plan, evaluated, saved):
    notes = Notes()
    trainer(notes, plan).run(make_state([]), step=0, cursor=0)
    assert [event[1] for event in notes.events if event[0] == "evaluate"] == evaluated
    assert list(notes.saved) == saved


def test_the_best_checkpoint_is_that_of_the_highest_accuracy_or_else_reward():
    for measure in ("eval_accuracy", "eval_reward"):
        notes = Notes(accuracy={1: 0.2, 2: 0.9, 3: 0.4}, measure=measure)
        trainer(notes, Plan(3, save_every=1)).run(make_state([]), step=0, cursor=0)
        ranked = {step: metric for step, (_, _, metric) in notes.saved.items()}
        assert min(ranked, key=ranked.__getitem__) == 2 and ranked[2] == -0.9


def test_without_held_out_tasks_nothing_is_evaluated_or_ranked():
    notes = Notes()
    trainer(notes, Plan(2, save_every=1), evaluate=False).run(make_state([]), step=0, cursor=0)
    assert 0 not in notes.records and not any(event[0] == "evaluate" for event in notes.events)
    assert [metric for _, _, metric in notes.saved.values()] == [None, None]


def test_it_goes_on_from_a_step_as_if_it_had_never_stopped():
    whole, second = Notes(), Notes()
    trainer(whole, Plan(4, save_every=2)).run(make_state([]), step=0, cursor=0)
    learnt, record, _ = whole.saved[2]
    trainer(second, Plan(4, save_every=2)).run(make_state(learnt), step=2, cursor=record["cursor"])
    at = whole.events.index(("save", 2)) + 1
    assert second.events[0] == ("weights", f"weights of {learnt}")
    assert second.events[1:] == whole.events[at:], "no second evaluation of the beginning either"
    assert second.saved[4] == whole.saved[4]


# Asked before each draw and within it.
@pytest.mark.parametrize(("stop_at", "steps"), [(1, 0), (2, 0), (3, 1), (4, 1), (6, 2)])
def test_it_stops_where_it_is_asked_to_and_keeps_what_was_learnt(stop_at, steps):
    notes = Notes(stop_at=stop_at)
    outcome = trainer(notes, Plan(3)).run(make_state([]), step=0, cursor=0)
    assert not outcome.finished and outcome.step == steps == len(outcome.state.learnt)
    if steps:
        learnt, record, metric = notes.saved[steps]
        assert (len(learnt), record["cursor"]) == (steps, 3 * steps)
        assert metric is None, "what only an interruption made is not ranked"
        assert notes.events[-2:] == [("flush",), ("save", steps)]
    else:
        assert not notes.saved


def test_asked_after_the_last_draw_it_finishes():
    notes = Notes(stop_at=7)
    assert trainer(notes, Plan(3)).run(make_state([]), step=0, cursor=0).finished


def test_other_processes_do_the_same_but_write_nothing():
    first, other = Notes(), Notes()
    trainer(first, Plan(3, save_every=2)).run(make_state([]), step=0, cursor=0)
    trainer(other, Plan(3, save_every=2), log=False).run(make_state([]), step=0, cursor=0)
    assert not other.records
    assert other.events == [event for event in first.events if event[0] not in ("write", "flush")]


def test_groups_are_refilled_where_the_objective_says_so():
    notes = Notes()
    trainer(notes, Plan(1), objective="dapo").run(make_state([]), step=0, cursor=0)
    assert ("draw", 1, 0, True) in notes.events


def test_the_hands_are_told_every_phase_and_every_step():
    notes, told = Notes(), []
    hands = Hands(phase=told.append, report=lambda step, record: told.append((step, record["reward"])))
    trainer(notes, Plan(2, save_every=2), hands=hands).run(make_state([]), step=0, cursor=0)
    assert told == [
        *("sync", "evaluation"),
        *("rollout", "update", "sync", (1, 1.0)),
        *("rollout", "update", "sync", "evaluation", (2, 2.0), "save"),
    ]


def test_steps_are_numbered_without_gaps():
    notes = Notes()
    trainer(notes, Plan(6, save_every=4)).run(make_state([]), step=0, cursor=0)
    assert all(after == before + 1 for before, after in pairwise(notes.records))
