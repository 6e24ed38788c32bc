"""Settings of an evaluation."""

from pathlib import Path
from typing import Self

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from qwq_jax.config.frozen import Frozen
from qwq_jax.config.load import load_toml
from qwq_jax.config.rewards import RewardConfig, RewardConfigs
from qwq_jax.config.tasks import TaskSource


class EvaluateConfig(Frozen):
    """What is asked how often, and how the replies are judged.

    Attributes:
        tasks: Where the tasks come from.
        samples: Replies to each.
        ks: For pass@k and maj@k; empty takes 1 and `samples`.
        rewards: How replies are judged; empty goes by what the tasks hold, see `jobs.evaluate.usual_rewards`.
        workers: Processes that judge.
        seed: Decides, with the name of a task and the number of the sample, its tokens.
    """

    tasks: tuple[TaskSource, ...] = Field(min_length=1)
    samples: int = Field(default=1, ge=1, le=1000)
    ks: tuple[PositiveInt, ...] = ()
    rewards: tuple[RewardConfig, ...] = ()
    workers: PositiveInt = 2
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        beyond = next((k for k in self.ks if k > self.samples), None)
        if beyond is not None:
            raise ValueError(f"k {beyond} is more than samples {self.samples}")
        return self

    @property
    def measured_ks(self) -> tuple[int, ...]:
        """Each k once, in order."""
        return tuple(sorted(set(self.ks or (1, self.samples))))


class _Recipe(Frozen):
    model_config = ConfigDict(extra="ignore")

    rewards: RewardConfigs


def load_rewards(path: Path) -> tuple[RewardConfig, ...]:
    """The ``[[rewards]]`` of a TOML file, such as the recipe of a run, whose other settings do not matter here.

    Raises:
        ValueError: It cannot be read, or has none; names the file.
    """
    return load_toml(path, _Recipe).rewards


def read_ks(text: str) -> tuple[int, ...]:
    """Numbers as a command line has them.

    >>> read_ks("1,8")
    (1, 8)
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--k {text}: expected numbers from 1 on, such as 1,8")
    return tuple(map(int, parts))
