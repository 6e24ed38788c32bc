"""The loop of training on a fixed set of examples: steps, held-out measures, metrics, checkpoints, and a clean stop."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwq_jax.checkpoint.train_store import TrainStore
from qwq_jax.train.batch import TrainBatch
from qwq_jax.train.metrics import MetricsLog
from qwq_jax.train.packing import PackedRows
from qwq_jax.train.state import Params, TrainState
from qwq_jax.train.stream import BatchStream


@dataclass(frozen=True)
class Intervals:
    """When what happens, in steps; the last one always evaluates and saves.

    Attributes:
        steps: Length of the run.
        eval_every: Held-out measures; 0 for never in between.
        save_every: Checkpoint; 0 for never in between. Comes with the held-out loss that ranks it.
    """

    steps: int
    eval_every: int
    save_every: int

    def saves(self, step: int) -> bool:
        """Whether there is a checkpoint after `step`."""
        return step == self.steps or (self.save_every > 0 and step % self.save_every == 0)

    def evaluates(self, step: int) -> bool:
        """Whether the held-out measures are computed after `step`."""
        return self.saves(step) or (self.eval_every > 0 and step % self.eval_every == 0)


@dataclass(frozen=True)
class Work:
    """What the loop calls.

    Attributes:
        train_step: The jitted update: the next state, and what to report, ``loss`` and ``grad_norm`` among it.
        place: Rows of a step -> arrays on the devices.
        evaluate: Parameters -> held-out measures, ``loss`` among them; ``None`` without held-out data.
        learning_rate: By number of updates done before.
    """

    train_step: Callable[[TrainState, TrainBatch], tuple[TrainState, Mapping[str, jax.Array]]]
    place: Callable[[PackedRows], TrainBatch]
    evaluate: Callable[[Params], Mapping[str, float]] | None
    learning_rate: Callable[[int], Any]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: After the last step taken; it is saved.
        finished: False if it was asked to stop before its last step.
    """

    state: TrainState
    finished: bool


class Trainer:
    """Takes a state from its step to the last one.

    A resumed run is the run that was interrupted: parameters, optimizer, order of the data and the metrics file are
    bitwise those of a run that never stopped.
    """

    def __init__(
        self,
        work: Work,
        *,
        stream: BatchStream,
        store: TrainStore,
        log: MetricsLog | None,
        intervals: Intervals,
        identity: Mapping[str, Any],
    ) -> None:
        """Collects the parts; `log` is ``None`` on all processes but the first, `identity` goes into checkpoints."""
        self._work = work
        self._stream = stream
        self._store = store
        self._log = log
        self._intervals = intervals
        self._identity = identity

    def run(
        self,
        state: TrainState,
        *,
        should_stop: Callable[[], bool],
        report: Callable[[int, Mapping[str, float]], None],
    ) -> Outcome:
        """Trains until the last step, or until `should_stop`, asked after every step, says so. Saves before it returns.

        `report` receives what is written to the log, as it is written.

        Raises:
            ValueError: The loss or its gradient is not a number any more. The step is neither logged nor saved.
        """
        step = int(state.step)
        started = time.perf_counter()
        while step < self._intervals.steps:
            rows = next(self._stream)
            state, metrics = self._work.train_step(state, self._work.place(rows))
            step += 1
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not math.isfinite(values["loss"] + values["grad_norm"]):
                raise ValueError(f"step {step}: the loss is {values['loss']}; try a lower optimizer.learning_rate")
            values["learning_rate"] = float(jax.device_get(self._work.learning_rate(step - 1)))
            seconds = time.perf_counter() - started
            held_out = self._evaluate(step, state.params)
            values |= {f"eval_{name}": value for name, value in held_out.items()}
            values |= {"seconds": seconds, "tokens_per_second": np.count_nonzero(rows.segment_ids) / seconds}
            if self._log:
                self._log.write(step, values)
            report(step, values)
            stopping = agree(should_stop())
            if stopping or self._intervals.saves(step):
                self._save(state, step, held_out.get("loss"))
            if stopping and step < self._intervals.steps:
                return Outcome(state, finished=False)
            started = time.perf_counter()
        return Outcome(state, finished=True)

    def _evaluate(self, step: int, params: Params) -> Mapping[str, float]:
        if self._work.evaluate is None or not self._intervals.evaluates(step):
            return {}
        return self._work.evaluate(params)

    def _save(self, state: TrainState, step: int, eval_loss: float | None) -> None:
        if self._log:
            self._log.flush()
        record = {"stream": self._stream.state(), "identity": dict(self._identity)}
        # A checkpoint that only an interruption made is not ranked: the run must end as if it had not happened.
        metric = eval_loss if self._intervals.saves(step) else None
        self._store.save(step, state, record, metric=metric)


def newest_step(store: TrainStore, *, identity: Mapping[str, Any]) -> int | None:
    """The step to go on from, the same on every process; ``None`` for a new run. Removes what a crash left.

    Raises:
        ValueError: The checkpoint belongs to another run (other data, another model, another schedule), or the
            processes do not see the same directory.
    """
    store.clean()
    steps = store.steps()
    newest = steps[-1] if steps else -1
    if jax.process_count() > 1:
        seen = np.unique(multihost_utils.process_allgather(np.array(newest)))
        if len(seen) > 1:
            raise ValueError(
                f"{store.directory}: the processes find different checkpoints there ({', '.join(map(str, seen))}): "
                "output_dir must be a place that all share, such as a bucket"
            )
    if newest < 0:
        return None
    record = store.record(newest)
    for name in sorted(record["identity"].keys() | identity.keys()):
        then, now = record["identity"].get(name), identity.get(name)
        if then != now:
            raise ValueError(
                f"{store.directory}: step {newest} was trained with {name} = {then}, this run has {now}; "
                "continue with the old value or choose another output directory"
            )
    return newest


def agree(flag: bool) -> bool:
    """Whether any process says so, so that all stop after the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
