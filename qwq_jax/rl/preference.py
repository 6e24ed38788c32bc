"""Losses on pairs of completions of which one was preferred: DPO for a policy, Bradley-Terry for a reward model.

In packed rows the two completions of a pair are neighbours in one row, each with the prompt before it: segments 1 and 2
are the chosen and the rejected one of the first pair of the row, 3 and 4 those of the second.

Losses are sums over pairs; divide by `count_pairs` of the whole update.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qwq_jax.config.objective import DpoConfig
from qwq_jax.rl.loss import LossTerms, summed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairScores:
    """One number for each completion of each pair; arrays of one shape, of a packed micro-batch ``[B, P]``.

    Attributes:
        chosen: float32, of the preferred completion: its summed log-probability, or its reward.
        rejected: float32, of the other.
        present: bool, where there is a pair.
    """

    chosen: jax.Array
    rejected: jax.Array
    present: jax.Array


def pair_totals(values: jax.Array, *, mask: jax.Array, segment_ids: jax.Array) -> PairScores:
    """Sums `values` over the slots of each completion where `mask` holds; ``[B, T]`` to ``[B, T // 2]``."""
    pairs = values.shape[1] // 2

    def of_row(values: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, ids, ids.shape[0] + 1)[1 : 2 * pairs + 1]

    totals = jax.vmap(of_row)(jnp.where(mask, values, 0.0), segment_ids)
    present = 2 * jnp.arange(1, pairs + 1) <= jnp.max(segment_ids, axis=1, keepdims=True)
    return PairScores(chosen=totals[:, 0::2], rejected=totals[:, 1::2], present=present)


def pair_ends(values: jax.Array, *, segment_ids: jax.Array) -> PairScores:
    """`values` at the last slot of each completion, which has read all its tokens but the last one."""
    following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return pair_totals(values, mask=segment_ids != following, segment_ids=segment_ids)


def count_pairs(segment_ids: jax.Array) -> jax.Array:
    """How many pairs there are in rows ``[..., T]``, over all micro-batches and devices: float32, at least 1."""
    return jnp.maximum(jnp.sum(jnp.max(segment_ids, axis=-1) // 2), 1).astype(jnp.float32)


def dpo_loss(config: DpoConfig, *, policy: PairScores, reference: PairScores) -> LossTerms:
    """Direct preference optimisation from summed log-probabilities, at temperature 1, of policy and reference.

    With ``h`` the log-ratio to the reference of the chosen minus that of the rejected completion: ``-log sigmoid(beta
    h)``, of which label smoothing takes a part the other way round (arXiv 2305.18290, eq. 7); ``ipo`` is ``(h - 1 / (2
    beta))^2`` (arXiv 2310.12036, eq. 17).

    Returns:
        The loss; ``sums`` of ``accuracy`` (does the policy prefer the chosen one more than the reference does),
        ``margin`` (``beta h``) and the implied rewards ``chosen_reward`` and ``rejected_reward``; no peaks.
    """
    present = policy.present
    chosen = jnp.where(present, policy.chosen - reference.chosen, 0.0)
    rejected = jnp.where(present, policy.rejected - reference.rejected, 0.0)
    log_ratio = chosen - rejected
    if config.loss == "ipo":
        terms = jnp.square(log_ratio - 1.0 / (2.0 * config.beta))
    else:
        margin = config.beta * log_ratio
        terms = -(1.0 - config.label_smoothing) * jax.nn.log_sigmoid(margin)
        terms -= config.label_smoothing * jax.nn.log_sigmoid(-margin)
    sums = {
        "accuracy": log_ratio > 0,
        "margin": config.beta * log_ratio,
        "chosen_reward": config.beta * chosen,
        "rejected_reward": config.beta * rejected,
    }
    return LossTerms(value=jnp.sum(jnp.where(present, terms, 0.0)), sums=summed(sums, present), peaks={})


def bradley_terry_loss(scores: PairScores, *, margin: jax.Array | float = 0.0, centring: float = 0.0) -> LossTerms:
    """The loss of a reward model: ``-log sigmoid(r_chosen - r_rejected - margin)``.

    Args:
        scores: Rewards.
        margin: By how much the chosen one is to be better, one for all or as `scores` (Llama 2, arXiv 2307.09288,
            section 3.2.2).
        centring: Weight of ``(r_chosen + r_rejected)^2``, which keeps rewards around zero (arXiv 2312.09244, section
            2); preferences alone leave their level open.

    Returns:
        The loss; ``sums`` of ``accuracy``, ``margin``, ``chosen_reward`` and ``rejected_reward``; no peaks.
    """
    present = scores.present
    chosen, rejected = jnp.where(present, scores.chosen, 0.0), jnp.where(present, scores.rejected, 0.0)
    better = chosen - rejected
    terms = -jax.nn.log_sigmoid(better - margin) + centring * jnp.square(chosen + rejected)
    sums = {"accuracy": better > 0, "margin": better, "chosen_reward": chosen, "rejected_reward": rejected}
    return LossTerms(value=jnp.sum(jnp.where(present, terms, 0.0)), sums=summed(sums, present), peaks={})
