"""Held-out tasks in the course of a run: the engine answers them, the rewards of the run judge them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from qwq_jax.config.sampling import SamplingParams
from qwq_jax.rl.evaluate import Evaluation, JudgedTask, Sample, evaluate
from qwq_jax.rl.prompts import Prompt
from qwq_jax.rl.report import ShownReply
from qwq_jax.rl.rewards.answers import vote
from qwq_jax.rl.rollout import Group, Rollouts
from qwq_jax.rl.rollout import Sample as Drawn


@dataclass(frozen=True)
class HeldOut:
    """Answers the same tasks with the same noise each time.

    Attributes:
        prompts: The tasks.
        rollouts: The engine and the rewards.
        params: How replies are drawn.
        shown: Of so many tasks the first reply is kept as text.
        directory: Where each evaluation is written to, by its step; None on all processes but the first.
    """

    prompts: Sequence[Prompt]
    rollouts: Rollouts
    params: SamplingParams
    shown: int = 12
    directory: epath.Path | None = None

    def measure(self, step: int) -> dict[str, float]:
        """Answers all tasks; gives ``eval_accuracy``, ``eval_reward`` and ``eval_length``, the former by source too."""
        named = [(f"evaluation/{index}", prompt) for index, prompt in enumerate(self.prompts)]
        groups = self.rollouts.draw(named, {}, params=self.params)
        assert groups is not None
        tasks = [judged_task(group) for group in groups]
        if self.directory is not None:
            shown = [_shown(group) for group in groups[: self.shown]]
            self.directory.mkdir(parents=True, exist_ok=True)
            write_judged(self.directory / f"{step:06d}.json", tasks, shown)
        return measures_of(evaluate(tasks, ()))


def judged_task(group: Group) -> JudgedTask:
    """A task with its replies, as statistics take them."""
    samples = tuple(_sample(each) for each in group.samples)
    task = group.prompt.task
    return JudgedTask(task.task_id, task.source, samples, votes="answer" in task.judge)


def measures_of(evaluation: Evaluation) -> dict[str, float]:
    """Its numbers by the names of a record."""
    total = evaluation.total
    found = {
        "eval_reward": total.measures["reward"].value,
        "eval_length": total.tokens,
        "eval_truncated": total.truncated,
    }
    accuracy = f"avg@{total.samples}"
    if accuracy in total.measures:
        found["eval_accuracy"] = total.measures[accuracy].value
    for row in evaluation.rows[1:]:
        found[f"eval_reward/{row.source}"] = row.measures["reward"].value
        if accuracy in row.measures:
            found[f"eval_accuracy/{row.source}"] = row.measures[accuracy].value
    return found


def write_judged(path: epath.Path, tasks: Sequence[JudgedTask], shown: Sequence[Mapping[str, Any]]) -> None:
    """Writes an evaluation, whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    listed = [
        [task.task_id, task.source, task.votes, [list(vars(sample).values()) for sample in task.samples]]
        for task in tasks
    ]
    partial.write_text(json.dumps({"tasks": listed, "shown": list(shown)}))
    partial.replace(path)


def read_judged(path: epath.Path) -> tuple[list[JudgedTask], dict[str, ShownReply]]:
    """The tasks of an evaluation, and replies by the id of their task."""
    found = json.loads(path.read_text())
    tasks = [
        JudgedTask(name, source, tuple(Sample(*sample) for sample in samples), votes)
        for name, source, votes, samples in found["tasks"]
    ]
    return tasks, {shown.pop("task_id"): ShownReply(**shown) for shown in found["shown"]}


def _sample(drawn: Drawn) -> Sample:
    graded, reply = drawn.graded, drawn.reply
    return Sample(graded.value, graded.correct, vote(reply), reply.tokens, reply.truncated)


def _shown(group: Group) -> dict[str, Any]:
    first = group.samples[0]
    notes = (f"{name}: {score.note}" for name, score in first.graded.parts.items() if score.note)
    return {
        "task_id": group.prompt.task.task_id,
        "thought": first.reply.thought,
        "answer": first.reply.answer if first.reply.answer or first.reply.thought else first.reply.text,
        "reward": first.graded.value,
        "correct": first.graded.correct,
        "tokens": first.reply.tokens,
        "truncated": first.reply.truncated,
        "note": "; ".join(notes),
    }
