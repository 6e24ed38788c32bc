"""Rewards to advantages, and what each trained token weighs in the loss. Plain numpy in float64, no JAX.

Everything that looks across completions happens here, once, over all of an update: baselines, deviations and
denominators. What is left for the device is a sum over tokens of ``weight * term``, which is the same however tokens
are spread over rows, micro-batches and devices.

A completion is described by its trained tokens in order, whatever stands between them (turns of a user, results of a
tool), as float64 ``[n_i]``; `to_column` puts such values in their places in the sequence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwq_jax.config.objective import Aggregation, Baseline, ObjectiveConfig, Scale

# Added to a deviation before dividing by it, so that rewards which differ by a rounding error are not blown up.
DEVIATION_FLOOR = 1e-6


@dataclass(frozen=True)
class Advantages:
    """Float64 ``[n_i]`` for each completion ``i``.

    Attributes:
        tokens: The advantage of each trained token; zeros in a completion that is left out.
        returns: What the critic should have said at each, advantages before scaling plus the old values; None without
            a critic.
    """

    tokens: tuple[np.ndarray, ...]
    returns: tuple[np.ndarray, ...] | None = None


def is_informative(rewards: Sequence[float] | np.ndarray) -> bool:
    """Whether a group of rewards says anything: advantages of equal rewards are exactly 0 (DAPO, dynamic sampling).

    Example:
        >>> is_informative([0.0, 0.7]), is_informative([0.7, 0.7]), is_informative([])
        (True, False, False)
    """
    return len(set(_as_rewards(rewards).tolist())) > 1


def group_advantages(
    rewards: Sequence[float] | np.ndarray,
    groups: Sequence[int] | np.ndarray,
    *,
    baseline: Baseline = "group_mean",
    scale: Scale = "group_std",
    kept: np.ndarray | None = None,
) -> np.ndarray:
    """Compares each reward with the others of its group.

    ``group_mean`` subtracts the mean of the group (GRPO, Dr.GRPO), ``leave_one_out`` that of its other members (RLOO).
    The scale ``group_std`` divides by the sample deviation, as TRL and verl read GRPO's ``std``.

    Example:
        >>> group_advantages([1.0, 0.0, 0.0, 0.7], [7, 7, 7, 8], scale="none", baseline="leave_one_out").tolist()
        [1.0, -0.5, -0.5, 0.0]

    Args:
        rewards: ``[N]``.
        groups: ``[N]``, equal for completions of one prompt; members need not be neighbours.
        baseline: As in `ObjectiveConfig`.
        scale: As in `ObjectiveConfig`.
        kept: bool ``[N]``; the others get 0 and are no part of their group.

    Returns:
        Float64 ``[N]``, exactly 0 where the rewards of a group are equal, or nobody is there to compare with.

    Raises:
        ValueError: A reward is not a finite number.
    """
    values = _as_rewards(rewards)
    kept = np.ones(len(values), np.bool_) if kept is None else kept
    members: dict[int, list[int]] = {}
    for index, group in enumerate(np.asarray(groups).tolist()):
        if kept[index]:
            members.setdefault(group, []).append(index)
    advantages = np.zeros(len(values))
    for indices in members.values():
        own = values[indices]
        if is_informative(own):
            advantages[indices] = _against_group(own, baseline, scale)
    return advantages


def _against_group(own: np.ndarray, baseline: Baseline, scale: Scale) -> np.ndarray:
    # fsum rounds once, so the order of the members cannot matter.
    count = len(own)
    mean = math.fsum(own) / count
    centred = own - mean
    deviation = math.sqrt(math.fsum(centred**2) / (count - 1))
    if baseline == "leave_one_out":
        centred = np.array([r - math.fsum([*own, -r]) / (count - 1) for r in own])
    return centred / (deviation + DEVIATION_FLOOR) if scale == "group_std" else centred


def generalised_advantages(
    rewards: np.ndarray, values: np.ndarray, *, gamma: float, gae_lambda: float, last_value: float = 0.0
) -> np.ndarray:
    """Generalised advantage estimation over one completion (arXiv 1506.02438, eq. 16).

    ``A_t = sum over l of (gamma gae_lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l})``.

    Args:
        rewards: ``[n]``, of each token.
        values: ``[n]``, the critic's estimate before each token.
        gamma: Discount.
        gae_lambda: Trust in rewards over the critic.
        last_value: Value after the last token; 0 at an end.

    Returns:
        Float64 ``[n]``.
    """
    advantages = np.zeros(len(rewards))
    following, after = 0.0, last_value
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * after - values[t] + gamma * gae_lambda * following
        after = values[t]
        advantages[t] = following
    return advantages


def token_advantages(
    config: ObjectiveConfig,
    *,
    rewards: Sequence[float] | np.ndarray,
    groups: Sequence[int] | np.ndarray,
    lengths: Sequence[int],
    log_ratios: Sequence[np.ndarray] | None = None,
    values: Sequence[np.ndarray] | None = None,
    kept: np.ndarray | None = None,
) -> Advantages:
    """The advantage of every trained token of an update.

    With k1 in the reward, each token costs ``kl_coefficient log_ratio``. Where one advantage serves a whole completion,
    its costs are summed (RLOO, eq. 1 of arXiv 2402.14740); with a critic they are rewards of their own; with neither
    group nor critic, a token bears the costs of itself and what follows (REINFORCE++, eq. 8 of arXiv 2501.03262).

    Args:
        config: The objective.
        rewards: ``[N]``, one for each completion.
        groups: ``[N]``, equal for completions of one prompt.
        lengths: ``[N]``, trained tokens.
        log_ratios: ``[n_i]`` each, log-probability before the update minus that of the reference; for k1_reward.
        values: ``[n_i]`` each, the critic's before the update.
        kept: bool ``[N]``, the completions that count; all, if None.

    Raises:
        ValueError: A reward is not a finite number.
    """
    totals = _as_rewards(rewards)
    assert len(totals) == len(groups) == len(lengths), (len(totals), len(groups), len(lengths))
    kept = np.ones(len(totals), np.bool_) if kept is None else kept
    costs = [np.zeros(n) for n in lengths]
    if config.kl == "k1_reward":
        assert log_ratios is not None and config.kl_coefficient is not None
        costs = [config.kl_coefficient * np.asarray(ratios, np.float64) for ratios in log_ratios]
    assert [len(cost) for cost in costs] == list(lengths)
    returns = None
    if config.uses_critic:
        assert values is not None
        tokens, returns = _against_critic(config, totals, costs, values)
    elif config.uses_groups:
        totals = totals - np.array([math.fsum(cost) for cost in costs])
        by_completion = group_advantages(totals, groups, baseline=config.baseline, scale=config.scale, kept=kept)
        tokens = [np.full(n, advantage) for n, advantage in zip(lengths, by_completion, strict=True)]
    else:
        tokens = [total - np.cumsum(cost[::-1])[::-1] for total, cost in zip(totals, costs, strict=True)]
    if config.scale == "batch":
        tokens = _standardised(tokens, kept)
    tokens = tuple(own if keep else np.zeros(len(own)) for own, keep in zip(tokens, kept, strict=True))
    return Advantages(tokens, returns)


def _against_critic(
    config: ObjectiveConfig, totals: np.ndarray, costs: Sequence[np.ndarray], values: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], tuple[np.ndarray, ...]]:
    """Advantages and returns, of rewards that come with the last token and costs that come with each."""
    assert config.gamma is not None and config.gae_lambda is not None
    tokens, returns = [], []
    for total, cost, own in zip(totals, costs, values, strict=True):
        assert len(cost) == len(own)
        own = np.asarray(own, np.float64)
        steps = -cost
        steps[-1:] += total
        advantages = generalised_advantages(steps, own, gamma=config.gamma, gae_lambda=config.gae_lambda)
        tokens.append(advantages)
        returns.append(own + advantages)
    return tokens, tuple(returns)


def _standardised(tokens: Sequence[np.ndarray], kept: np.ndarray) -> list[np.ndarray]:
    """Takes the mean over all tokens that count and divides by their deviation."""
    counted = np.concatenate([own for own, keep in zip(tokens, kept, strict=True) if keep] or [np.zeros(0)])
    if counted.size == 0 or counted.min() == counted.max():
        return [np.zeros(len(own)) for own in tokens]
    mean, deviation = counted.mean(), counted.std()
    return [(own - mean) / (deviation + DEVIATION_FLOOR) for own in tokens]


def token_weights(
    aggregation: Aggregation, lengths: Sequence[int], *, kept: np.ndarray | None = None, longest: int | None = None
) -> np.ndarray:
    """What one token of each completion weighs, so that the loss is the sum over tokens of ``weight * term``.

    With ``N`` completions that count, of ``n_i`` trained tokens: ``1 / (N n_i)`` for sequence_mean (GRPO); ``1 / sum of
    n_i`` for token_mean (DAPO as its authors run it: over the update, where the paper has each group); ``1 / N`` for
    sequence_sum (REINFORCE); ``1 / (N longest)`` for constant (Dr.GRPO). A completion that does not count is out of
    numerator and denominator alike.

    Example:
        >>> token_weights("sequence_mean", [1, 4, 9], kept=np.array([True, True, False])).tolist()
        [0.5, 0.125, 0.0]

    Args:
        aggregation: As in `ObjectiveConfig`.
        lengths: ``[N]``, trained tokens.
        kept: bool ``[N]``, the completions that count; all, if None.
        longest: Most tokens a completion may have, needed for constant.

    Returns:
        Float64 ``[N]``.
    """
    counts = np.asarray(lengths, np.float64)
    counted = counts > 0 if kept is None else kept & (counts > 0)
    number = max(int(counted.sum()), 1)
    match aggregation:
        case "sequence_mean":
            weights = 1.0 / (number * np.maximum(counts, 1.0))
        case "token_mean":
            weights = np.full(len(counts), 1.0 / max(counts[counted].sum(), 1.0))
        case "sequence_sum":
            weights = np.full(len(counts), 1.0 / number)
        case "constant":
            assert longest is not None and longest > 0
            weights = np.full(len(counts), 1.0 / (number * longest))
    return np.where(counted, weights, 0.0)


def to_column(values: np.ndarray | float, trained: np.ndarray) -> np.ndarray:
    """Float32 ``[n]`` for `Segment.columns`: `values` in order at the tokens that are `trained`, and 0 elsewhere.

    Example:
        >>> to_column(np.array([0.5, 0.7]), np.array([False, True, False, True])).tolist()
        [0.0, 0.5, 0.0, 0.699999988079071]
    """
    column = np.zeros(len(trained), np.float32)
    column[trained] = values
    return column


def _as_rewards(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(rewards, np.float64)
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"reward {values[index]} of completion {index} is not a finite number")
    return values
