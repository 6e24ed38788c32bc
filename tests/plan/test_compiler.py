"""Processes that compile: what they answer is kept, what they refuse is said."""

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
