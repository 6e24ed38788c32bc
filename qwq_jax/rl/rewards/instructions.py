"""The reward for keeping instructions.

A task carries a list in ``judge.instructions``. Each names a rule of `rules.py` and gives what the rule takes::

    [{"rule": "words", "least": 50, "most": 100}, {"rule": "forbids", "texts": ["however"]}, {"rule": "json"}]
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from qwq_jax.config.frozen import describe
from qwq_jax.config.rewards import InstructionsConfig
from qwq_jax.rl.rewards.answers import answer_text
from qwq_jax.rl.rewards.rules import RULES
from qwq_jax.rl.types import Reply, Score, Task


def check_instructions(task: Task) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The instructions of a task, as pairs of a rule and what it takes.

    Raises:
        ValueError: There are none, or one names no rule, or gives what the rule does not take.
    """
    given = task.judge.get("instructions")
    where = f"task {task.task_id}: judge.instructions"
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"{where}: expected a list of rules, got {given!r:.80}")
    checked = []
    for index, instruction in enumerate(given):
        name = instruction.get("rule") if isinstance(instruction, Mapping) else None
        if not isinstance(name, str) or name not in RULES:
            raise ValueError(f"{where}[{index}].rule: expected one of {', '.join(RULES)}, got {name!r:.80}")
        values = {key: value for key, value in instruction.items() if key != "rule"}
        try:
            RULES[name]("", **values)
        except ValidationError as error:
            raise ValueError(f"{where}[{index}]: {name}: {describe(error)}") from None
        except re.error as error:
            raise ValueError(f"{where}[{index}]: {name}: pattern: {error}") from None
        if "least" in inspect.signature(RULES[name]).parameters and not {"least", "most"} & set(values):
            raise ValueError(f"{where}[{index}]: {name}: expected least or most, or both")
        checked.append((name, values))
    return tuple(checked)


@dataclass(frozen=True)
class InstructionsReward:
    """1 if all rules are kept; with ``partial`` the share of those that are. An empty answer keeps none."""

    config: InstructionsConfig

    def score(self, task: Task, reply: Reply) -> Score:
        """Scores a reply; ValueError as in `check_instructions`."""
        instructions = check_instructions(task)
        text = answer_text(reply)
        broken = [name for name, values in instructions if not (text.strip() and RULES[name](text, **values))]
        value = 1 - len(broken) / len(instructions) if self.config.partial else float(not broken)
        return Score(value, not broken, f"broken: {', '.join(broken)}" if broken else "")
