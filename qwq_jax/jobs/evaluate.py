"""`qwq-jax eval`: how many tasks a model solves. Killed at any point, the same command goes on where it stood.

First all tasks are answered, as `generate` would; then the replies are judged by the rewards of reinforcement learning.
Replies that are there are not drawn again, and those that are judged not judged again.
"""

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint.store import open_checkpoint
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.evaluate import EvaluateConfig
from qwq_jax.config.inference import CHAT_SAMPLING
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.rewards import (
    ArithmeticConfig,
    CodeConfig,
    InstructionsConfig,
    MathConfig,
    ReasoningGymConfig,
    RewardModelConfig,
    VerifierConfig,
)
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.interrupt import Interrupted, StopRequested
from qwq_jax.jobs.answer import chat_prompt
from qwq_jax.jobs.evaluation_files import (
    EvaluationFiles,
    first_replies,
    judged_tasks,
    read_completions,
    read_scores,
    score_line,
    write_requests,
    write_summary,
)
from qwq_jax.jobs.generate import generate
from qwq_jax.jobs.result_file import ResultFile, file_fingerprint
from qwq_jax.processes import Peers
from qwq_jax.rl.evaluate import Evaluation, compare, evaluate
from qwq_jax.rl.replies import reply_of
from qwq_jax.rl.report import Report, Results, ShownTask, estimate_text, write_report
from qwq_jax.rl.rewards.graded import Graded, check_task
from qwq_jax.rl.rewards.pool import RewardPool
from qwq_jax.rl.tasks import ARITHMETIC_SOURCES, load_tasks
from qwq_jax.rl.types import Reply, Task

UsualReward = ArithmeticConfig | CodeConfig | InstructionsConfig | MathConfig | ReasoningGymConfig
_USUAL: tuple[tuple[str, type[UsualReward]], ...] = (
    ("tests", CodeConfig),
    ("instructions", InstructionsConfig),
    ("entry", ReasoningGymConfig),
    ("answer", MathConfig),
)

LOG_SECONDS = 5.0
SHOWN_TASKS = 12
# Replies that wait in the pool for each worker, so that none is idle.
_AHEAD = 8

_log = logging.getLogger(__name__)


def evaluate_checkpoint(
    checkpoint: str,
    output: Path,
    config: EvaluateConfig,
    *,
    engine: EngineConfig,
    mesh: MeshConfig,
    sampling: SamplingParams = CHAT_SAMPLING,
    before: Path | None = None,
) -> Evaluation | None:
    """Answers the tasks, judges the replies, and prints and writes the table.

    Args:
        checkpoint: Directory, local or ``gs://``.
        output: Directory for the files of `evaluation_files`, local; it may hold a part of this evaluation.
        config: What is asked, and how it is judged.
        engine: Sizes of the engine.
        mesh: Devices.
        sampling: How replies are drawn; it has no stop strings, and `n` is 1.
        before: The output of another evaluation, to compare with.

    Returns:
        The table; None on a process other than the first.

    Raises:
        ValueError: Something given cannot be used.
        Interrupted: A signal asked to stop; all that was answered and judged is saved.
    """
    if sampling.n != 1:
        raise ValueError(f"sampling.n {sampling.n}: the number of samples is an option of its own")
    if sampling.stop:
        raise ValueError(f"sampling.stop {list(sampling.stop)}: an evaluation reads whole replies, leave it out")
    files = EvaluationFiles(output)
    tasks = load_tasks(config.tasks)
    rewards = _verifiers(config, tasks)
    earlier = None if before is None else _Earlier(EvaluationFiles(before), read_scores(EvaluationFiles(before)))
    opened = open_checkpoint(checkpoint)
    tokenizer = ChatTokenizer.from_directory(opened.tokenizer_dir)
    _check_prompts(tasks, tokenizer, sampling, engine.max_context or opened.config.max_context)
    with StopRequested() as stop:
        write_requests(files, tasks, config.samples, process=jax.process_index())
        generate(
            checkpoint, files.requests, files.answers, engine=engine, mesh=mesh, sampling=sampling, seed=config.seed
        )
        with Peers.meet(stop) as peers:
            if peers.index:
                if peers.receive("judged") is None:
                    raise Interrupted("process 0 judges the replies; the same command goes on")
                return None
            run = _Run(files, config, tuple(tasks), rewards, tokenizer, sampling)
            run.judge(peers)
            evaluation = run.conclude(checkpoint, earlier)
            peers.share("judged", True)
    return evaluation


@dataclass(frozen=True)
class _Run:
    """An evaluation whose replies are there."""

    files: EvaluationFiles
    config: EvaluateConfig
    tasks: tuple[Task, ...]
    rewards: tuple[VerifierConfig, ...]
    tokenizer: ChatTokenizer
    sampling: SamplingParams

    def replies(self) -> Iterator[tuple[int, Task, int, Reply]]:
        """Each with the number of its line, its task and the number of the sample."""
        completions = enumerate(read_completions(self.files), start=1)
        for task in self.tasks:
            prompt = chat_prompt(task.messages, self.sampling.enable_thinking, self.tokenizer)
            for sample, (number, completion) in enumerate(itertools.islice(completions, self.config.samples)):
                yield number, task, sample, reply_of(completion, prompt, self.tokenizer)

    def judge(self, peers: Peers) -> None:
        """Judges what is not judged yet, as many replies at once as there are workers.

        Raises:
            Interrupted: A process was asked to stop; what is judged is saved.
        """
        total = len(self.tasks) * self.config.samples
        with ResultFile(self.files.scores, self._origin()) as scores:
            if len(scores.done) < total:
                with RewardPool(self.rewards, workers=self.config.workers) as pool:
                    self._judge(pool, scores, total, peers)
            scores.finish()

    def _judge(self, pool: RewardPool, scores: ResultFile, total: int, peers: Peers) -> None:
        left = (each for each in self.replies() if each[0] not in scores.done)
        flying: dict[Future[Graded], tuple[int, Task, int, Reply]] = {}
        logged = time.monotonic()
        while True:
            for each in itertools.islice(left, _AHEAD * self.config.workers - len(flying)):
                flying[pool.submit(each[1], each[3])] = each
            if not flying:
                break
            done, _ = wait(flying, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                number, task, sample, reply = flying.pop(future)
                scores.append(score_line(number, sample, task, reply, future.result()))
            scores.sync_if_due()
            if peers.stopping():
                scores.sync()
                raise Interrupted(
                    f"{len(scores.done)} of {total} replies are judged in {scores.path}; the same command goes on"
                )
            if time.monotonic() - logged >= LOG_SECONDS:
                logged = time.monotonic()
                _log.info("%d of %d replies judged", len(scores.done), total)

    def conclude(self, checkpoint: str, before: "_Earlier | None") -> Evaluation:
        """Writes and prints the table, beside that of an earlier evaluation if there is one."""
        scores = [json.loads(line) for line in self.files.scores.read_bytes().splitlines()]
        failed = sum(bool(score["failed"]) for score in scores)
        if failed:
            _log.warning("%d of %d replies: a verifier had to be killed, and counted 0", failed, len(scores))
        judged, ks = judged_tasks(scores), self.config.measured_ks
        results = Results(after=evaluate(judged, ks))
        if before is not None:
            base = judged_tasks(before.scores)
            shared = [k for k in ks if k <= len(base[0].samples)]
            results = replace(results, before=evaluate(base, shared), gains=compare(base, judged, shared))
        assert results.after is not None
        self._write(checkpoint, results, scores, before)
        Console(highlight=False).print(result_table(results))
        _log.info("%s: the table, and %s to look at", self.files.summary, self.files.report.name)
        return results.after

    def _write(
        self, checkpoint: str, results: Results, scores: Sequence[dict[str, Any]], before: "_Earlier | None"
    ) -> None:
        settings = {
            "checkpoint": checkpoint,
            **self.config.model_dump(mode="json"),
            "sampling": self.sampling.model_dump(mode="json"),
            "before": None if before is None else str(before.files.output),
        }
        names = [task.task_id for task in self.tasks[:SHOWN_TASKS]]
        replies = first_replies(self.files, scores, names)
        others = {} if before is None else first_replies(before.files, before.scores, names)
        report = Report(
            f"Evaluation of {Path(checkpoint.rstrip('/')).name}",
            f"{len(self.tasks)} tasks, {self.config.samples} replies to each. Below, the first to each of some tasks.",
            results=results,
            samples=tuple(
                ShownTask(task, others.get(task.task_id), replies[task.task_id]) for task in self.tasks[:SHOWN_TASKS]
            ),
            config=settings,
            labels=("", "result") if before is None else ("before", "after"),
        )
        write_report(self.files.report, report)
        write_summary(self.files, results, settings)

    def _origin(self) -> dict[str, Any]:
        """What the scores depend on, by the names that an error message calls them."""
        judges = [[task.task_id, task.source, repr(task.judge)] for task in self.tasks]
        return {
            "answers": file_fingerprint(self.files.answers),
            "tasks": hashlib.sha256(json.dumps(judges).encode()).hexdigest(),
            "rewards": [reward.model_dump(mode="json") for reward in self.rewards],
        }


@dataclass(frozen=True)
class _Earlier:
    """Another evaluation to compare with."""

    files: EvaluationFiles
    scores: list[dict[str, Any]]


def usual_rewards(tasks: Sequence[Task]) -> tuple[VerifierConfig, ...]:
    """A reward for each kind of task, confined to the sources that have such tasks.

    By what a task holds: ``tests`` are run, ``instructions`` checked, an ``entry`` goes to reasoning-gym, and an
    ``answer`` is compared as an integer (`arithmetic_tasks`) or as mathematics.

    Raises:
        ValueError: A task holds nothing of these, or another kind of it than others of its source.
    """
    kinds: dict[str, type[UsualReward]] = {}
    for task in tasks:
        kind = _usual_kind(task)
        if kinds.setdefault(task.source, kind) is not kind:
            raise ValueError(
                f"task {task.task_id!r} is judged by other means than others of source {task.source!r}: "
                "give the two sources, or say with --rewards how to judge"
            )
    found = dict.fromkeys(kinds.values())
    if len(found) == 1:
        return (next(iter(found))(),)
    return tuple(kind(sources=tuple(source for source in kinds if kinds[source] is kind)) for kind in found)


def _usual_kind(task: Task) -> type[UsualReward]:
    if task.source in ARITHMETIC_SOURCES:
        return ArithmeticConfig
    found = next((kind for name, kind in _USUAL if name in task.judge), None)
    if found is None:
        raise ValueError(f"task {task.task_id!r} holds nothing to judge a reply by: say with --rewards how to judge it")
    return found


def result_table(results: Results) -> Table:
    """The table for a terminal: a block a source, a row a measure."""
    assert results.after is not None
    total = results.after.total
    title = f"means over {total.tasks} tasks, {total.samples} replies to each"
    table = Table(title=title, title_justify="left", title_style="dim", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("", overflow="fold")
    for heading in ("result", "95 % interval", *(("gain",) if results.gains else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results.after.rows:
        table.add_row(Text(f"{row.source} ({row.tasks})", style="bold"))
        gains = results.gains.get(row.source, {})
        for name, estimate in row.measures.items():
            share = name != "reward"
            value, _, interval = estimate_text(estimate, share=share).partition(" ")
            gain = estimate_text(gains.get(name), share=share, signed=True).replace(" points", "")
            table.add_row(f"  {name}", *(value, interval.strip("()"), gain)[: len(table.columns) - 1])
        table.add_row("  tokens", f"{row.tokens:,.0f}")
        table.add_row("  cut off", f"{row.truncated:.1%}", end_section=True)
    return table


def _verifiers(config: EvaluateConfig, tasks: Sequence[Task]) -> tuple[VerifierConfig, ...]:
    """The rewards, once it is sure that they can judge the tasks."""
    rewards = config.rewards or usual_rewards(tasks)
    verifiers = tuple(reward for reward in rewards if not isinstance(reward, RewardModelConfig))
    if len(verifiers) < len(rewards):
        raise ValueError("rewards: a reward model is no verifier, and an evaluation does not load it: leave it out")
    for task in tasks:
        check_task(verifiers, task)
    return verifiers


def _check_prompts(tasks: Sequence[Task], tokenizer: ChatTokenizer, sampling: SamplingParams, context: int) -> None:
    """Finds what cannot be asked before anything is computed."""
    for task in tasks:
        try:
            prompt = chat_prompt(task.messages, sampling.enable_thinking, tokenizer)
        except ValueError as error:
            raise ValueError(f"task {task.task_id!r}: {error}") from None
        if len(prompt) >= context:
            raise ValueError(
                f"task {task.task_id!r}: the prompt has {len(prompt)} tokens, which leaves no room in the context of "
                f"{context}: set a larger engine.max_context"
            )
