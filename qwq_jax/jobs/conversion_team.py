"""One conversion by several processes: who converts which tensors, and when all are there.

Process 0 claims the destination as a process alone would, and says what of it is finished; then each converts its part.
A tensor's record lies beside the checkpoint until it is committed, which process 0 does when it sees all of them: so a
run that was stopped is gone on with by any number of processes.
"""

import time
from collections.abc import Callable, Sequence

from qwq_jax.checkpoint.directory import open_directory
from qwq_jax.checkpoint.huggingface import TensorInfo
from qwq_jax.checkpoint.names import NamePair
from qwq_jax.checkpoint.store import CheckpointWriter
from qwq_jax.interrupt import Interrupted
from qwq_jax.processes import Peers

# As long as a network file system may remember that a file was not there.
PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.5


class ConversionTeam:
    """The processes of one conversion, as one of them sees them; a process alone is a team too.

    Args:
        peers: The processes of this run.
        dest: The destination, which all must see.
    """

    def __init__(self, peers: Peers, dest: str) -> None:
        self._peers = peers
        self._dest = dest
        self._begun = False

    @property
    def leads(self) -> bool:
        """Whether this is the process that claims, checks and commits."""
        return self._peers.index == 0

    @property
    def may_abandon(self) -> bool:
        """Whether nobody else can have written anything."""
        return self.leads and not (self._begun and self._peers.count > 1)

    def open(self, claim: Callable[[], CheckpointWriter]) -> CheckpointWriter:
        """The writer: in process 0 when the others have joined, in those once it has begun.

        Raises:
            ValueError: The destination is not shared, or holds something else; or a process has failed before it
                joined, and nothing is written.
        """
        if self.leads:
            for index in self._peers.others:
                self._peers.require("joined", index)
            return claim()
        self._peers.share("joined", 0)
        finished = set(self._peers.require("destination"))
        self._wait(lambda: bool(open_directory(self._dest).children()), "what process 0 has begun there")
        writer = claim()

        def seen() -> bool:
            writer.look_again()
            return finished <= writer.finished.keys()

        if not writer.is_committed:
            self._wait(seen, "tensors that were finished before")
        # What others have finished meanwhile is theirs: all divide the same tensors.
        writer.finished = {name: record for name, record in writer.finished.items() if name in finished}
        return writer

    def begin(self, writer: CheckpointWriter) -> None:
        """Process 0 lets the others begin."""
        self._begun = True
        if self.leads and self._peers.count > 1:
            self._peers.share("destination", sorted(writer.finished))

    def share_of(self, todo: Sequence[tuple[NamePair, TensorInfo]]) -> list[tuple[NamePair, TensorInfo]]:
        """This process's part: about the same bytes for each, and neighbours, which lie in the same files."""
        total, begin, mine = sum(info.nbytes for _, info in todo), 0, []
        for row, info in todo:
            middle, begin = begin + info.nbytes / 2, begin + info.nbytes
            if int(middle * self._peers.count / max(total, 1)) == self._peers.index:
                mine.append((row, info))
        return mine

    def gather(self, writer: CheckpointWriter) -> None:
        """Waits until every process has done its part or stopped; then process 0 knows what is finished.

        Raises:
            Interrupted: In the other processes, if not everything is.
            ValueError: A process has failed, or writes where process 0 does not see it.
        """
        if self._peers.count == 1:
            return
        if not self.leads:
            self._peers.share("written", sorted(writer.finished))
            stopped = self._peers.require("verdict")
            if stopped:
                raise Interrupted(stopped)
            return
        expected = {name for index in self._peers.others for name in self._peers.require("written", index)}

        def seen() -> bool:
            writer.look_again()
            return expected <= writer.finished.keys()

        self._wait(seen, "tensors that other processes have written")

    def conclude(self, stopped: str = "") -> None:
        """Process 0 tells the others that all is committed, or why not."""
        if self.leads and self._peers.count > 1:
            self._peers.share("verdict", stopped)

    def _wait(self, seen: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not seen():
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"process {self._peers.index} cannot see {what}: {self._dest} must lie in a bucket or a directory "
                    "that all processes share"
                )
            self._peers.stopping()
            time.sleep(_POLL_SECONDS)
