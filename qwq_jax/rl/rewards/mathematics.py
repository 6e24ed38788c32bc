r"""The reward for mathematics: symbolic equality of what the last ``\boxed{}`` holds and a known answer.

math-verify reads LaTeX with a grammar, never with ``eval``: its way of reading plain expressions, which goes through
``eval``, is not used. It is interrupted after some seconds; where it cannot be, the pool kills it.
"""

import contextlib
import itertools
import logging
import re
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from types import FrameType

from qwq_jax.config.rewards import MathConfig
from qwq_jax.rl.rewards.answers import answer_text, last_boxed, normalised
from qwq_jax.rl.rewards.matching import known_answers
from qwq_jax.rl.types import Reply, Score, Task

_SHOWN = 80
# Longer is no answer; reading time grows with the square of it.
_LONGEST = 2000
# Deeper is none either: the grammar reads 20 nested brackets in a second or two, and 100 in 45.
_DEEPEST = 32
# Of the seconds that the pool grants a reply, the part after which it is interrupted.
_PATIENCE = 0.75
# Letters that are a product to mathematics, whose factors may change places, but are a word to us.
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]{3,}")


class OverdueError(BaseException):
    """Time is up. Not an Exception: what the library makes of errors of its own must not swallow this one."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OverdueError in the block after so many seconds, and again ten times a second while the block goes on.

    Once is not enough, which is why the library's own limits are not used: an exception raised while a finaliser or a
    callback of the garbage collector happens to run is printed and forgotten, and the block would never end.
    """

    def overdue(signum: int, frame: FrameType | None) -> None:
        raise OverdueError

    before = signal.signal(signal.SIGALRM, overdue)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        try:
            yield
        finally:
            # Time may be up on the way into this line: the outer one is reached even so, a tenth of a second ahead.
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _depth(latex: str) -> int:
    """How many brackets of any kind are open at once, at most."""
    steps = ((letter in "([{") - (letter in ")]}") for letter in latex)
    return max(itertools.accumulate(steps), default=0)


class MathReward:
    """1 where both are equal.

    It uses the alarm of the process, and so works in the main thread only.

    Raises:
        ValueError: math-verify is not installed.
    """

    def __init__(self, config: MathConfig) -> None:
        if find_spec("math_verify") is None:
            raise ValueError("reward math needs math-verify: pip install 'qwq_jax[rl]'")
        import math_verify

        # Would warn of every process that it has no limits of its own.
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        self._library = math_verify
        self._digits = config.digits
        self._seconds = config.seconds * _PATIENCE

    def score(self, task: Task, reply: Reply) -> Score:
        """Scores a reply; ValueError as in `known_answers`."""
        answers = known_answers(task)
        boxed = last_boxed(answer_text(reply))
        if boxed is None:
            return Score(0.0, False, r"no \boxed{}")
        if len(boxed) > _LONGEST:
            return Score(0.0, False, f"{len(boxed)} characters are no answer")
        if (depth := _depth(boxed)) > _DEEPEST:
            return Score(0.0, False, f"brackets {depth} deep are no answer")
        try:
            with at_most(self._seconds):
                right = any(self._equal(answer, boxed) for answer in answers)
        except OverdueError:
            return Score(0.0, False, f"not compared in {self._seconds:g} s: {boxed:.{_SHOWN}}")
        return Score(float(right), right, f"{boxed:.{_SHOWN}}")

    def _equal(self, answer: str, boxed: str) -> bool:
        answer = last_boxed(answer) or answer
        words = normalised(answer)
        if words == normalised(boxed):
            return True
        if _WORDS.fullmatch(words):
            return False
        known, given = self._read(answer), self._read(boxed)
        return self._library.verify(known, given, float_rounding=self._digits, timeout_seconds=0)

    def _read(self, latex: str) -> list:
        latex = latex.strip().strip("$").rstrip(". ")
        return self._library.parse(
            rf"$\boxed{{{latex}}}$",
            extraction_config=[self._library.LatexExtractionConfig(boxed_match_priority=0)],
            parsing_timeout=0,  # none of its own: `at_most`
        )
