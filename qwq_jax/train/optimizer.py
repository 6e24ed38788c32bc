"""AdamW with warm-up and cosine decay, behind a clip by global norm."""

import optax

from qwq_jax.config.train import OptimizerConfig
from qwq_jax.train.state import Params

Schedule = optax.Schedule


def make_schedule(config: OptimizerConfig, *, steps: int) -> Schedule:
    """Learning rate by updates done before: linear from 0 over the warm-up, then half a cosine to its final part."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_lr_ratio,
    )


def decays(params: Params) -> dict[str, bool]:
    """Which parameters weight decay pulls to zero: matrices, not norm scales and not biases."""
    return {name: not name.endswith(("scale", "bias")) for name in params}


def make_optimizer(config: OptimizerConfig, *, schedule: Schedule) -> optax.GradientTransformation:
    """The whole update, from gradient to what is added to the parameters."""
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule),
    )
