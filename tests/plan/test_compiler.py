"""Processes that compile: what they answer is kept, what they refuse is said."""

import tempfile
from pathlib import Path

import pytest

from qwq_jax.plan import compiler
from qwq_jax.plan.compiler import CompilerFailed, Request, Workers, answer_all, is_kept


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "WORKER", "tests.plan.fake_worker")


def ask(tmp_path: Path, *tasks: str) -> list[dict]:
    with Workers(2) as workers:
        return answer_all(requests_of(tmp_path, *tasks), store=tmp_path / "store", workers=workers)


def requests_of(tmp_path: Path, *tasks: str) -> list[Request]:
    return [Request({"log": str(tmp_path / "log")}, task) for task in tasks]


def test_answers_come_in_order_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [answer["task"] for answer in ask(tmp_path, "one", "two")] == ["one", "two"]
    assert [answer["task"] for answer in ask(tmp_path, "two", "three", "one")] == ["two", "three", "one"]
    assert sorted((tmp_path / "log").read_text().split()) == ["one", "three", "two"], "each was asked once"
    kept = Request({"log": str(tmp_path / "log")}, "one")
    assert is_kept(kept, tmp_path / "store")
    monkeypatch.setattr(compiler, "_sources", lambda: "another version of this package")
    assert not is_kept(kept, tmp_path / "store")


def test_what_a_process_refuses_is_one_sentence_and_not_kept(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="^rows do not divide$"):
            ask(tmp_path, "refused")
    assert (tmp_path / "log").read_text().split() == ["refused"] * 2


def test_a_process_that_fails_is_no_answer(tmp_path: Path) -> None:
    with pytest.raises(CompilerFailed, match="Traceback\nKeyError: 'rows'"):
        ask(tmp_path, "broken")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("killed", "killed: the process that compiled ended by signal 9, which for lack of memory is 9"),
        ("broken", "broken: the process that compiled ended with code 1\nnoise of a compiler\nTraceback"),
        ("garbage", "garbage: its process said 'a warning where an answer should be', which is no answer"),
    ],
)
def test_what_ended_a_process_is_told_and_nothing_of_the_requests_before(tmp_path: Path, task: str, said: str) -> None:
    with Workers(1) as workers:
        workers.ask(*requests_of(tmp_path, "one"))
        with pytest.raises(CompilerFailed, match=f"^{said}"):
            workers.ask(*requests_of(tmp_path, task))


def test_what_processes_write_goes_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    ask(tmp_path, "one", "two")
    with pytest.raises(CompilerFailed):
        ask(tmp_path, "three", "killed")
    assert not list((tmp_path / "temporary").iterdir())


def test_a_process_answers_one_request_after_another(tmp_path: Path) -> None:
    with Workers(1) as workers:
        first, second = (
            answer_all(requests_of(tmp_path, *tasks), store=tmp_path / "store", workers=workers)
            for tasks in (("one", "two"), ("three",))
        )
        with pytest.raises(ValueError, match="^rows do not divide$"):
            workers.ask(*requests_of(tmp_path, "refused"))
        with pytest.raises(CompilerFailed, match="KeyError: 'rows'"):
            workers.ask(*requests_of(tmp_path, "broken"))
        another = workers.ask(*requests_of(tmp_path, "four"))
    assert len({answer["process"] for answer in (*first, *second)}) == 1
    assert another["process"] != first[0]["process"], "the one that failed is not asked again"


def test_a_second_process_starts_with_the_first_and_no_third(tmp_path: Path) -> None:
    with Workers(8) as workers:
        workers.ask(*requests_of(tmp_path, "one"))
        assert len(workers._idle) == 2


def test_what_ended_a_process_before_it_was_asked_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "WORKER", "tests.plan.no_worker")
    with Workers(2) as workers:
        for _ in range(2):
            with pytest.raises(CompilerFailed, match=r"No module named tests\.plan\.no_worker"):
                workers.ask(*requests_of(tmp_path, "one"))
            for idle in workers._idle:
                idle._process.wait(60)


def test_kept_answers_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(tmp_path, "one")
    monkeypatch.setattr(compiler, "WORKER", "tests.plan.no_worker")
    assert [answer["task"] for answer in ask(tmp_path, "one")] == ["one"]


def test_progress_is_told_of_each(tmp_path: Path) -> None:
    told: list[str] = []
    with Workers(2) as workers:
        answer_all(
            requests_of(tmp_path, "one", "two", "three"),
            store=tmp_path / "store",
            workers=workers,
            progress=lambda request: told.append(request.task),
        )
    assert sorted(told) == ["one", "three", "two"]
