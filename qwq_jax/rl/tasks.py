"""Tasks from where they come from: JSONL files, arithmetic, reasoning-gym. No JAX here.

A line of a file is one task:

    {"id": "gsm8k-12", "prompt": "What is 6 x 7?", "answer": "42", "source": "gsm8k", "difficulty": 0.1}

with ``messages`` in place of ``prompt`` for a conversation, and of ``answer`` (a text, or a list of those that are
right), ``tests``, ``instructions`` and ``entry`` (of reasoning-gym) what the rewards of the run read. Whatever else it
holds is refused: a mistyped key would be a reward that is always zero.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from qwq_jax.chat import checked_message
from qwq_jax.config.frozen import Frozen
from qwq_jax.config.json_line import load_json_line, shortened
from qwq_jax.config.load import build
from qwq_jax.config.tasks import ArithmeticTasks, FileTasks, GymTasks
from qwq_jax.rl.rewards.arithmetic import LEVELS, Problem, Split, problems
from qwq_jax.rl.types import Task

ARITHMETIC_SOURCES = tuple(f"arithmetic-{level}" for level in LEVELS)
"""The sources of `arithmetic_tasks`, by level."""

# What rewards read, as the line has it.
_JUDGE = ("answer", "tests", "instructions", "entry")

# A held-out split is taken to be exhausted when so many problems in a row were seen before.
_PATIENCE = 2_000


class _Line(Frozen):
    """The keys of a line; what `tests` and `instructions` hold is the business of the rewards that read them."""

    id: str = Field(min_length=1)
    messages: tuple[dict[str, Any], ...] | None = Field(default=None, min_length=1)
    prompt: str | None = Field(default=None, min_length=1)
    source: str = ""
    answer: Any = None
    tests: Any = None
    instructions: tuple[Any, ...] | None = Field(default=None, min_length=1)
    entry: dict[str, Any] | None = Field(default=None, min_length=1)
    difficulty: float | None = Field(default=None, ge=0.0, le=1.0)

    @field_validator("tests")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if value is not None and not (isinstance(value, str | dict | tuple) and value):
            raise ValueError(f"expected a test or a list of tests, got {shortened(value)}")
        return value

    @field_validator("answer")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        answers = value if isinstance(value, tuple) else (value,)
        fit = (isinstance(answer, str | int | float) and not isinstance(answer, bool) for answer in answers)
        if value is not None and not (answers and all(fit) and all(str(answer).strip() for answer in answers)):
            raise ValueError(
                f"expected a text, a number or a list of these, none of them empty, got {shortened(value)}"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.messages is None) is (self.prompt is None):
            raise ValueError("expected one of messages and prompt, got " + ("none" if self.prompt is None else "both"))
        for index, message in enumerate(self.messages or ()):
            checked_message(message, index)
        if self.messages and self.messages[-1]["role"] not in ("user", "tool"):
            role = self.messages[-1]["role"]
            raise ValueError(
                f"messages: the conversation ends with role {role!r}, so that there is nothing to reply to"
            )
        return self


def load_tasks(sources: Sequence[FileTasks | ArithmeticTasks | GymTasks]) -> list[Task]:
    """The tasks of all sources, one after the other.

    Raises:
        ValueError: A source cannot be read, or a name of a task is taken; one sentence says where.
    """
    tasks: list[Task] = []
    seen: set[str] = set()
    for source in sources:
        match source:
            case FileTasks():
                found = read_tasks(Path(source.path))
            case ArithmeticTasks():
                found = arithmetic_tasks(source)
            case GymTasks():
                found = gym_tasks(source)
        taken = next((task.task_id for task in found if task.task_id in seen), None)
        if taken is not None:
            raise ValueError(f"task id {taken!r} comes from two sources, of which one is {source!r}")
        seen.update(task.task_id for task in found)
        tasks += found
    return tasks


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a JSONL file, in its order; blank lines are none.

    Raises:
        ValueError: The file is absent or holds no task, a line is no task, or two have one id. Names file and line.
    """
    if "://" in str(path) or not path.is_file():
        raise ValueError(
            f"{path}: {'is not a file' if path.exists() else 'no such file'}; tasks are read from local JSONL"
        )
    tasks, lines = [], {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not raw.strip():
                continue
            task = parse_task(raw, where=f"{path}:{number}")
            first = lines.setdefault(task.task_id, number)
            if first != number:
                raise ValueError(f"{path}:{number}: id {task.task_id!r} is taken by line {first}")
            tasks.append(task)
    if not tasks:
        raise ValueError(f"{path}: no task in it")
    return tasks


def parse_task(raw: bytes, *, where: str) -> Task:
    """One line as a task; ValueError begins with `where`."""
    try:
        record = load_json_line(raw)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    line = build(_Line, record, source=where)
    messages = line.messages or ({"role": "user", "content": line.prompt},)
    judge = {name: value for name in _JUDGE if (value := record.get(name)) is not None}
    return Task(line.id, messages, line.source, judge, line.difficulty)


def arithmetic_tasks(source: ArithmeticTasks) -> list[Task]:
    """Problems of the embedded model's kind; `judge` has the answer.

    Raises:
        ValueError: The held-out split of these levels has fewer problems than asked for.
    """
    split = Split(source.split)
    stream = problems(
        source.seed,
        split=split,
        levels=source.levels,
        word_share=source.word_share,
        operations=source.operations,
    )
    if split is Split.HELD_OUT:
        stream = _distinct(stream, source)
    return [
        Task(
            f"arithmetic/{source.split}/{source.seed}/{index}",
            tuple(problem.messages()[:1]),
            ARITHMETIC_SOURCES[problem.level - LEVELS[0]],
            {"answer": str(problem.answer)},
            (problem.level - LEVELS[0]) / (LEVELS[-1] - LEVELS[0]),
        )
        for index, problem in enumerate(islice(stream, source.count))
    ]


def gym_tasks(source: GymTasks) -> list[Task]:
    """Tasks of a reasoning-gym dataset; `judge` has the answer, and the whole entry for its own scoring.

    Raises:
        ValueError: The package is not installed, or has no such dataset, or the dataset no such settings.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError("tasks of reasoning_gym need it installed: pip install 'qwq_jax[rl]'") from None
    try:
        dataset = reasoning_gym.create_dataset(source.dataset, size=source.count, seed=source.seed, **source.settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"tasks of reasoning_gym, dataset {source.dataset!r}: {error}") from None
    return [_gym_task(source, index, dataset[index]) for index in range(source.count)]


def _gym_task(source: GymTasks, index: int, entry: dict[str, Any]) -> Task:
    answer = {} if entry["answer"] is None else {"answer": str(entry["answer"])}
    return Task(
        f"reasoning_gym/{source.dataset}/{source.seed}/{index}",
        ({"role": "user", "content": entry["question"]},),
        source.dataset,
        {**answer, "entry": entry},
    )


def _distinct(stream: Iterable[Problem], source: ArithmeticTasks) -> Iterator[Problem]:
    """Each expression once."""
    seen: set[str] = set()
    repeats = 0
    for problem in stream:
        if problem.expression not in seen:
            seen.add(problem.expression)
            repeats = 0
            yield problem
        elif (repeats := repeats + 1) > _PATIENCE:
            raise ValueError(
                f"tasks of arithmetic: count {source.count} is more than the held-out problems of levels "
                f"{list(source.levels)}, of which there are {len(seen)} or a few more"
            )
