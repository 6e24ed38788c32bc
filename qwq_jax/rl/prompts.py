"""The prompts of a run in their order: a pure function of the tasks and the seed, with one number as its cursor."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import grain

from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.rl import CurriculumConfig
from qwq_jax.rl.evaluate import JudgedTask
from qwq_jax.rl.types import Task

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A task as the policy is asked it.

    Attributes:
        task: The task.
        token_ids: Its conversation in the chat template, up to where the reply begins.
    """

    task: Task
    token_ids: tuple[int, ...]


def make_prompts(tasks: Sequence[Task], tokenizer: ChatTokenizer, *, longest: int) -> list[Prompt]:
    """Renders the tasks, and leaves out those of more than `longest` tokens.

    Raises:
        ValueError: A conversation cannot be rendered, or no task is left.
    """
    prompts = []
    for task in tasks:
        try:
            prompts.append(Prompt(task, tuple(tokenizer.apply_template(task.messages))))
        except ValueError as error:
            raise ValueError(f"task {task.task_id}: {error}") from None
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= longest]
    if not kept:
        raise ValueError(f"none of {len(prompts)} tasks has a prompt of at most {longest} tokens (max_prompt_tokens)")
    if len(kept) < len(prompts):
        LOG.info(
            "%d of %d tasks are left out: prompts of over %d tokens", len(prompts) - len(kept), len(prompts), longest
        )
    return kept


def measured(tasks: Sequence[Task], judged: Iterable[JudgedTask]) -> list[Task]:
    """The tasks with the difficulty that an evaluation found: the share of replies that were wrong.

    Raises:
        ValueError: A task was not evaluated, or nothing said whether replies to it were right.
    """
    wrong: dict[str, float] = {}
    for each in judged:
        right = [sample.correct for sample in each.samples if sample.correct is not None]
        if right:
            wrong[each.task_id] = 1.0 - sum(right) / len(right)
    unknown = next((task.task_id for task in tasks if task.task_id not in wrong), None)
    if unknown is not None:
        raise ValueError(f"curriculum.evaluation: task {unknown} was not judged right or wrong there")
    return [replace(task, difficulty=wrong[task.task_id]) for task in tasks]


def select(tasks: Sequence[Task], curriculum: CurriculumConfig) -> list[Task]:
    """The tasks of the difficulties that are trained on.

    Raises:
        ValueError: None is left, or the order needs a difficulty that a task does not have.
    """
    least, most = curriculum.least_difficulty, curriculum.most_difficulty
    chosen = [task for task in tasks if task.difficulty is None or least <= task.difficulty <= most]
    if not chosen:
        raise ValueError(f"curriculum: no task has a difficulty from {least:g} to {most:g}")
    unknown = next((task.task_id for task in chosen if task.difficulty is None), None)
    if curriculum.order == "easy_first" and unknown is not None:
        raise ValueError(f"curriculum.order easy_first needs a difficulty for each task, and {unknown} has none")
    return chosen


class PromptOrder:
    """Prompt number ``i`` of an endless sequence of passes over `prompts`, each in an order of its own.

    Example:
        >>> order = PromptOrder(prompts, seed=0)  # doctest: +SKIP
        >>> batch, cursor = [order[i] for i in range(cursor, cursor + 64)], cursor + 64  # doctest: +SKIP
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, easy_first: bool = False) -> None:
        self._prompts = prompts
        self._easy_first = easy_first
        self._order = grain.MapDataset.range(len(prompts)).seed(seed).shuffle().repeat()
        self._passes: dict[int, list[int]] = {}

    def __getitem__(self, number: int) -> Prompt:
        """The prompt; `number` counts from 0 through all passes."""
        if not self._easy_first:
            return self._prompts[cast(int, self._order[number])]
        turn, place = divmod(number, len(self._prompts))
        return self._prompts[self._sorted(turn)[place]]

    def _sorted(self, turn: int) -> list[int]:
        if turn not in self._passes:
            begin = turn * len(self._prompts)
            shuffled = [cast(int, self._order[begin + i]) for i in range(len(self._prompts))]
            self._passes = {turn: sorted(shuffled, key=lambda i: self._prompts[i].task.difficulty or 0.0)}
        return self._passes[turn]
