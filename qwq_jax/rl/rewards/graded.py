"""The sum of rewards of one reply: which count, with what weight, and what comes from a model on the device."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qwq_jax.config.rewards import (
    ArithmeticConfig,
    CodeConfig,
    ExactConfig,
    InstructionsConfig,
    MathConfig,
    NumericConfig,
    ReasoningGymConfig,
    RewardModelConfig,
    VerifierConfig,
    When,
    reward_name,
)
from qwq_jax.rl.rewards.instructions import check_instructions
from qwq_jax.rl.rewards.matching import gym_entry, known_answers, known_integer, known_numbers
from qwq_jax.rl.rewards.programs import read_tests
from qwq_jax.rl.types import Score, Task

AnyConfig = VerifierConfig | RewardModelConfig


@dataclass(frozen=True)
class Graded:
    """What all rewards together say of a reply.

    Example: ``Graded(1.05, True, {"math": Score(1.0, True, "42"), "format": Score(0.5)})`` where format weighs 0.1.

    Attributes:
        value: The sum of weight times value, over the rewards that count.
        correct: Whether all that judge it say that it solves the task; None if none judges that.
        parts: What each said, by its name, before weights; only those that judge the task's source.
        failed: Names of those that had to be killed, or died; their part is a `Score` of 0.
        missing: Names of reward models, whose values are still to come: see `with_values`. `value` is without them.
    """

    value: float
    correct: bool | None
    parts: Mapping[str, Score] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def judges(config: AnyConfig, task: Task) -> bool:
    """Whether a reward judges tasks of this one's source."""
    return not config.sources or task.source in config.sources


def add_up(configs: Sequence[AnyConfig], task: Task, parts: Mapping[str, Score], failed: Sequence[str] = ()) -> Graded:
    """Adds up the parts of a reply; reward models without one are `missing`."""
    judging = [config for config in configs if judges(config, task)]
    missing = tuple(reward_name(config) for config in judging if reward_name(config) not in parts)
    assert all(isinstance(config, RewardModelConfig) for config in judging if reward_name(config) in missing), missing
    verdicts = [score.correct for score in parts.values() if score.correct is not None]
    correct = all(verdicts) if verdicts else None
    counts = {When.ALWAYS: True, When.CORRECT: correct is True, When.WRONG: correct is False}
    value = math.fsum(
        config.weight * parts[reward_name(config)].value
        for config in judging
        if counts[config.when] and reward_name(config) in parts
    )
    return Graded(value, correct, dict(parts), tuple(failed), missing)


def with_values(graded: Graded, configs: Sequence[AnyConfig], task: Task, values: Mapping[str, float]) -> Graded:
    """Adds what reward models said, by their names, and cuts it to their `clip`.

    Raises:
        ValueError: A value is not finite, or belongs to no reward model that judges this task.
    """
    models = {
        reward_name(config): config
        for config in configs
        if isinstance(config, RewardModelConfig) and judges(config, task)
    }
    said = {}
    for name, value in values.items():
        if name not in models or not math.isfinite(value):
            raise ValueError(f"reward model {name} gives {value} for task {task.task_id}, source {task.source!r}")
        said[name] = Score(float(min(max(value, -models[name].clip), models[name].clip)))
    return add_up(configs, task, {**graded.parts, **said}, graded.failed)


def check_task(configs: Sequence[AnyConfig], task: Task) -> None:
    """Checks that a task has what the rewards that judge it read, so that a run learns it at the start.

    Raises:
        ValueError: No reward judges its source, or a field is missing or malformed; the sentence names the task.
    """
    judging = [config for config in configs if judges(config, task)]
    if not judging:
        raise ValueError(f"task {task.task_id}: no reward judges source {task.source!r}")
    for config in judging:
        match config:
            case MathConfig() | ExactConfig():
                known_answers(task)
            case NumericConfig():
                known_numbers(task)
            case ArithmeticConfig():
                known_integer(task)
            case ReasoningGymConfig():
                gym_entry(task)
            case CodeConfig():
                read_tests(task)
            case InstructionsConfig():
                check_instructions(task)
