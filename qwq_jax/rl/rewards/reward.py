"""What a reward is, and how one is made of its configuration."""

from typing import Protocol

from qwq_jax.config.rewards import (
    ArithmeticConfig,
    CodeConfig,
    CustomConfig,
    ExactConfig,
    FormatConfig,
    InstructionsConfig,
    LengthConfig,
    MathConfig,
    NumericConfig,
    ReasoningGymConfig,
    VerifierConfig,
)
from qwq_jax.rl.rewards.coding import CodeReward
from qwq_jax.rl.rewards.custom import CustomReward
from qwq_jax.rl.rewards.instructions import InstructionsReward
from qwq_jax.rl.rewards.matching import ArithmeticReward, ExactReward, NumericReward, ReasoningGymReward
from qwq_jax.rl.rewards.mathematics import MathReward
from qwq_jax.rl.rewards.shape import FormatReward, LengthReward
from qwq_jax.rl.types import Reply, Score, Task


class Reward(Protocol):
    """Says what a reply is worth. It may hang or end its process: `RewardPool` calls it where that does no harm."""

    def score(self, task: Task, reply: Reply) -> Score:
        """Scores a reply; ValueError where the task lacks what this reward reads (see `check_task`)."""
        ...


def make_reward(config: VerifierConfig) -> Reward:
    """The reward that a configuration describes.

    Raises:
        ValueError: It cannot work here: a package, a function or the sandbox is missing.
    """
    match config:
        case MathConfig():
            return MathReward(config)
        case ExactConfig():
            return ExactReward(config)
        case NumericConfig():
            return NumericReward(config)
        case ArithmeticConfig():
            return ArithmeticReward(config)
        case ReasoningGymConfig():
            return ReasoningGymReward(config)
        case FormatConfig():
            return FormatReward(config)
        case CodeConfig():
            return CodeReward(config)
        case InstructionsConfig():
            return InstructionsReward(config)
        case LengthConfig():
            return LengthReward(config)
        case CustomConfig():
            return CustomReward(config)
