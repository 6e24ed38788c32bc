r"""The reward for mathematics: symbolic equality of what the last ``\boxed{}`` holds and a known answer.

math-verify reads LaTeX with a grammar, never with ``eval``: its way of reading plain expressions, which goes through
``eval``, is not used. It gives up after some seconds, where it can be interrupted; where it cannot, the pool kills it.
"""

import logging
import re
from importlib.util import find_spec

from qwq_jax.config.rewards import MathConfig
from qwq_jax.rl.rewards.answers import answer_text, last_boxed, normalised
from qwq_jax.rl.rewards.matching import known_answers
from qwq_jax.rl.types import Reply, Score, Task

_SHOWN = 80
# Longer is no answer; reading time grows with the square of it.
_LONGEST = 2000
# Letters that are a product to mathematics, whose factors may change places, but are a word to us.
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]{3,}")


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

        # Reports each timeout with all of the text; the note of the score is enough.
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        self._library = math_verify
        self._digits = config.digits
        # Three things may take so long: reading either side, and comparing.
        self._seconds = max(1, int(config.seconds / 4))

    def score(self, task: Task, reply: Reply) -> Score:
        """Scores a reply; ValueError as in `known_answers`."""
        answers = known_answers(task)
        boxed = last_boxed(answer_text(reply))
        if boxed is None:
            return Score(0.0, False, r"no \boxed{}")
        if len(boxed) > _LONGEST:
            return Score(0.0, False, f"{len(boxed)} characters are no answer")
        right = any(self._equal(answer, boxed) for answer in answers)
        return Score(float(right), right, f"{boxed:.{_SHOWN}}")

    def _equal(self, answer: str, boxed: str) -> bool:
        answer = last_boxed(answer) or answer
        words = normalised(answer)
        if words == normalised(boxed):
            return True
        if _WORDS.fullmatch(words):
            return False
        known, given = self._read(answer), self._read(boxed)
        return self._library.verify(known, given, float_rounding=self._digits, timeout_seconds=self._seconds)

    def _read(self, latex: str) -> list:
        latex = latex.strip().strip("$").rstrip(". ")
        return self._library.parse(
            rf"$\boxed{{{latex}}}$",
            extraction_config=[self._library.LatexExtractionConfig(boxed_match_priority=0)],
            parsing_timeout=self._seconds,
        )
