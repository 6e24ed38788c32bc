"""Rewards that compare the answer with a known one: as text, number or integer, or by reasoning-gym's verifier."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from qwq_jax.config.rewards import ArithmeticConfig, ExactConfig, NumericConfig, ReasoningGymConfig, Take
from qwq_jax.rl.rewards import arithmetic
from qwq_jax.rl.rewards.answers import answer_text, last_boxed, normalised, taken
from qwq_jax.rl.rewards.quantity import Number, agree, last_number, read_number
from qwq_jax.rl.types import Reply, Score, Task

_MISSING = {Take.BOXED: r"no \boxed{}", Take.LAST_LINE: "no answer", Take.ANSWER: "no answer"}
_SHOWN = 80


def known_answers(task: Task) -> tuple[str, ...]:
    """The right answers of a task, any of which will do.

    Raises:
        ValueError: ``judge.answer`` is not there, or is neither a text nor a number nor a list of these.
    """
    given = task.judge.get("answer")
    answers = given if isinstance(given, list | tuple) else [given]
    if not answers or not all(isinstance(one, str | int | float) and str(one).strip() for one in answers):
        raise ValueError(
            f"task {task.task_id}: judge.answer: expected a text, a number or a list of them, got {given!r:.80}"
        )
    return tuple(str(one) for one in answers)


def known_numbers(task: Task) -> tuple[Number, ...]:
    """The same as numbers; ValueError where one is none."""
    answers = known_answers(task)
    numbers = tuple(number for answer in answers if (number := read_number(answer)) is not None)
    if len(numbers) < len(answers):
        raise ValueError(f"task {task.task_id}: judge.answer: expected a number, got {answers}")
    return numbers


def known_integer(task: Task) -> int:
    """The same as an integer; ValueError where it is none."""
    (text, *more) = known_answers(task)
    if more or not text.strip().removeprefix("-").isdecimal():
        raise ValueError(f"task {task.task_id}: judge.answer: expected an integer, got {task.judge['answer']!r:.80}")
    return int(text)


def gym_entry(task: Task) -> tuple[str, dict[str, Any]]:
    """The data set and the entry of a task of reasoning-gym; ValueError where it is none."""
    match task.judge.get("entry"):
        case {"answer": _, "metadata": {"source_dataset": str(name)}} as entry:
            return name, dict(entry)
    raise ValueError(
        f"task {task.task_id}: judge.entry: expected an entry of reasoning-gym, with answer and metadata.source_dataset"
    )


@dataclass(frozen=True)
class ExactReward:
    """1 where the piece that is compared is a known answer, both normalised."""

    config: ExactConfig

    def score(self, task: Task, reply: Reply) -> Score:
        """Scores a reply; ValueError as in `known_answers`."""
        answers = known_answers(task)
        piece = taken(reply, self.config.take)
        if piece is None:
            return Score(0.0, False, _MISSING[self.config.take])
        case = self.config.case
        return _verdict(normalised(piece, case=case) in {normalised(one, case=case) for one in answers}, piece)


@dataclass(frozen=True)
class NumericReward:
    """1 where the number in the piece that is compared is near enough to a known one."""

    config: NumericConfig

    def score(self, task: Task, reply: Reply) -> Score:
        """Scores a reply; ValueError as in `known_numbers`."""
        numbers = known_numbers(task)
        piece = taken(reply, self.config.take)
        if piece is None:
            return Score(0.0, False, _MISSING[self.config.take])
        found = read_number(piece) if self.config.take is Take.BOXED else last_number(piece)
        if found is None:
            return Score(0.0, False, f"no number: {piece:.{_SHOWN}}")
        absolute, relative = self.config.absolute, self.config.relative
        return _verdict(any(agree(found, one, absolute=absolute, relative=relative) for one in numbers), piece)


@dataclass(frozen=True)
class ArithmeticReward:
    """1 where what is boxed last is the known integer."""

    config: ArithmeticConfig

    def score(self, task: Task, reply: Reply) -> Score:
        """Scores a reply; ValueError as in `known_integer`."""
        expected = known_integer(task)
        boxed = last_boxed(answer_text(reply))
        found = None if boxed is None else arithmetic.answer(rf"\boxed{{{boxed}}}")
        return Score(0.0, False, "no boxed integer") if found is None else _verdict(found == expected, str(found))


class ReasoningGymReward:
    """What the verifier of the task's data set gives, from 0 to 1; correct at 1.

    Raises:
        ValueError: reasoning-gym is not installed.
    """

    def __init__(self, config: ReasoningGymConfig) -> None:
        if find_spec("reasoning_gym") is None:
            raise ValueError("reward reasoning_gym needs the package: pip install 'qwq_jax[rl]'")
        import reasoning_gym

        self._config = config
        self._verifier: Callable[[str], Callable[..., float]] = reasoning_gym.get_score_answer_fn  # pyright: ignore[reportAttributeAccessIssue]

    def score(self, task: Task, reply: Reply) -> Score:
        """Scores a reply; ValueError as in `gym_entry`, or for a data set that is not known."""
        name, entry = gym_entry(task)
        piece = taken(reply, self._config.take)
        if piece is None:
            return Score(0.0, False, _MISSING[self._config.take])
        value = float(self._verifier(name)(piece, entry))
        return Score(value, value >= 1.0, f"{piece:.{_SHOWN}}")


def _verdict(right: bool, shown: str) -> Score:
    return Score(float(right), right, f"{shown:.{_SHOWN}}")
