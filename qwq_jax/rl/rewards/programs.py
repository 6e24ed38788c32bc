r"""Tests of a program, as tasks carry them in ``judge.tests``, and what counts as the right result.

A list, or one alone, of

- ``{"stdin": "3 4\n", "stdout": "7\n"}``: the program is run, and writes what is expected, but for spaces at the ends
  of lines and of the text;
- ``{"call": "add", "args": [3, 4], "kwargs": {}, "result": 7}``: the function returns what is expected, tuples being as
  good as lists (and the order of a set not mattering). ``"Solution.add"`` calls the method of a ``Solution()``;
- ``{"asserts": "def check(candidate):\n    assert candidate(3, 4) == 7", "candidate": "add"}``: code, as in HumanEval,
  that raises nothing; see `inside.roles.be_tests` for what it can use;
- ``"assert add(3, 4) == 7"``: the same in short, as in MBPP.

Of the first two kinds what is expected never enters the sandbox. Code that asserts runs in a sandbox other than the
program's: it calls the program, and sees plain data come back. So a program cannot look for the right answer, end the
tests early, or return what is equal to everything.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from qwq_jax.rl.types import Task

_KINDS = {
    "stdin": ({"stdin", "stdout"}, set()),
    "call": ({"call", "result"}, {"args", "kwargs"}),
    "asserts": ({"asserts"}, {"candidate"}),
}
_NUMERAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")
_LONGEST_NUMERAL = 100


@dataclass(frozen=True)
class StreamTest:
    """What is written for what is read."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class CallTest:
    """What a function, or a method of an object made without arguments (``"Class.method"``), returns."""

    call: str
    result: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AssertTest:
    """Code that raises nothing; `candidate` is the function that it tests by that name, if any."""

    asserts: str
    candidate: str = ""


ProgramTest = StreamTest | CallTest | AssertTest


def read_tests(task: Task) -> tuple[ProgramTest, ...]:
    """The tests of a task.

    Raises:
        ValueError: There are none, or one is not as the module says; the sentence names it.
    """
    tests = task.judge.get("tests")
    if isinstance(tests, str | Mapping):
        tests = [tests]
    if not isinstance(tests, list | tuple) or not tests:
        raise ValueError(f"task {task.task_id}: judge.tests: expected tests of a program, got {tests!r:.80}")
    return tuple(_test(test, f"task {task.task_id}: judge.tests[{index}]") for index, test in enumerate(tests))


def _test(test: Any, where: str) -> ProgramTest:
    if isinstance(test, str):
        test = {"asserts": test}
    kind = next((kind for kind in _KINDS if isinstance(test, Mapping) and kind in test), None)
    if kind is None:
        raise ValueError(f"{where}: expected an object with stdin, call or asserts, or a text, got {test!r:.80}")
    needed, possible = _KINDS[kind]
    wrong = sorted((needed - set(test)) | (set(test) - needed - possible))
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} is {'missing' if wrong[0] in needed else 'not a key of such a test'}")
    for key in ("stdin", "stdout", "call", "asserts", "candidate"):
        if not isinstance(test.get(key, ""), str):
            raise ValueError(f"{where}.{key}: expected a text, got {test[key]!r:.80}")
    match kind:
        case "stdin":
            return StreamTest(test["stdin"], test["stdout"])
        case "asserts":
            return AssertTest(test["asserts"], test.get("candidate", ""))
    args, kwargs = test.get("args", []), test.get("kwargs", {})
    if not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
        raise ValueError(f"{where}: expected a list as args and an object as kwargs, got {args!r:.80}, {kwargs!r:.80}")
    return CallTest(test["call"], test["result"], tuple(args), kwargs)


def same_output(expected: str, actual: str, tolerance: float = 0.0) -> bool:
    """Whether a program wrote what is expected: line by line, word by word, numbers by their value."""
    expected_lines, actual_lines = (text.rstrip().split("\n") for text in (expected, actual))
    return len(expected_lines) == len(actual_lines) and all(
        one.rstrip() == other.rstrip() or _same_words(one.split(), other.split(), tolerance)
        for one, other in zip(expected_lines, actual_lines, strict=True)
    )


def _same_words(expected: list[str], actual: list[str], tolerance: float) -> bool:
    return len(expected) == len(actual) and all(
        one == other or _same_numeral(one, other, tolerance) for one, other in zip(expected, actual, strict=True)
    )


def _same_numeral(expected: str, actual: str, tolerance: float) -> bool:
    if not all(len(text) <= _LONGEST_NUMERAL and _NUMERAL.fullmatch(text) for text in (expected, actual)):
        return False
    one, other = Decimal(expected), Decimal(actual)
    return abs(one - other) <= Decimal(tolerance) * max(1, abs(one))


def same_value(expected: Any, actual: Any, tolerance: float = 0.0) -> bool:
    """Whether a function returned what is expected; `expected` is from JSON, `actual` plain data.

    Raises:
        RecursionError: Both are too deep.
        OverflowError: An integer beyond all floats meets one.
    """
    if isinstance(expected, bool) or isinstance(actual, bool):
        return expected is actual
    if isinstance(expected, int | float) and isinstance(actual, int | float):
        return expected == actual or abs(expected - actual) <= tolerance * max(1, abs(expected))
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        return len(expected) == len(actual) and all(
            same_value(one, other, tolerance) for one, other in zip(expected, actual, strict=True)
        )
    if isinstance(expected, list | tuple) and isinstance(actual, set):
        return len(expected) == len(actual) and {_as_tuples(one) for one in expected} == actual
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        named = {str(key): value for key, value in actual.items()}  # JSON's keys are texts
        return set(expected) == set(named) and all(
            same_value(value, named[key], tolerance) for key, value in expected.items()
        )
    return type(expected) is type(actual) and expected == actual


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value
