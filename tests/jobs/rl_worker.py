"""The command line of a run that notes what it draws, and sends itself a signal at a moment that it is told.

`python -m tests.jobs.rl_worker ORDERS...`: for each order a child of its own, forked once everything is imported, so
that a kill costs no second import. With `--here ORDER` it is this process. An order is JSON, see `Order`.

A moment is a step of training, a phase of it, and the number of an event in that phase: a step of the engine, a reply
handed to a reward, a micro-batch or an update, something made durable.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from etils import epath

from qwq_jax import __main__ as command_line
from qwq_jax import processes
from qwq_jax.checkpoint import directory as directories
from qwq_jax.checkpoint.train_store import TrainStore
from qwq_jax.engine.engine import Engine
from qwq_jax.jobs import rl as job
from qwq_jax.rl.heldout import HeldOut
from qwq_jax.rl.judging import SharedJudge
from qwq_jax.rl.learner import Rows, Updater
from qwq_jax.rl.policy import Policy
from qwq_jax.rl.rollout import Rollouts
from qwq_jax.rl.trainer import Trainer
from qwq_jax.train.metrics import MetricsLog

PHASES = ("rollout", "reward", "update", "sync", "evaluation", "save", "end")


@dataclass(frozen=True)
class Order:
    """What to run, and when to send itself which signal (0 for never); of several processes, which one (-1 for all)."""

    arguments: tuple[str, ...]
    notes: str
    signal: int = 0
    step: int = 0
    phase: str = ""
    event: int = 0
    process: int = -1

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> "Order":
        fields = json.loads(text)
        return cls(tuple(fields.pop("arguments")), **fields)


class Moments:
    """Counts the events of each phase of each step, and notes what every step draws."""

    def __init__(self, order: Order) -> None:
        self.counts: Counter[tuple[int, str]] = Counter()
        self._order = order
        self._step = 0
        self._phase = ""

    def hit(self, phase: str) -> None:
        self.counts[self._step, phase] += 1
        order = self._order
        if (self._step, phase, self.counts[self._step, phase]) != (order.step, order.phase, order.event):
            return
        if order.signal and order.process in (-1, jax.process_index()):
            os.kill(os.getpid(), order.signal)

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """An event before and one after each call of a function."""
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.hit(self._phase or phase)
            result = function(*args, **kwargs)
            self.hit(self._phase or phase)
            return result

        setattr(owner, name, watched)

    def within(self, owner: Any, name: str, phase: str) -> None:
        """All events within a function, and one before and after it, are of this phase."""
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._phase = phase
            self.hit(phase)
            result = function(*args, **kwargs)
            self.hit(phase)
            self._phase = ""
            return result

        setattr(owner, name, watched)

    def number_steps(self) -> None:
        draw = Trainer._draw

        def numbered(trainer: Any, step: int, cursor: int) -> Any:
            self._step = step
            return draw(trainer, step, cursor)

        Trainer._draw = numbered


def noting(notes: Path) -> Callable[..., Any]:
    """`Rollouts.batch`, which writes down what it draws."""
    draw = Rollouts.batch

    def noted(rollouts: Any, order: Any, cursor: int, *, step: int, **options: Any) -> Any:
        batch = draw(rollouts, order, cursor, step=step, **options)
        if batch is not None:
            with notes.open("a") as file:
                file.write(json.dumps(drawn(step, cursor, batch)) + "\n")
        return batch

    return noted


def drawn(step: int, cursor: int, batch: Any) -> dict[str, Any]:
    """What a batch is, for a comparison: prompts and tokens, and the log-probabilities to the last bit."""
    samples = [sample for group in batch.groups for sample in group.samples]
    return {
        "step": step,
        "cursors": [cursor, batch.cursor],
        "prompts": [group.prompt.task.task_id for group in batch.groups],
        "tokens": [sample.completion.token_ids for sample in samples],
        "logprobs": [[entry.logprob.hex() for entry in sample.completion.logprobs] for sample in samples],
        "rewards": [sample.graded.value for sample in samples],
    }


def install(order: Order) -> Moments:
    """Watches everything of one run of this process."""
    moments = Moments(order)
    moments.number_steps()
    Rollouts.batch = noting(Path(order.notes))
    watched: list[tuple[Any, str, str]] = [
        (Engine, "step", "rollout"),
        (SharedJudge, "submit", "reward"),
        (SharedJudge, "results", "reward"),
        (Rows, "place", "update"),
        (Updater, "update", "update"),
        (Policy, "engine_params", "sync"),
        (MetricsLog, "write", "save"),
        (MetricsLog, "flush", "save"),
        (epath.Path(order.notes).__class__, "rmtree", "save"),
        (directories.LocalDirectory, "write", "save"),
    ]
    for owner, name, phase in watched:
        moments.watch(owner, name, phase)
    moments.within(HeldOut, "measure", "evaluation")
    moments.within(TrainStore, "save", "save")
    moments.within(job, "finish", "end")
    return moments


def run(order: Order) -> int:
    """Carries an order out; after a run that ends, its counts lie beside the notes."""
    moments = install(order)
    code = command_line.main([*order.arguments])
    counts = {f"{step} {phase}": count for (step, phase), count in moments.counts.items()}
    Path(order.notes + ".counts").write_text(json.dumps(counts))
    return code


def in_child(function: Callable[[], int]) -> int:
    """The exit code of a forked process, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = function()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main(words: list[str]) -> int:
    if words[0] == "--here":
        processes.BEAT_SECONDS, processes.SILENCE_SECONDS = 1.0, 8.0
        return run(Order.read(words[1].replace("INDEX", os.environ["JAX_PROCESS_ID"])))
    orders = map(Order.read, words)
    codes = [in_child(lambda order=order: run(order)) for order in orders]
    print(json.dumps(codes))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
