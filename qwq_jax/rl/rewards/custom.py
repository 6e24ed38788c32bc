"""A reward that is a function of the user's."""

import importlib
import math
from collections.abc import Callable

from qwq_jax.config.rewards import CustomConfig
from qwq_jax.rl.types import Reply, Score, Task


class CustomReward:
    """Calls ``function(task, reply)``, which returns a `Score`, a number, or a boolean that judges the reply.

    Raises:
        ValueError: There is no such function.
    """

    def __init__(self, config: CustomConfig) -> None:
        self._name = config.function
        module, _, name = config.function.partition(":")
        try:
            function = vars(importlib.import_module(module)).get(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"reward function {config.function}: {error}") from None
        if not callable(function):
            raise ValueError(f"reward function {config.function}: {module} has no function {name}")
        self._function: Callable[[Task, Reply], object] = function

    def score(self, task: Task, reply: Reply) -> Score:
        """Scores a reply.

        Raises:
            ValueError: The function returned what is no reward.
        """
        result = self._function(task, reply)
        if isinstance(result, bool):
            return Score(float(result), result)
        score = result if isinstance(result, Score) else Score(result) if isinstance(result, int | float) else None
        if score is None or not math.isfinite(score.value):
            raise ValueError(
                f"reward function {self._name} returned {result!r:.80}, not a Score, a number or a boolean"
            )
        return Score(float(score.value), score.correct, score.note)
