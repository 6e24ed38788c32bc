"""The files of an evaluation: what is asked, what was answered, how it was judged.

::

    OUTPUT/
      requests.jsonl   a line a sample, as `generate` takes them
      answers.jsonl    what it answered; see `batch_file` and `result_file`
      scores.jsonl     a line a sample: {"id", "task", "sample", "source", "reward", "correct", "parts", ...}
      summary.json     the table, written when all is done
      report.html      the same to look at, with some of the replies

A line of one file belongs to the line of the same number in the others.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwq_jax.engine.request import Completion, FinishReason
from qwq_jax.jobs.result_file import file_fingerprint
from qwq_jax.rl.evaluate import JudgedTask, Sample
from qwq_jax.rl.report import Results, ShownReply
from qwq_jax.rl.rewards.answers import vote
from qwq_jax.rl.rewards.graded import Graded
from qwq_jax.rl.types import Reply, Task


@dataclass(frozen=True)
class EvaluationFiles:
    """Where they are."""

    output: Path

    @property
    def requests(self) -> Path:
        """What is asked."""
        return self.output / "requests.jsonl"

    @property
    def answers(self) -> Path:
        """What was answered."""
        return self.output / "answers.jsonl"

    @property
    def scores(self) -> Path:
        """How it was judged."""
        return self.output / "scores.jsonl"

    @property
    def summary(self) -> Path:
        """The table."""
        return self.output / "summary.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.output / "report.html"


def write_requests(files: EvaluationFiles, tasks: Sequence[Task], samples: int, *, process: int = 0) -> None:
    """Writes a line for each sample of each task; several processes may do so at once.

    Raises:
        ValueError: The directory holds the evaluation of something else.
    """
    files.output.mkdir(parents=True, exist_ok=True)
    partial = files.output / f"requests.{process}.tmp"
    with partial.open("w", encoding="utf-8") as file:
        for task in tasks:
            for sample in range(samples):
                line = {"custom_id": f"{task.task_id}#{sample}", "messages": task.messages, "return_token_ids": True}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    known = files.answers.exists() and files.requests.exists()
    if known and file_fingerprint(files.requests) != file_fingerprint(partial):
        partial.unlink()
        raise ValueError(
            f"{files.output} holds the evaluation of other tasks, or with another number of samples: "
            "choose another output"
        )
    partial.replace(files.requests)


def read_completions(files: EvaluationFiles) -> Iterator[Completion]:
    """What the engine drew, in the order of the requests, all of which have to be answered.

    Raises:
        ValueError: A request could not be served.
    """
    with files.answers.open("rb") as file:
        for raw in file:
            record = json.loads(raw)
            if record["error"] is not None:
                name = record["custom_id"].rpartition("#")[0]
                raise ValueError(f"task {name!r} could not be answered: {record['error']['message']}")
            (choice,) = record["response"]["body"]["choices"]
            tokens, reason = tuple(choice["token_ids"]), FinishReason(choice["finish_reason"])
            # Without stop strings only a token stops.
            stop = tokens[-1] if reason is FinishReason.STOP else None
            yield Completion(record["custom_id"], choice["index"], tokens, reason, stop)


def score_line(number: int, sample: int, task: Task, reply: Reply, graded: Graded) -> bytes:
    """How one reply was judged, as a line; `number` is that of its request."""
    notes = [f"{name}: {part.note}" for name, part in graded.parts.items() if part.note]
    record = {
        "id": f"batch_req_{number}",
        "task": task.task_id,
        "sample": sample,
        "source": task.source,
        "reward": graded.value,
        "correct": graded.correct,
        "parts": {name: part.value for name, part in graded.parts.items()},
        "failed": list(graded.failed),
        "note": "; ".join(notes),
        "votes": can_vote(task),
        "vote": vote(reply) if can_vote(task) else None,
        "tokens": reply.tokens,
        "truncated": reply.truncated,
    }
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def can_vote(task: Task) -> bool:
    """Whether answers to a task can be counted against each other: those that are compared with a known one."""
    return "answer" in task.judge and "tests" not in task.judge


def read_scores(files: EvaluationFiles) -> list[dict[str, Any]]:
    """The lines of a finished evaluation.

    Raises:
        ValueError: There is none.
    """
    if not files.summary.is_file() or not files.scores.is_file():
        raise ValueError(f"{files.output}: no finished evaluation is there")
    return [json.loads(line) for line in files.scores.read_bytes().splitlines()]


def judged_tasks(scores: Sequence[Mapping[str, Any]]) -> list[JudgedTask]:
    """The lines as tasks with their samples, in their order."""
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for score in scores:
        by_task.setdefault(score["task"], []).append(score)
    return [
        JudgedTask(name, found[0]["source"], tuple(map(_sample, found)), votes=found[0]["votes"])
        for name, found in by_task.items()
    ]


def _sample(score: Mapping[str, Any]) -> Sample:
    return Sample(score["reward"], score["correct"], score["vote"], score["tokens"], score["truncated"])


def first_replies(
    files: EvaluationFiles, scores: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, ShownReply]:
    """The first reply to each of these tasks, as far as there are any."""
    found: dict[str, ShownReply] = {}
    wanted = set(names)
    with files.answers.open("rb") as file:
        for raw, score in zip(file, scores, strict=True):
            if score["task"] in wanted - found.keys():
                (choice,) = json.loads(raw)["response"]["body"]["choices"]
                message = choice["message"]
                found[score["task"]] = ShownReply(
                    message.get("reasoning_content"),
                    message["content"],
                    reward=score["reward"],
                    correct=score["correct"],
                    tokens=score["tokens"],
                    truncated=score["truncated"],
                    note=score["note"],
                )
    return found


def write_summary(files: EvaluationFiles, results: Results, settings: Mapping[str, Any]) -> None:
    """Writes the table, whole or not at all: that it is there says that the evaluation is finished."""
    assert results.after is not None
    record = {
        "settings": settings,
        "rows": [asdict(row) for row in results.after.rows],
        "gains": {
            source: {name: asdict(gain) for name, gain in gains.items()} for source, gains in results.gains.items()
        },
    }
    partial = files.summary.with_name("summary.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(files.summary)
