"""The loop: draw, learn, bring the weights to the engine, evaluate, save; and a clean stop."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from qwq_jax.checkpoint.train_store import TrainStore
from qwq_jax.engine.engine import Engine
from qwq_jax.rl.policy import LearnConfig, Policy, RlState
from qwq_jax.rl.prompts import PromptOrder
from qwq_jax.rl.rollout import Batch, Rollouts
from qwq_jax.train.metrics import MetricsLog


@dataclass(frozen=True)
class Plan:
    """When what happens, in steps; the last one always evaluates and saves.

    Attributes:
        steps: Length of the run.
        eval_every: 0 for never in between.
        save_every: 0 for never in between.
    """

    steps: int
    eval_every: int = 0
    save_every: int = 0

    def saves(self, step: int) -> bool:
        """Whether there is a checkpoint after `step`."""
        return step == self.steps or (self.save_every > 0 and step % self.save_every == 0)

    def evaluates(self, step: int) -> bool:
        """Whether held-out tasks are answered after `step`; a checkpoint is ranked by them."""
        return self.saves(step) or (self.eval_every > 0 and step % self.eval_every == 0)


@dataclass(frozen=True)
class Hands:
    """What the loop tells others.

    Attributes:
        stopping: Whether to stop, asked often; all processes get the same answer after the same step of the engine.
        phase: Told what the run is at.
        report: Told the record of each step.
    """

    stopping: Callable[[], bool] = lambda: False
    phase: Callable[[str], None] = lambda name: None
    report: Callable[[int, Mapping[str, float]], None] = lambda step, record: None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: After the last step taken; it is saved.
        step: That step.
        finished: False if it was asked to stop before its last step.
    """

    state: RlState
    step: int
    finished: bool


@dataclass
class Clock:
    """Seconds of each phase of a step."""

    phase: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Counts what happens within to a phase."""
        self.phase(name)
        begun = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun


@dataclass
class Trainer:
    """Takes a policy from its step to the last one.

    A resumed run is the run that was interrupted, bitwise: weights, optimizer, order of the prompts, every token drawn
    and the metrics but those of time. All that a step draws follows from the weights, the cursor and the step, so a run
    that is killed within a step begins that step again.

    Attributes:
        policy: What learns.
        learning: How.
        engine: What draws, with the weights of the policy.
        rollouts: How.
        order: The prompts.
        store: Where checkpoints go.
        log: None on all processes but the first.
        plan: When what happens.
        identity: Goes into the checkpoints.
        evaluate: Called with the step; gives the ``eval_...`` measures of the engine's weights. None for no evaluation.
        learning_rate: By number of updates done before.
        hands: What the loop tells others.
    """

    policy: Policy
    learning: LearnConfig
    engine: Engine
    rollouts: Rollouts
    order: PromptOrder
    store: TrainStore
    log: MetricsLog | None
    plan: Plan
    identity: Mapping[str, Any]
    evaluate: Callable[[int], dict[str, float]] | None
    learning_rate: Callable[[int], Any]
    hands: Hands

    def run(self, state: RlState, *, step: int, cursor: int) -> Outcome:
        """Trains until the last step, or until asked to stop. Saves before it returns.

        Args:
            state: After `step` steps; it is donated.
            step: Steps taken before.
            cursor: The number of the next prompt.
        """
        self._sync(state, Clock(self.hands.phase))
        if step == 0 and self.evaluate is not None:
            with Clock(self.hands.phase).at("evaluation"):
                self._write(0, self.evaluate(0))
        while step < self.plan.steps:
            clock = Clock(self.hands.phase)
            began = time.perf_counter()
            batch = self._draw(step + 1, cursor)
            if batch is None:
                break
            step, cursor = step + 1, batch.cursor
            state, record = self._learn(state, batch, clock, step)
            self._sync(state, clock)
            record |= self._evaluated(step, clock)
            clock.seconds |= batch.seconds
            elapsed = time.perf_counter() - began
            record |= {f"seconds_{name}": seconds for name, seconds in clock.seconds.items()}
            record |= {"seconds": elapsed, "tokens_per_second": batch.tokens / elapsed}
            self._write(step, record)
            if self.plan.saves(step):
                self.hands.phase("save")
                self._save(state, step, cursor, record)
        if step < self.plan.steps:
            self._save(state, step, cursor, None)
        return Outcome(state, step, finished=step == self.plan.steps)

    def _draw(self, step: int, cursor: int) -> Batch | None:
        if self.hands.stopping():
            return None
        self.hands.phase("rollout")
        # A resumed run has not just evaluated: beginnings of prompts found in the cache would be rounded differently.
        self.engine.forget_pages()
        refill = self.learning.objective.uninformative_groups == "refill"
        return self.rollouts.batch(self.order, cursor, step=step, refill=refill, stopping=self.hands.stopping)

    def _learn(self, state: RlState, batch: Batch, clock: Clock, step: int) -> tuple[RlState, dict[str, float]]:
        rate = float(self.learning_rate(state.updates))
        self.engine.release()  # gradients and activations take the place of weights and cache
        with clock.at("update"):
            state, record = self.policy.learn(state, batch.groups, self.learning, step=step)
        return state, record | {"learning_rate": rate, "drawn_groups": float(batch.drawn_groups)}

    def _sync(self, state: RlState, clock: Clock) -> None:
        with clock.at("sync"):
            self.engine.release()  # of old and new weights only one has room
            self.engine.replace_weights(self.policy.engine_params(state))

    def _evaluated(self, step: int, clock: Clock) -> dict[str, float]:
        if self.evaluate is None or not self.plan.evaluates(step):
            return {}
        with clock.at("evaluation"):
            return self.evaluate(step)

    def _write(self, step: int, record: Mapping[str, float]) -> None:
        if self.log is not None:
            self.log.write(step, record)
        if step:
            self.hands.report(step, record)

    def _save(self, state: RlState, step: int, cursor: int, record: Mapping[str, float] | None) -> None:
        if step == 0:
            return  # nothing has been done that a new start would not do again
        if self.log is not None:
            self.log.flush()
        # The store ranks by the least. What only an interruption made is not ranked: the run must end as without it.
        best = None if record is None else record.get("eval_accuracy", record.get("eval_reward"))
        kept = {"cursor": cursor, "identity": dict(self.identity)}
        self.store.save(step, state, kept, metric=None if best is None else -best)
