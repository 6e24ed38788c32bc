"""Thousands of requests that come, wait, run, are put off, end and are called back: nothing leaks and nobody starves.

On the runner of `test_engine`, whose next token is a hash of the whole prefix.
"""

import gc
import random
import sys
from dataclasses import dataclass, field, replace

import pytest

from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Completion, Request
from qwq_jax.engine.step import EngineShape
from tests.engine.test_control import MARKS
from tests.engine.test_engine import (
    EOS,
    VOCAB,
    HashRunner,
    check_answers,
    check_pages,
    make_request,
    next_token,
    shape_of,
)

SHAPE = shape_of(
    replicas=2, max_sequences=4, max_context=48, num_pages=18, page_size=4, prefill_chunk=16, decode_window=4
)


@dataclass
class Guest:
    """A request in the engine: the step by which it has to have ended, and that at which its client hangs up."""

    request: Request
    deadline: int
    leaves_at: int | None
    completions: list[Completion] = field(default_factory=list)


class Soak:
    """Feeds an engine at random, and watches."""

    def __init__(self, shape: EngineShape) -> None:
        self.shape, self.runner = shape, HashRunner(shape)
        self.engine = Engine(self.runner, VOCAB, (EOS,))
        self.draw = random.Random(0)
        self.guests: dict[str, Guest] = {}
        self.came = self.steps = self.checked = self.cancelled = self.forced = 0

    def serve(self, count: int) -> None:
        """Until so many have come in all, and none is left."""
        while self.came < count or self.engine.busy:
            # Some always wait, so that who is passed over for ever is never served because nobody else is left.
            while self.came < count and self.engine.scheduler.waiting < self.draw.randrange(4, 14):
                self._arrive()
            self._step()
        assert not self.guests and not self.engine._sequences
        assert self.engine.scheduler.free_pages == (self.shape.num_pages,) * self.shape.replicas
        assert not self.engine.scheduler.waiting and not self.engine.scheduler.running

    def _arrive(self) -> None:
        draw = self.draw
        length, most = draw.randrange(1, 24), draw.randrange(1, 30)
        options: dict[str, object] = {"max_tokens": most}
        if draw.random() < 0.3:
            options["n"] = draw.randrange(2, 5)
        if draw.random() < 0.3:
            options["stop_token_ids"] = tuple(draw.sample(range(VOCAB), draw.randrange(1, 20)))
        if draw.random() < 0.1:
            options["prompt_logprobs"] = draw.randrange(3)
        options |= {name: True for name in ("ignore_eos", "logprobs") if draw.random() < 0.2}
        room = min(most, self.shape.context - length)
        thinks = room > 8 and draw.random() < 0.3
        if thinks:
            options["max_thinking_tokens"] = longest = draw.randrange(1, room - 4)
            options["min_thinking_tokens"] = draw.randrange(longest + 1)
        request = make_request(f"r{self.came}", length, alike=draw.choice([0, 0, 8, 24]), **options)
        if thinks:
            request = replace(request, thinking=MARKS)
        self.came += 1
        self.engine.add(request)
        leaves_at = self.steps + draw.randrange(20) if draw.random() < 0.1 else None
        deadline = self.steps + self._steps_for_all()
        self.guests[request.request_id] = Guest(request, deadline, leaves_at)

    def _steps_for_all(self) -> int:
        """More steps than all that is in the engine can take, whatever comes later.

        The oldest sequence is never put off, and gets a token or a chunk in each step, but for those in which it waits
        for its own last token to be seen: two steps a token, and some at its beginning and at its end. One that waits
        for a page that a younger one computes may find its row taken by others for as long as a context.
        """
        sequences = [sequence for each in self.engine._sequences.values() for sequence in each]
        tokens = sum(sequence.limit - sequence.computed for sequence in sequences)
        return 2 * (tokens + 2 * len(sequences) + self.shape.context)

    def _step(self) -> None:
        for name, guest in tuple(self.guests.items()):
            if guest.leaves_at is not None and guest.leaves_at <= self.steps:
                self.engine.cancel(name)
                del self.guests[name]
                self.cancelled += 1
        output = self.engine.step()
        self.runner.plans.clear()
        self.steps += 1
        if not self.steps % 5:
            check_pages(self.engine, self.shape)
        for completion in output.completions:
            guest = self.guests[completion.request_id]
            guest.completions.append(completion)
            if len(guest.completions) == guest.request.params.n:
                self._leave(self.guests.pop(completion.request_id))
        late = [name for name, guest in self.guests.items() if guest.deadline < self.steps]
        assert not late, f"{late} starve"

    def _leave(self, guest: Guest) -> None:
        self.forced += sum(len(completion.forced) for completion in guest.completions)
        if guest.request.thinking is None and not self.came % 10:
            check_answers([guest.request], guest.completions, self.shape)
            self.checked += 1


def allocated() -> int:
    """Blocks of Python's allocator in use."""
    gc.collect()
    return sys.getallocatedblocks()


def soak(warm: int, count: int, shape: EngineShape) -> Engine:
    run = Soak(shape)
    run.serve(warm)
    before = allocated()
    run.serve(count)
    grown = allocated() - before
    assert grown < (count - warm) // 2, f"{grown} objects were left, and one a request would be twice as many"
    assert run.cancelled and run.forced and run.checked
    assert run.engine.stats.preemptions and run.engine.stats.shared_tokens
    return run.engine


def repeating(prefix: list[int], seed: int) -> int:
    """Counts from 0 to 4 for the most part, so that guesses hold."""
    return next_token(prefix, seed) if len(prefix) % 7 == 0 else (prefix[-1] + 1) % 5


def test_a_thousand_requests_leave_nothing_behind() -> None:
    soak(200, 1_000, SHAPE)


@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing_behind() -> None:
    soak(2_000, 10_000, SHAPE)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_thousands_of_guessed_requests_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.engine.test_engine.next_token", repeating)
    engine = soak(500, 3_000, replace(SHAPE, drafts=3))
    assert engine.stats.drafted_tokens > engine.stats.accepted_tokens > 1_000
