"""The losses of reinforcement learning over the packed rows of one micro-batch.

Every loss is a sum over tokens of ``weight * term``: the weights, from `qwq_jax.rl.advantage`, hold the one denominator
of the whole update, so sums of micro-batches are added and divided by nothing more. All is float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.train.batch import TrainBatch
from qwq_jax.train.step import Sums

# Beyond it a ratio of probabilities is held, and has no gradient: e^20 is no estimate, and e^89 no float32.
MAX_LOG_RATIO = 20.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyTokens:
    """What is known of the tokens of a micro-batch before the update; every array is ``[B, T]``.

    All log-probabilities are at the temperature of the rollout.

    Attributes:
        mask: bool, the trained tokens.
        segment_ids: int32, from 1 in each row; 0 is padding. A segment is one completion with its prompt.
        advantages: float32.
        weights: float32, from `token_weights`.
        old_logp: float32, log-probability by the trainer before the update, around which the ratio is clipped; None
            takes the present one, which is the same in the only update of a batch.
        rollout_logp: float32, log-probability by the engine that drew the token; None if that is not corrected for.
        ref_logp: float32, log-probability by the reference; None if there is none.
    """

    mask: jax.Array
    segment_ids: jax.Array
    advantages: jax.Array
    weights: jax.Array
    old_logp: jax.Array | None = None
    rollout_logp: jax.Array | None = None
    ref_logp: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossTerms:
    """A loss over one micro-batch, and what to report of it.

    Attributes:
        value: float32, the sum over tokens of ``weight * term``; the loss is the sum over micro-batches.
        sums: float32 by name, sums over trained tokens (of preferences: pairs), and their number as ``count``.
        peaks: float32 by name, largest values over the same; of several micro-batches the maximum, not the sum.
    """

    value: jax.Array
    sums: Sums
    peaks: Sums


def policy_tokens(batch: TrainBatch) -> PolicyTokens:
    """Reads a micro-batch by the names of its columns: ``advantages``, ``weights``, ``old_logp``, ... as above."""
    columns = batch.columns
    return PolicyTokens(
        mask=batch.loss_mask,
        segment_ids=batch.segment_ids,
        advantages=columns["advantages"],
        weights=columns["weights"],
        old_logp=columns.get("old_logp"),
        rollout_logp=columns.get("rollout_logp"),
        ref_logp=columns.get("ref_logp"),
    )


def policy_loss(config: ObjectiveConfig, *, logp: jax.Array, entropy: jax.Array, tokens: PolicyTokens) -> LossTerms:
    """The loss of the policy, as `ObjectiveConfig` states it.

    Args:
        config: The objective.
        logp: float32 ``[B, T]``, log-probability of each token by the policy, at the temperature of the rollout.
        entropy: float32 ``[B, T]``, of the distribution it comes from.
        tokens: What was known before.

    Returns:
        The loss; ``sums`` as `report` reads them; ``peaks`` of the absolute ``log_ratio`` and ``rollout_gap``.
    """
    mask = tokens.mask
    logp, entropy, weights = _within(mask, logp), _within(mask, entropy), _within(mask, tokens.weights)
    old_logp = jax.lax.stop_gradient(logp) if tokens.old_logp is None else _within(mask, tokens.old_logp)
    log_ratio = logp - old_logp
    ratio = _ratio(config, log_ratio, tokens)
    gain, clipped = _surrogate(config, ratio, logp, _within(mask, tokens.advantages))
    correction, sums, peaks = _rollout_correction(config, old_logp, tokens)
    terms = -correction * gain
    if config.entropy_coefficient:
        terms -= config.entropy_coefficient * entropy
    if tokens.ref_logp is not None:
        ref_logp = _within(mask, tokens.ref_logp)
        if config.kl in ("k2_loss", "k3_loss"):
            assert config.kl_coefficient is not None
            terms += config.kl_coefficient * kl_terms("k2" if config.kl == "k2_loss" else "k3", logp, ref_logp)
        sums["reference_kl"] = kl_terms("k3", logp, ref_logp)
    assert tokens.ref_logp is not None or config.kl in ("none", "k1_reward"), "the loss needs the reference"
    sums |= {"ratio": ratio, "update_kl": kl_terms("k3", old_logp, logp), "entropy": entropy, **clipped}
    peaks["log_ratio"] = jnp.abs(log_ratio)
    return LossTerms(
        value=jnp.sum(_within(mask, weights * terms)), sums=summed(sums, mask), peaks=_largest(peaks, mask)
    )


def kl_terms(estimator: Literal["k2", "k3"], logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
    """An estimate of KL(policy, reference) for each sampled token, never negative.

    The average gradient of k2 over the policy's own samples is that of KL(policy, reference), and that of k3 is the
    gradient of KL(reference, policy). The plain ``logp - ref_logp`` (k1) estimates the value, but its average gradient
    is zero: it belongs in the reward, where it multiplies the gradient of ``logp``.
    """
    log_ratio = logp - ref_logp
    if estimator == "k2":
        return 0.5 * jnp.square(log_ratio)
    # Of policies that hardly differ it is half a square of 1e-4, which exp(...) - 1 would lose in float32.
    return jnp.expm1(_bounded(-log_ratio)) + log_ratio


def value_loss(
    values: jax.Array, *, old_values: jax.Array, returns: jax.Array, weights: jax.Array, mask: jax.Array, clip: float
) -> LossTerms:
    """The loss of PPO's critic: half the squared error, at least that of a value held near the one before the update.

    ``0.5 max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2)``, arrays ``[B, T]``; a `clip` of 0 is no bound.

    Returns:
        The loss; ``sums`` as `report` reads them; no peaks.
    """
    values, old_values, returns = _within(mask, values), _within(mask, old_values), _within(mask, returns)
    error = jnp.square(values - returns)
    worse = error
    if clip:
        worse = jnp.square(old_values + jnp.clip(values - old_values, -clip, clip) - returns)
    sums = {
        "value": values,
        "value_error": error,
        "value_clip": worse > error,
        "return": returns,
        "return_square": jnp.square(returns),
    }
    value = jnp.sum(_within(mask, weights * 0.5 * jnp.maximum(error, worse)))
    return LossTerms(value=value, sums=summed(sums, mask), peaks={})


def report(sums: Mapping[str, float], peaks: Mapping[str, float]) -> dict[str, float]:
    """Means from the sums over all micro-batches of an update, and their peaks as ``max_...``.

    Of the policy: ``ratio``, ``clip_low``, ``clip_high`` and ``clip_delta`` (parts of the tokens that a bound took the
    gradient from), ``update_kl``, ``reference_kl``, ``entropy``, and of the engine against the trainer ``rollout_gap``
    (mean absolute difference of log-probabilities), ``rollout_ratio`` (1 on average, unless sampling cut the support),
    ``rollout_capped`` and ``rollout_sample_size`` (effective, as a part of all). Of the critic: ``value``,
    ``value_error``, ``value_clip`` and ``explained_variance``.
    """
    count = max(float(sums["count"]), 1.0)
    means = {name: float(value) / count for name, value in sums.items() if name != "count"}
    if (square := means.pop("rollout_ratio_square", None)) is not None:
        means["rollout_sample_size"] = means["rollout_ratio"] ** 2 / square if square else 1.0
    if (square := means.pop("return_square", None)) is not None:
        variance = square - means["return"] ** 2
        means["explained_variance"] = 1.0 - means["value_error"] / variance if variance > 0 else 0.0
    return means | {f"max_{name}": float(value) for name, value in peaks.items()}


def _surrogate(
    config: ObjectiveConfig, ratio: jax.Array, logp: jax.Array, advantages: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What each token contributes to the objective, and where a bound took its gradient."""
    none = jnp.zeros(ratio.shape, jnp.bool_)
    low = high = beyond = none
    match config.surrogate:
        case "clip":
            assert config.clip_low is not None and config.clip_high is not None
            least, most = 1.0 - config.clip_low, 1.0 + config.clip_high
            free = ratio
            if config.delta is not None:
                free = jnp.minimum(ratio, config.delta)
                beyond = (advantages < 0) & (ratio > config.delta)
            gain = jnp.minimum(free * advantages, jnp.clip(ratio, least, most) * advantages)
            low, high = (advantages < 0) & (ratio < least), (advantages > 0) & (ratio > most)
        case "cispo":
            assert config.cap is not None
            gain = jax.lax.stop_gradient(jnp.minimum(ratio, config.cap)) * advantages * logp
            high = ratio > config.cap
        case "none":
            gain = ratio * advantages
    return gain, {"clip_low": low, "clip_high": high, "clip_delta": beyond}


def _rollout_correction(
    config: ObjectiveConfig, old_logp: jax.Array, tokens: PolicyTokens
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Truncated importance weights of what the engine drew, with the terms of sums and peaks to report.

    The surrogate takes its samples for those of the trainer before the update. They are the engine's, whose kernels and
    number formats differ; ``min(p_old / p_rollout, cap)`` makes up for that, at a bounded variance.
    """
    truncated = config.rollout_correction == "truncate"
    if tokens.rollout_logp is None:
        assert not truncated, "rollout_correction needs the engine's log-probabilities"
        return jnp.ones_like(old_logp), {}, {}
    gap = old_logp - _within(tokens.mask, tokens.rollout_logp)
    ratio = jax.lax.stop_gradient(_ratio(config, gap, tokens))
    correction, capped = jnp.ones_like(ratio), jnp.zeros(ratio.shape, jnp.bool_)
    if truncated:
        assert config.rollout_cap is not None
        correction, capped = jnp.minimum(ratio, config.rollout_cap), ratio > config.rollout_cap
    sums = {
        "rollout_gap": jnp.abs(gap),
        "rollout_ratio": ratio,
        "rollout_ratio_square": jnp.square(ratio),
        "rollout_capped": capped,
    }
    return correction, sums, {"rollout_gap": jnp.abs(gap)}


def _ratio(config: ObjectiveConfig, log_ratio: jax.Array, tokens: PolicyTokens) -> jax.Array:
    """Ratio of probabilities at the level of the objective, spread over the tokens."""
    if config.ratio == "sequence":
        log_ratio = _segment_means(log_ratio, tokens.mask, tokens.segment_ids)
    return jnp.exp(_bounded(log_ratio))


def _segment_means(values: jax.Array, mask: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Mean over the trained tokens of each segment, at each of its slots; a segment lies within one row."""

    def of_row(values: jax.Array, mask: jax.Array, ids: jax.Array) -> jax.Array:
        segments = ids.shape[0] + 1  # each has a slot at least, and ids begin with 1
        total = jax.ops.segment_sum(jnp.where(mask, values, 0.0), ids, segments)
        count = jax.ops.segment_sum(mask.astype(values.dtype), ids, segments)
        return (total / jnp.maximum(count, 1.0))[ids]

    return jax.vmap(of_row)(values, mask, segment_ids)


def _bounded(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _within(mask: jax.Array, values: jax.Array) -> jax.Array:
    """The values of trained tokens; what stands in other slots, were it NaN, must not reach any sum or gradient."""
    return jnp.where(mask, values, 0.0)


def summed(terms: Mapping[str, jax.Array], mask: jax.Array) -> Sums:
    """Sums of the terms where `mask` holds, and how many those are as ``count``, without gradients."""
    sums = {name: jnp.sum(_within(mask, value), dtype=jnp.float32) for name, value in terms.items()}
    return jax.lax.stop_gradient({"count": jnp.sum(mask, dtype=jnp.float32), **sums})


def _largest(terms: Mapping[str, jax.Array], mask: jax.Array) -> Sums:
    return jax.lax.stop_gradient({name: jnp.max(_within(mask, value)) for name, value in terms.items()})
