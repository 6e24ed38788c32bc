"""Rewards in worker processes, which are killed when they hang and replaced when they die.

Each worker has a thread here, which starts the process, hands it one thing at a time and waits. So workers share
nothing that a killed one could leave locked; and since the kernel ends a worker together with the thread that started
it, none outlives this process, however that ends. Workers are started as programs of their own rather than through
`multiprocessing`, which would import the main module, and JAX with it, into each.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Self

from qwq_jax.config.rewards import (
    CodeConfig,
    CustomConfig,
    FormatConfig,
    LengthConfig,
    RewardModelConfig,
    VerifierConfig,
    reward_name,
)
from qwq_jax.rl.rewards.graded import Graded, add_up, check_task, judges
from qwq_jax.rl.rewards.worker import Ask, Ready, Refused, Start
from qwq_jax.rl.types import Reply, Score, Task

_MIB = 1 << 20
_START_SECONDS = 120.0
# The code reward keeps its own time, and is to report what it found by then.
_GRACE_SECONDS = 5.0
_CLOSED = "the pool of rewards is closed"


class PoolClosed(Exception):
    """The pool was closed before the reply was scored."""


class RewardPool:
    r"""Scores replies in parallel, in processes that do without JAX.

    Example:
        >>> with RewardPool([ExactConfig()]) as pool:  # doctest: +SKIP
        ...     task = Task("1", (), judge={"answer": "4"})
        ...     pool.submit(task, Reply("\\boxed{4}", None, "\\boxed{4}", tokens=3)).result()
        Graded(value=1.0, correct=True, parts={'exact': Score(value=1.0, correct=True, note='4')}, ...)

    Args:
        configs: The rewards, whose names differ. Reward models among them are left to the caller: see `Graded`.
        workers: Processes.
        memory_mib: Address space of each, sandboxes aside.

    Raises:
        ValueError: A reward cannot work here: a package, a function or the sandbox is missing.
    """

    def __init__(
        self, configs: Sequence[VerifierConfig | RewardModelConfig], *, workers: int = 2, memory_mib: int = 4096
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        self._closed = False
        self._configs = tuple(configs)
        verifiers = tuple(config for config in configs if not isinstance(config, RewardModelConfig))
        self._indices = {reward_name(config): index for index, config in enumerate(verifiers)}
        # A sandbox inherits the limit, and can only lower it.
        wanted = [memory_mib, *(config.memory_mib for config in verifiers if isinstance(config, CodeConfig))]
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._workers = [_Worker(Start(verifiers, max(wanted) * _MIB)) for _ in range(workers)]
        started: list[Future[None]] = [Future() for _ in self._workers]
        self._threads = [
            threading.Thread(target=self._serve, args=pair, name="reward worker", daemon=True)
            for pair in zip(self._workers, started, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        try:
            for future in started:
                future.result()
        except BaseException:
            self.close()
            raise

    def submit(self, task: Task, reply: Reply) -> Future[Graded]:
        """Has a reply scored; the future gives the sum of the rewards that judge the task.

        A verifier that hangs or dies counts 0, with a note, and is named in `failed`; the others count all the same.

        Raises:
            ValueError: The task lacks what a reward reads; see `check_task`.
            PoolClosed: It is closed.
        """
        check_task(self._configs, task)
        if self._closed:
            raise PoolClosed(_CLOSED)
        item = _Item(task, reply)
        self._queue.put(item)
        return item.future

    def scores(self, pairs: Iterable[tuple[Task, Reply]]) -> list[Graded]:
        """Scores many, and waits; results are in the order of `pairs`."""
        return [future.result() for future in [self.submit(task, reply) for task, reply in pairs]]

    def close(self) -> None:
        """Kills the workers; what is not scored yet never will be, and its future says so.

        Futures in the queue are cancelled, and those of replies that are being scored raise `PoolClosed`.
        """
        self._closed = True
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                item.future.cancel()
        for _ in self._threads:
            self._queue.put(None)
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        """Nothing more: the workers are there already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    def _serve(self, worker: "_Worker", started: Future[None]) -> None:
        """The thread of one worker."""
        try:
            worker.start()
        except (ValueError, PoolClosed, _Died) as error:
            started.set_exception(error)
            return
        started.set_result(None)
        while (item := self._queue.get()) is not None:
            if not item.future.set_running_or_notify_cancel():
                continue
            try:
                graded = self._graded(worker, item)
            except (ValueError, PoolClosed) as error:
                item.future.set_exception(error)
            else:
                item.future.set_result(graded)
        worker.end()

    def _graded(self, worker: "_Worker", item: "_Item") -> Graded:
        parts, failed = {}, []
        for config in self._configs:
            if isinstance(config, RewardModelConfig) or not judges(config, item.task):
                continue
            name = reward_name(config)
            seconds = config.seconds + (_GRACE_SECONDS if isinstance(config, CodeConfig) else 0)
            try:
                parts[name] = worker.score(Ask(self._indices[name], item.task, item.reply), seconds)
            except _Died as died:
                opinion = None if isinstance(config, FormatConfig | LengthConfig | CustomConfig) else False
                parts[name] = Score(0.0, opinion, str(died))
                failed.append(name)
        return add_up(self._configs, item.task, parts, failed)


@dataclass(frozen=True)
class _Item:
    task: Task
    reply: Reply
    future: Future[Graded] = field(default_factory=Future)


class _Died(Exception):
    """The worker is no more; its text says why."""


class _Worker:
    """A process that scores, and is started again when it is needed after its death."""

    def __init__(self, first: Start) -> None:
        self._first = first
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def start(self) -> Connection:
        """Starts the process, and waits until its rewards are made.

        Raises:
            ValueError: They cannot be made.
            _Died: It does not come up.
            PoolClosed: It is not to run any more.
        """
        ours, theirs = Pipe()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from qwq_jax.rl.rewards.worker import run; run({theirs.fileno()}, {os.getpid()})"
        )
        with self._lock, theirs:
            if self._closed:
                ours.close()
                raise PoolClosed(_CLOSED)
            # What rewards print goes where errors go. A session of its own, so that what they start can be killed too.
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            self._connection = ours
        answer = self._ask(self._first, _START_SECONDS)
        if isinstance(answer, Refused):
            self._kill()
            if answer.by_user:
                raise ValueError(answer.text.partition(": ")[2])
            raise _Died(answer.text)
        assert isinstance(answer, Ready)
        return ours

    def score(self, ask: Ask, seconds: float) -> Score:
        """Has something scored.

        Raises:
            _Died: It took longer than `seconds`, or the process ended.
            PoolClosed: It is not to run any more.
        """
        if self._connection is None:
            self.start()
        answer = self._ask(ask, seconds)
        if isinstance(answer, Refused):
            self._kill()
            raise _Died(answer.text)
        assert isinstance(answer, Score)
        return answer

    def close(self) -> None:
        """Kills the process, from any thread, for good."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                _kill_session(self._process)

    def end(self) -> None:
        """Kills the process, and waits for it; from the thread that started it."""
        if self._process is not None:
            self._kill()

    def _ask(self, message: Start | Ask, seconds: float) -> object:
        assert self._connection is not None
        try:
            self._connection.send(message)
            if self._connection.poll(seconds):
                return self._connection.recv()
            reason = f"killed after {seconds:g} s"
        except (EOFError, OSError):
            reason = ""
        status = self._kill()
        if self._closed:
            raise PoolClosed(_CLOSED)
        raise _Died(reason or f"its process ended with status {status}")

    def _kill(self) -> int:
        """Kills the process if it lives; its exit status."""
        assert self._process is not None and self._connection is not None
        with self._lock:
            process, self._process = self._process, None
            self._connection.close()
            self._connection = None
            _kill_session(process)
        return process.wait()


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and what it started, unless it has been waited for."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # it has ended, and waits only to be waited for
