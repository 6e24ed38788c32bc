"""What moves the policy, and the critic beside it."""

from dataclasses import dataclass

import optax

from qwq_jax.config.rl import RlConfig
from qwq_jax.train.optimizer import make_optimizer, make_schedule


@dataclass(frozen=True)
class Optimizers:
    """What moves the policy and the critic, with the learning rate of the policy by updates done before."""

    policy: optax.GradientTransformation
    critic: optax.GradientTransformation | None
    schedule: optax.Schedule


def make_optimizers(config: RlConfig) -> Optimizers:
    """The optimizers of a run."""
    schedule, critic = make_schedule(config.optimizer, steps=config.updates), config.critic_or_default
    return Optimizers(
        make_optimizer(config.optimizer, schedule=schedule),
        critic and make_optimizer(critic.optimizer, schedule=make_schedule(critic.optimizer, steps=config.updates)),
        schedule,
    )
