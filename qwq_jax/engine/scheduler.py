"""Which sequences run in the next step: first come first served, in pages, without deadlock.

Every running sequence has a row and pages on one replica.  A waiting one is admitted when some replica has a row and
the pages for all its tokens that it cannot share, and one more page for each sequence that runs there.  A sequence that
decodes past its last page takes another; if none is free, the youngest sequence of that replica gives up its pages and
goes back to the waiting line at the place of its arrival, to compute its tokens again.  So the oldest sequence always
goes on, and, since each fits a replica's pages alone, all end.

Work is issued before the tokens of the last step are known.  That is safe because the devices do things in order: pages
given up are overwritten only after whatever was issued before.
"""

import heapq
from bisect import insort

from qwq_jax.engine.pages import PagePool, extend_digests, pages_for
from qwq_jax.engine.request import Sequence
from qwq_jax.engine.step import EngineShape, Schedule, Work, smallest_of


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class _Replica:
    """The rows, the pages and the running sequences (oldest first) of one replica."""

    def __init__(self, index: int, shape: EngineShape) -> None:
        self.index = index
        self.pool = PagePool(shape.num_pages)
        self.running: list[Sequence] = []
        self.rows = list(range(shape.max_sequences))

    def enter(self, sequence: Sequence, shared: list[int], pages: int) -> None:
        sequence.replica, sequence.row = self.index, heapq.heappop(self.rows)
        self.pool.share(shared)
        sequence.pages = shared + self.pool.take(pages)
        sequence.registered = len(shared)
        insort(self.running, sequence, key=_arrival)

    def close_ranks(self, ready: list[Sequence], sizes: tuple[int, ...]) -> dict[int, int]:
        """Move sequences into rows that are free, where fewer rows then run: programs have so many as one of `sizes`.

        Returns:
            The row that each has left, by its arrival.
        """
        rows = {sequence.row: sequence for sequence in ready if sequence.row is not None}
        if not rows:
            return {}
        needed = sorted([*rows, *self.rows])[len(rows) - 1] + 1
        if smallest_of(sizes, needed) == smallest_of(sizes, max(rows) + 1):
            return {}
        left: dict[int, int] = {}
        for row in sorted(row for row in rows if row >= needed):
            left[rows[row].arrival], rows[row].row = row, heapq.heapreplace(self.rows, row)
        return left

    def leave(self, sequence: Sequence) -> None:
        assert sequence.replica == self.index and sequence.row is not None, "the sequence runs elsewhere"
        self.running.remove(sequence)
        heapq.heappush(self.rows, sequence.row)
        self.pool.give_back(sequence.pages)
        sequence.pages, sequence.replica, sequence.row = [], None, None
        sequence.computed = sequence.ahead = sequence.registered = 0
        sequence.epoch += 1


class Scheduler:
    """Owns rows and pages; `schedule` chooses and issues a step's work, `settle` takes note of what is known of it."""

    def __init__(self, shape: EngineShape) -> None:
        self._shape = shape
        self._replicas = [_Replica(index, shape) for index in range(shape.replicas)]
        self._waiting: list[Sequence] = []
        self._next_guess = 1
        """Tokens to draw before guesses are looked for again: twice as many each time that there were none."""
        self.preemptions = 0
        self.shared_tokens = 0
        """Prompt tokens that were found in the cache."""

    def forget_pages(self) -> None:
        """Let no later sequence begin with what the pages hold; none runs now."""
        for replica in self._replicas:
            replica.pool.forget()

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

    @property
    def step_by_step(self) -> bool:
        """Whether some running sequence has to be seen before its next step is prepared."""
        return any(sequence.step_by_step for replica in self._replicas for sequence in replica.running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in line, at the place of its arrival."""
        assert sequence.limit <= self._shape.context, "a sequence that cannot fit must be refused before"
        insort(self._waiting, sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that has ended or is no longer wanted; its pages are free at once."""
        if sequence.replica is not None:
            self._replicas[sequence.replica].leave(sequence)
        else:
            assert sequence in self._waiting, "the sequence is not here"
            self._waiting.remove(sequence)

    def schedule(self) -> Schedule | None:
        """Choose the next step's work, and count it as done.

        Returns:
            The work; empty if there is none before the last step's tokens are seen, or none at all.  None if pages have
            to be given up by a sequence whose tokens are not known yet: settle, then ask again.
        """
        before = self.preemptions
        for replica in self._replicas:
            if not self._grow(replica):
                return None
        if self.preemptions == before:
            self._admit()
        ready = [[s for s in replica.running if s.pending == 1 and s.horizon > 0] for replica in self._replicas]
        prefill = tuple(self._prefill(replica) for replica in self._replicas)
        left: dict[int, int] = {}
        if not any(prefill):
            for replica, each in zip(self._replicas, ready, strict=True):
                left |= replica.close_ranks(each, self._shape.row_counts)
        if self._shape.drafts and not any(prefill):
            guessed = self._speculate(ready)
            if guessed is not None:
                self._next_guess = 1
                return Schedule(guessed, prefill)
        window = 1 if any(prefill) else self._window(ready)
        if self._shape.drafts:
            # What can be guessed next may be a token away, or nowhere.
            window = min(window, self._next_guess)
            self._next_guess = 2 * window
        decode = tuple(
            tuple(self._draw(replica, s, min(window, s.horizon), origin=left.get(s.arrival)) for s in each)
            for replica, each in zip(self._replicas, ready, strict=True)
        )
        return Schedule(decode, prefill)

    def settle(self, sequence: Sequence) -> None:
        """Let others share the pages of this sequence that are full of known tokens."""
        if not self._shape.prefix_cache or sequence.replica is None:
            return
        # The last token may be computed again (`Sequence.push`), and what is shared must not be written to.
        full = min(sequence.computed, len(sequence.tokens) - 1) // self._shape.page_size
        if full > sequence.registered:
            extend_digests(sequence.digests, sequence.tokens, self._shape.page_size)
            pool = self._replicas[sequence.replica].pool
            for index in range(sequence.registered, full):
                pool.register(sequence.pages[index], sequence.digests[index])
            sequence.registered = full

    def _grow(self, replica: _Replica) -> bool:
        """Give each sequence the pages of its tokens and of the next one, the oldest first."""
        for sequence in tuple(replica.running):
            # Tokens that were put in have to be computed, even where none may be drawn before the host has looked.
            if sequence.replica is None or (sequence.pending == 1 and sequence.horizon <= 0):
                continue
            while len(sequence.pages) < pages_for(sequence.length, self._shape.page_size):
                if replica.pool.free:
                    sequence.pages += replica.pool.take(1)
                    continue
                youngest = replica.running[-1]
                if youngest.ahead:
                    return False
                replica.leave(youngest)
                youngest.preemptions += 1
                self.preemptions += 1
                self.add(youngest)
                if youngest is sequence:
                    break
        return True

    def _admit(self) -> None:
        """Let in those in line while some replica can take the next; each goes where the most pages stay free."""
        computing = [self._computing(replica) for replica in self._replicas]
        for sequence in tuple(self._waiting):
            total = pages_for(len(sequence.tokens), self._shape.page_size)
            choices: list[tuple[int, int, _Replica, list[int]]] = []
            for replica in self._replicas:
                shared = self._shared(replica, sequence)
                missing = total - len(shared) + replica.pool.unheld(shared)
                if replica.rows and self._has_room(replica, missing):
                    choices.append((replica.pool.free - missing, len(replica.rows), replica, shared))
            if not choices:
                return
            _, _, replica, shared = max(choices, key=lambda choice: (*choice[:2], -choice[2].index))
            if (
                sequence.first_unscored is None
                and len(shared) < len(sequence.digests)
                and sequence.digests[len(shared)] in computing[replica.index]
            ):
                continue  # a sequence that runs is about to know the page that this one would compute as well
            self._waiting.remove(sequence)
            replica.enter(sequence, shared, total - len(shared))
            sequence.computed = len(shared) * self._shape.page_size
            self.shared_tokens += sequence.computed
            computing[replica.index] |= set(sequence.digests[len(shared) :])

    def _shared(self, replica: _Replica, sequence: Sequence) -> list[int]:
        """Pages of this replica that hold a beginning of the sequence; at least one token is left to compute."""
        if not self._shape.prefix_cache:
            return []
        extend_digests(sequence.digests, sequence.tokens, self._shape.page_size)
        # A token is scored when the one before it is computed.
        known = sequence.first_unscored
        known = len(sequence.tokens) - 1 if known is None else known - 1
        return replica.pool.find(sequence.digests[: known // self._shape.page_size])

    def _computing(self, replica: _Replica) -> set[bytes]:
        """Digests of the pages that prompts under way will fill."""
        return {
            digest
            for sequence in replica.running
            if sequence.pending > 1
            for digest in sequence.digests[sequence.registered :]
        }

    def _has_room(self, replica: _Replica, pages: int) -> bool:
        return pages + len(replica.running) <= replica.pool.free or not replica.running

    def _window(self, ready: list[list[Sequence]]) -> int:
        """How many tokens each sequence may draw before the host looks: as far as pages go without taking from others.

        While sequences wait for a row, no further than to the end of the first that is known to end.
        """
        everyone = [sequence for each in ready for sequence in each]
        if any(sequence.hooks.mask is not None for sequence in everyone):
            return 1
        window = self._shape.decode_window
        if self._waiting and everyone:
            window = min(window, min(sequence.horizon for sequence in everyone))
        short = lambda: any(  # noqa: E731
            self._missing(each, window) > replica.pool.free for replica, each in zip(self._replicas, ready, strict=True)
        )
        while window > 1 and short():
            window //= 2
        return window

    def _missing(self, sequences: list[Sequence], window: int) -> int:
        """Pages that a window needs beyond those that its sequences have."""
        size = self._shape.page_size
        return sum(max(0, pages_for(s.computed + min(window, s.horizon), size) - len(s.pages)) for s in sequences)

    def _speculate(self, ready: list[list[Sequence]]) -> tuple[tuple[Work, ...], ...] | None:
        """Guesses for the sequences that decode; None if too few have any to forgo a window of several tokens."""
        everyone = [sequence for each in ready for sequence in each]
        if any(sequence.ahead or sequence.step_by_step for sequence in everyone):
            return None
        drafts = {s.arrival: s.lookup.propose(s.tokens, min(self._shape.drafts, s.horizon - 1)) for s in everyone}
        if not everyone or sum(map(bool, drafts.values())) * 4 < len(everyone):
            return None
        guessed: list[tuple[Work, ...]] = []
        for replica, each in zip(self._replicas, ready, strict=True):
            works: list[Work] = []
            for sequence in each:
                guess = drafts[sequence.arrival]
                if self._missing([sequence], 1 + len(guess)) > replica.pool.free:
                    guess = ()
                works.append(self._draw(replica, sequence, 1 + len(guess), guess))
            guessed.append(tuple(works))
        return tuple(guessed)

    def _draw(
        self,
        replica: _Replica,
        sequence: Sequence,
        steps: int,
        drafts: tuple[int, ...] = (),
        origin: int | None = None,
    ) -> Work:
        """Issue the drawing of `steps` tokens, and take the pages for it."""
        sequence.pages += replica.pool.take(self._missing([sequence], steps))
        known = not sequence.ahead
        work = Work(sequence, sequence.computed, steps, draws=steps, known=known, drafts=drafts, origin=origin)
        sequence.computed += steps
        sequence.ahead += steps
        return work

    def _prefill(self, replica: _Replica) -> tuple[Work, ...]:
        works: list[Work] = []
        budget = self._shape.prefill_chunk
        for sequence in replica.running:
            if sequence.pending == 1:
                continue
            if not budget or len(works) == self._shape.max_prefill_sequences:
                break
            length = min(budget, sequence.pending)
            draws = int(length == sequence.pending)
            works.append(Work(sequence, sequence.computed, length, draws=draws, known=True))
            budget -= length
            sequence.computed += length
            sequence.ahead += draws
            self.settle(sequence)
        return tuple(works)
