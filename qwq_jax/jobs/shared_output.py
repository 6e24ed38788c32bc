"""One output file, answered by several processes.

Process 0 writes `OUTPUT` itself, as a process alone would.  Where the lines are divided the others write parts beside
it, `OUTPUT.part-1` and so on, which are result files of their own; process 0 takes them in when all are done.  It also
takes in, before anything else, the parts that an earlier run left, whatever its number of processes: so what is
answered is known in one place, and told to all.
"""

import re
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwq_jax.interrupt import Interrupted
from qwq_jax.jobs.batch_file import result_number
from qwq_jax.jobs.result_file import ResultFile
from qwq_jax.processes import Peers

# As long as a network file system may remember that a file was not there.
PATIENCE_SECONDS = 60.0


class SharedOutput:
    """Open it with `with`; then `answered` holds the lines that need not be served, the same on every process.

    Args:
        path: The output.
        origin: What the results depend on, see `ResultFile`.
        peers: The processes of this run.
        split: Whether each process serves lines of its own; otherwise all serve all, and only process 0 writes.
    """

    def __init__(self, path: Path, origin: dict[str, Any], peers: Peers, *, split: bool) -> None:
        self.path = path
        self.answered: frozenset[int] = frozenset()
        self._origin = origin
        self._peers = peers
        self.split = split
        self._file: ResultFile | None = None

    def __enter__(self) -> Self:
        peers = self._peers
        if peers.index == 0:
            self._file = ResultFile(self.path, self._origin).__enter__()
            try:
                take_in_parts(self._file, self._origin)
                self.answered = frozenset(self._file.done)
                peers.share("answered", runs_of(self.answered))
            except BaseException as error:
                self._file.__exit__(type(error), error, None)
                raise
        else:
            self.answered = frozenset(n for first, last in peers.require("answered") for n in range(first, last + 1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._peers.index == 0 and isinstance(error, Interrupted):
            self._peers.share("verdict", {"stopped": str(error)})
        if self._file is not None:
            self._file.__exit__(kind, error, trace)

    def open_part(self) -> None:
        """Before the first line is served: makes sure that process 0 will find every part."""
        if not self.split:
            return
        if self._peers.index:
            self._file = ResultFile(part_path(self.path, self._peers.index), self._origin).__enter__()
            self._peers.share("part", 0)
            self._peers.require("all-parts-seen")  # computing meanwhile, it would hear late of a part that is not
            return
        for index in self._peers.others:
            self._peers.require("part", index)
            self._wait_for_part(index, 0)
        self._peers.share("all-parts-seen", 0)

    def serves(self, rank: int) -> bool:
        """Whether this process serves a line, by its rank among those that are not answered yet."""
        return not self.split or rank % self._peers.count == self._peers.index

    def share_of(self, total: int) -> int:
        """How many of `total` lines there are for this process to see done."""
        left = total - len(self.answered)
        return sum(map(self.serves, range(left))) if self.split else left

    def append(self, raw: bytes) -> None:
        """Adds a result line; not in the processes that only help process 0 to compute it."""
        if self._file is not None:
            self._file.append(raw)

    def sync_if_due(self) -> None:
        """Makes durable what has waited."""
        if self._file is not None:
            self._file.sync_if_due()

    def stopped(self, total: int) -> Interrupted:
        """What to raise when asked to stop; all that was answered is durable then."""
        if self._file is not None:
            self._file.sync()
        if self.split or self._file is None:
            parts = " and its parts" if self.split else ""
            return Interrupted(f"what is answered is saved in {self.path}{parts}; the same command goes on")
        done = len(self._file.done)
        return Interrupted(f"{done} of {total} requests are answered in {self.path}; the same command goes on")

    def finish(self, total: int, counts: dict[str, Any]) -> dict[str, Any]:
        """All lines of this process are answered: waits for the others, and puts the output together.

        Args:
            total: Lines of the input.
            counts: Of this process.

        Returns:
            The sums of the counts of all processes that had lines of their own.

        Raises:
            ValueError: A part cannot be seen or read by process 0.
            Interrupted: A process was asked to stop.
        """
        if self._peers.index:
            return self._hand_over(counts)
        assert self._file is not None, "process 0 writes the output"
        sums = dict(counts)
        for index in self._peers.others:
            done = self._peers.receive("done", index)
            if done is None:
                raise self.stopped(total)
            if self.split:
                sums = {name: value + done["counts"][name] for name, value in sums.items()}
            if done["bytes"] is not None:
                self._wait_for_part(index, done["bytes"])
        take_in_parts(self._file, self._origin)
        assert len(self._file.done) == total, "a line was lost"
        self._file.finish()
        self._peers.share("verdict", {"counts": sums})
        return sums

    def _hand_over(self, counts: dict[str, Any]) -> dict[str, Any]:
        size = None
        if self._file is not None:
            self._file.__exit__(None, None, None)
            size, self._file = self._file.path.stat().st_size, None
        self._peers.share("done", {"counts": counts, "bytes": size})
        verdict = self._peers.require("verdict")
        if "stopped" in verdict:
            raise Interrupted(verdict["stopped"])
        return verdict["counts"]

    def _wait_for_part(self, index: int, size: int) -> None:
        part = part_path(self.path, index)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not part.exists() or part.stat().st_size < size:
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"{part}, which process {index} writes, cannot be seen by process 0: the output must lie in a "
                    f"directory that all processes share; what the part holds counts once it lies beside {self.path}"
                )
            self._peers.stopping()
            time.sleep(0.1)


def part_path(output: Path, index: int) -> Path:
    """The file of process `index`, from 1 on."""
    return output.with_name(f"{output.name}.part-{index}")


def take_in_parts(results: ResultFile, origin: dict[str, Any]) -> None:
    """Appends what the parts beside an output answer and it does not, and deletes them once that is durable.

    Raises:
        ValueError: A part belongs to another command, or is being written.
    """
    name = re.compile(re.escape(results.path.name) + r"\.part-(\d+)(\.run\.json)?")
    found = (name.fullmatch(path.name) for path in results.path.parent.iterdir())
    for index in sorted({int(match[1]) for match in found if match}):
        with ResultFile(part_path(results.path, index), origin) as part:
            for raw in part.lines():
                if result_number(raw) not in results.done:
                    results.append(raw)
            results.sync()
            part.delete()


def runs_of(numbers: Iterable[int]) -> list[list[int]]:
    """Numbers as runs of neighbours, each first and last.

    Example:
        >>> runs_of({1, 2, 3, 7})
        [[1, 3], [7, 7]]
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs
