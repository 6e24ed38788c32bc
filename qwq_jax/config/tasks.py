"""Where tasks come from: a JSONL file, or a generator that needs no file."""

import re
import tomllib
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from qwq_jax.config.frozen import Frozen
from qwq_jax.config.load import build


class FileTasks(Frozen):
    """Tasks of a JSONL file; see `rl.tasks.read_tasks`.

    Attributes:
        kind: What this table is.
        path: The file, local.
    """

    kind: Literal["file"] = "file"
    path: str


class ArithmeticTasks(Frozen):
    """Arithmetic as the embedded model learnt it (`rl.rewards.arithmetic`); each level is a source of its own.

    Attributes:
        kind: What this table is.
        split: Held-out problems share no expression with those to train on, and repeat none among themselves.
        levels: Some of 1 to 4.
        count: Number of problems.
        seed: Another one, other problems.
        word_share: Part of them that are told as a story.
        operations: Those that need others are left out; multiplication comes in stories only.
    """

    kind: Literal["arithmetic"] = "arithmetic"
    split: Literal["train", "held-out"] = "train"
    levels: tuple[Annotated[int, Field(ge=1, le=4)], ...] = Field(default=(1, 2, 3), min_length=1)
    count: PositiveInt = 256
    seed: NonNegativeInt = 0
    word_share: float = Field(default=0.5, ge=0.0, le=1.0)
    operations: tuple[Literal["+", "-", "*"], ...] = Field(default=("+", "-", "*"), min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if set(self.operations) == {"*"} and self.word_share == 0:
            raise ValueError("operations: multiplication comes in stories only, so word_share must be above 0")
        return self


class GymTasks(Frozen):
    """Tasks of reasoning-gym, which also judges them.

    Attributes:
        kind: What this table is.
        dataset: Its name there, such as ``leg_counting``.
        count: Number of tasks.
        seed: Another one, other tasks.
        settings: What else the dataset takes.
    """

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str
    count: PositiveInt = 256
    seed: NonNegativeInt = 0
    settings: dict[str, Any] = {}


TaskSource = Annotated[FileTasks | ArithmeticTasks | GymTasks, Field(discriminator="kind")]
"""One table of ``[[tasks]]``."""


def parse_source(text: str) -> FileTasks | ArithmeticTasks | GymTasks:
    """A source as a command line names it: a path, or a generator with settings.

    Of reasoning-gym, what `GymTasks` has no field for is a setting of the dataset.

    Example:
        >>> parse_source("arithmetic:split=held-out,levels=[1,2],count=64").count
        64
        >>> parse_source("data/held_out.jsonl").path
        'data/held_out.jsonl'

    Raises:
        ValueError: A setting is unknown or does not fit.
    """
    name, _, settings = text.partition(":")
    if name not in ("arithmetic", "reasoning_gym"):
        return FileTasks(path=text)
    values = {}
    for setting in filter(None, re.split(r",(?=\w+=)", settings)):
        key, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"{text}: expected {name}:KEY=VALUE,KEY=VALUE, got {setting!r}")
        values[key] = _value(value)
    if name == "arithmetic":
        return build(ArithmeticTasks, values, source=text)
    own = {key: values.pop(key) for key in GymTasks.model_fields if key in values}
    return build(GymTasks, {**own, "settings": {**own.get("settings", {}), **values}}, source=text)


def _value(text: str) -> Any:
    """A TOML value, or the text itself, so that shells need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
