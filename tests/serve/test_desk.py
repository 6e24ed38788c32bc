"""Who is let in, what the others are told, and a thread that sleeps."""

import asyncio
import threading
import time

import pytest

from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import StepOutput
from qwq_jax.engine.request import Completion, FinishReason, Request
from qwq_jax.serve.desk import Desk
from qwq_jax.serve.errors import ApiError, engine_failed
from qwq_jax.serve.metrics import ServerMetrics
from qwq_jax.serve.worker import Admitted, EngineWorker, Load, Report


class Engine:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.cancelled: list[str] = []

    def submit(self, group, requests):
        self.submitted.append(group)

    def cancel(self, request_ids):
        self.cancelled += request_ids


def desk_of(rows: int, max_waiting: int) -> tuple[Desk, Engine]:
    engine = Engine()
    return Desk(engine, ServerMetrics(), rows=rows, max_waiting=max_waiting), engine


def refusal(desk: Desk) -> ApiError:
    with pytest.raises(ApiError) as caught:
        desk.ticket("late")
    return caught.value


def request(name: str, n: int = 1) -> Request:
    return Request(name, (1, 2), SamplingParams(n=n))


async def admit(desk: Desk, name: str, n: int = 1):
    ticket = desk.ticket(name)
    asking = asyncio.ensure_future(ticket.submit((request(f"{name}-0", n),)))
    await asyncio.sleep(0)
    desk.dispatch(Report((Admitted(name),), StepOutput(), Load(0, 0, 0, 0)))
    await asking
    return ticket


def test_rows_and_line_are_counted_exactly():
    desk, _ = desk_of(rows=2, max_waiting=3)
    tickets = [desk.ticket(str(each)) for each in range(5)]
    error = refusal(desk)
    assert error.status == 429 and int(error.headers["Retry-After"]) >= 1
    with tickets[0]:
        pass
    assert desk.waiting == 2
    desk.ticket("next")
    assert refusal(desk).status == 429


def test_a_request_of_many_samples_is_let_in_if_the_line_is_not_full():
    async def main():
        desk, _ = desk_of(rows=2, max_waiting=1)
        with await admit(desk, "many", n=100):
            assert desk.in_flight == 100
            assert refusal(desk).status == 429
        assert desk.in_flight == 0

    asyncio.run(main())


def test_pages_that_are_short_make_the_line_full_too():
    desk, _ = desk_of(rows=8, max_waiting=2)
    desk.dispatch(Report((), StepOutput(), Load(waiting=3, running=1, free_pages=0, steps=1)))
    assert refusal(desk).status == 429
    desk.dispatch(Report((), StepOutput(), Load(waiting=2, running=2, free_pages=0, steps=2)))
    desk.ticket("in")


def test_leaving_early_cancels_and_ending_does_not():
    async def main():
        desk, engine = desk_of(rows=2, max_waiting=2)
        with await admit(desk, "a"):
            pass
        assert engine.cancelled == ["a-0"]
        with await admit(desk, "b") as ticket:
            end = Completion("b-0", 0, (5,), FinishReason.STOP)
            desk.dispatch(Report((), StepOutput((), (end,)), Load(0, 0, 0, 1)))
            assert [batch async for batch in ticket.batches()] == [[end]]
        assert engine.cancelled == ["a-0"]
        # What the engine still says of one that has left is nobody's.
        desk.dispatch(Report((), StepOutput((), (Completion("a-0", 0, (5,), FinishReason.STOP),)), Load(0, 0, 0, 1)))

    asyncio.run(main())


def test_retry_after_is_the_line_by_the_pace():
    async def main():
        desk, _ = desk_of(rows=1, max_waiting=4)
        tickets = [await admit(desk, str(each)) for each in range(5)]
        now = time.monotonic()
        assert desk.retry_after(now + 7.5) == 8  # nothing has ended in 7.5 s
        end = Completion("0-0", 0, (5,), FinishReason.STOP)
        desk.dispatch(Report((), StepOutput((), (end,)), Load(3, 1, 0, 1)))
        # One has ended in 10 s, and three wait: the place of a fourth is reached in 40 s.
        assert desk.retry_after(now + 10) == pytest.approx(40, abs=1)
        for ticket in tickets:
            with ticket:
                pass

    asyncio.run(main())


def test_nobody_is_let_in_after_the_engine_died():
    desk, _ = desk_of(rows=1, max_waiting=1)
    desk.refuse(engine_failed(503))
    assert refusal(desk).status == 503


def test_the_thread_sleeps_while_there_is_nothing_to_do():
    class Idle:
        busy = False
        asked = 0

        def step(self):
            raise AssertionError("there is nothing to do")

    reports = []
    worker = EngineWorker(Idle(), None, reports.append)
    used = []

    def run():
        worker.run()
        used.append(time.thread_time())

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.2)
    worker.stop()
    thread.join(5)
    assert not thread.is_alive() and not reports
    assert used[0] < 0.1
