"""Which sequences run in the next step: first come first served, in pages, without deadlock.

Every running sequence has a row and pages on one replica.  A waiting one is admitted when some replica has a row and
the pages for all its tokens, and one more page for each sequence that runs there.  A sequence that decodes past its
last page takes another; if none is free, the youngest sequence of that replica gives up its pages and goes back to the
waiting line at the place of its arrival, to compute its tokens again.  So the oldest sequence always goes on, and,
since each fits a replica's pages alone, all end.
"""

import heapq
from bisect import insort

from qwq_jax.engine.pages import PagePool, pages_for
from qwq_jax.engine.request import Sequence
from qwq_jax.engine.step import EngineShape, Schedule, Work


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class _Replica:
    """The rows, the pages and the running sequences (oldest first) of one replica."""

    def __init__(self, index: int, shape: EngineShape) -> None:
        self.index = index
        self.pool = PagePool(shape.num_pages)
        self.running: list[Sequence] = []
        self.rows = list(range(shape.max_sequences))

    def enter(self, sequence: Sequence, pages: int) -> None:
        sequence.replica, sequence.row = self.index, heapq.heappop(self.rows)
        sequence.pages = self.pool.take(pages)
        insort(self.running, sequence, key=_arrival)

    def leave(self, sequence: Sequence) -> None:
        assert sequence.replica == self.index and sequence.row is not None, "the sequence runs elsewhere"
        self.running.remove(sequence)
        heapq.heappush(self.rows, sequence.row)
        self.pool.give_back(sequence.pages)
        sequence.pages, sequence.replica, sequence.row, sequence.computed = [], None, None, 0


class Scheduler:
    """Owns rows and pages; `schedule` chooses a step's work, `complete` takes note that it was done."""

    def __init__(self, shape: EngineShape) -> None:
        self._shape = shape
        self._replicas = [_Replica(index, shape) for index in range(shape.replicas)]
        self._waiting: list[tuple[int, Sequence]] = []
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        """Sequences without a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences with a row."""
        return sum(len(replica.running) for replica in self._replicas)

    @property
    def free_pages(self) -> tuple[int, ...]:
        """Free pages of each replica."""
        return tuple(replica.pool.free for replica in self._replicas)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in line, at the place of its arrival."""
        assert sequence.limit <= self._shape.context, "a sequence that cannot fit must be refused before"
        heapq.heappush(self._waiting, (sequence.arrival, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that has ended or is no longer wanted; its pages are free at once."""
        if sequence.replica is not None:
            self._replicas[sequence.replica].leave(sequence)
            return
        before = len(self._waiting)
        self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
        assert len(self._waiting) == before - 1, "the sequence is not here"
        heapq.heapify(self._waiting)

    def schedule(self) -> Schedule:
        """Choose the next step's work; empty only if there is no sequence."""
        before = self.preemptions
        for replica in self._replicas:
            self._grow(replica)
        if self.preemptions == before:
            self._admit()
        return Schedule(
            tuple(self._decode(replica) for replica in self._replicas),
            tuple(self._prefill(replica) for replica in self._replicas),
        )

    def complete(self, work: Work) -> None:
        """The keys and values of this work are in the cache now."""
        assert work.sequence.computed == work.start, "work done out of order"
        work.sequence.computed += work.length

    def _grow(self, replica: _Replica) -> None:
        """Give each decoding sequence the page its next token needs, the oldest first."""
        for sequence in tuple(replica.running):
            if sequence.replica is None:
                continue
            while len(sequence.pages) < pages_for(len(sequence.tokens), self._shape.page_size):
                if replica.pool.free:
                    sequence.pages += replica.pool.take(1)
                    continue
                youngest = replica.running[-1]
                replica.leave(youngest)
                youngest.preemptions += 1
                self.preemptions += 1
                self.add(youngest)
                if youngest is sequence:
                    break

    def _admit(self) -> None:
        """Let in the head of the line while some replica can take it; each goes where the most pages are free."""
        while self._waiting:
            sequence = self._waiting[0][1]
            pages = pages_for(len(sequence.tokens), self._shape.page_size)
            able = [replica for replica in self._replicas if replica.rows and self._has_room(replica, pages)]
            if not able:
                return
            heapq.heappop(self._waiting)
            max(able, key=lambda replica: (replica.pool.free, len(replica.rows), -replica.index)).enter(sequence, pages)

    def _has_room(self, replica: _Replica, pages: int) -> bool:
        return pages + len(replica.running) <= replica.pool.free or not replica.running

    def _decode(self, replica: _Replica) -> tuple[Work, ...]:
        return tuple(Work(sequence, sequence.computed, 1) for sequence in replica.running if sequence.pending == 1)

    def _prefill(self, replica: _Replica) -> tuple[Work, ...]:
        works: list[Work] = []
        budget = self._shape.prefill_chunk
        for sequence in replica.running:
            if sequence.pending == 1:
                continue
            if not budget or len(works) == self._shape.max_prefill_sequences:
                break
            length = min(budget, sequence.pending)
            works.append(Work(sequence, sequence.computed, length))
            budget -= length
        return tuple(works)
