"""The reward for programs: the last code block of the answer, run against the tests of the task in a sandbox."""

import time
from dataclasses import dataclass
from typing import Any

from qwq_jax.config.rewards import CodeConfig
from qwq_jax.rl.rewards.answers import answer_text, last_code
from qwq_jax.rl.rewards.inside.frames import Message
from qwq_jax.rl.rewards.inside.plain_data import decode, encode
from qwq_jax.rl.rewards.programs import (
    AssertTest,
    CallTest,
    ProgramTest,
    StreamTest,
    read_tests,
    same_output,
    same_value,
)
from qwq_jax.rl.rewards.sandbox import Enclosure, Lost, Sandbox
from qwq_jax.rl.types import Reply, Score, Task

_PASSED = ""
_TOO_LONG = "it took too long"


class CodeReward:
    """Runs programs.

    Raises:
        ValueError: No sandbox can be made here; see `Enclosure.find`.
    """

    def __init__(self, config: CodeConfig) -> None:
        self._config = config
        self._enclosure = Enclosure.find(config)

    def score(self, task: Task, reply: Reply) -> Score:
        """1 if all tests pass; with ``partial`` their share; the note says what went wrong first."""
        tests = read_tests(task)
        program = last_code(answer_text(reply))
        if program is None:
            return Score(0.0, False, "no code block")
        failures: list[str] = []
        passed = 0
        with _Trial(self._enclosure, self._config, program) as trial:
            for index, test in enumerate(tests, start=1):
                verdict = trial.verdict(test)
                passed += verdict == _PASSED
                if verdict != _PASSED:
                    failures.append(f"test {index}: {verdict}")
                    if not self._config.partial:
                        break
        if not failures:
            return Score(1.0, True, f"{passed} of {len(tests)} tests")
        note = f"{failures[0]} ({passed} of {len(tests)} passed)" if self._config.partial else failures[0]
        return Score(passed / len(tests) if self._config.partial else 0.0, False, note)


class _Trial:
    """One program and its sandboxes: its own, and that of code that asserts; each is made when it is needed."""

    def __init__(self, enclosure: Enclosure, config: CodeConfig, program: str) -> None:
        self._enclosure, self._config, self._program = enclosure, config, program
        self._deadline = time.monotonic() + config.seconds
        self._error = ""
        self._own: Sandbox | None = None
        self._other: Sandbox | None = None

    def __enter__(self) -> "_Trial":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        for sandbox in (self._own, self._other):
            if sandbox is not None:
                sandbox.close()
        self._own = self._other = None

    def verdict(self, test: ProgramTest) -> str:
        """Empty if it passes, else what went wrong, in a few words."""
        if time.monotonic() >= self._deadline:
            return "no time was left"
        try:
            match test:
                case StreamTest():
                    return self._stream(test)
                case CallTest():
                    return self._call(test)
                case AssertTest():
                    return self._asserts(test)
        except Lost as lost:
            self._close()
            return f"the sandbox was lost: {lost}"
        except _Failed as failed:
            return str(failed)
        except (RecursionError, MemoryError, OverflowError):
            return "a result too large to compare"

    def _sandbox(self) -> Sandbox:
        """The program's, the program in it."""
        if self._own is None:
            self._own = Sandbox(self._enclosure, self._config, self._deadline)
            self._error = str(self._own.ask({"do": "load", "program": self._program}).get("error"))[:200]
        if self._error:
            raise _Failed(self._error)
        return self._own

    def _stream(self, test: StreamTest) -> str:
        report = self._sandbox().ask({"do": "run", "stdin": test.stdin})
        match report.get("ended"):
            case "time":
                return _TOO_LONG
            case "output":
                return "it wrote too much"
        if report.get("status") != 0:
            return _last_line(str(report.get("note"))) or f"it ended with status {report.get('status')}"
        right = same_output(test.stdout, str(report.get("output")), self._config.tolerance)
        return _PASSED if right else "wrong output"

    def _names(self) -> Message:
        """Starts the program as a module; its names."""
        answer = _answer(self._sandbox().ask({"do": "open"}))
        if not isinstance(answer.get("names"), dict):
            raise Lost("it did not tell its names")
        return answer["names"]

    def _call(self, test: CallTest) -> str:
        outer, _, inner = test.call.partition(".")
        names = self._names()
        if outer not in names:
            return f"{outer} is not defined"
        function = _number(names[outer])
        if inner:
            made = self._value({"call": function, "args": [], "kwargs": {}})
            function = _number(self._value({"get": _number(made), "name": inner}))
        kwargs = {name: encode(value, _no_object) for name, value in test.kwargs.items()}
        value = self._value({"call": function, "args": encode(list(test.args), _no_object), "kwargs": kwargs})
        try:
            actual = decode(value, _Object)
        except (ValueError, TypeError, OverflowError):
            raise Lost("it sent what is no value") from None
        return _PASSED if same_value(test.result, actual, self._config.tolerance) else "wrong result"

    def _value(self, question: Message) -> Any:
        answer = _answer(self._sandbox().ask({"do": "ask", "question": question}))
        if "value" not in answer:
            raise Lost("it sent no value")
        return answer["value"]

    def _asserts(self, test: AssertTest) -> str:
        names = self._names()
        if self._other is None:
            self._other = Sandbox(self._enclosure, self._config, self._deadline)
        self._other.send({"do": "tests", "code": test.asserts, "names": names, "candidate": test.candidate})
        failed = ""
        deadline = time.monotonic() + self._config.test_seconds + 1.0
        while True:
            message = self._other.receive(seconds=deadline - time.monotonic())
            match message:
                case {"ask": dict(question)}:
                    self._other.send(self._sandbox().ask({"do": "ask", "question": question}))
                case {"failed": text}:
                    failed = str(text)
                case {"ended": "time"}:
                    return _TOO_LONG
                case {"ended": _, "status": status}:
                    return _PASSED if status == 0 and not failed else failed or f"the tests ended with status {status}"


class _Failed(Exception):
    """What is wrong with the program, in a few words."""


@dataclass(frozen=True)
class _Object:
    """An object that stays in the sandbox; equal to nothing that a test can expect."""

    number: int


def _answer(message: Message) -> Message:
    """A message of the program itself; `_Failed` if it raised something or is gone."""
    if "raised" in message:
        raise _Failed(": ".join(map(str, message["raised"]))[:200])
    if "lost" in message:
        raise _Failed(_TOO_LONG if message["lost"] == "time" else f"the program was lost: {message['lost']}"[:200])
    return message


def _number(value: Any) -> int:
    """The handle in an encoded object."""
    match value:
        case {"type": "object", "value": int(number)}:
            return number
    raise _Failed("what the test calls is no function")


def _no_object(value: Any) -> int:
    raise AssertionError(f"a task holds a {type(value).__name__}, which JSON cannot")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else ""
