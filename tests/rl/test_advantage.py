"""Advantages and weights against formulas written as loops."""

import math
import statistics

import numpy as np
import pytest

from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.rl.advantage import (
    DEVIATION_FLOOR,
    generalised_advantages,
    group_advantages,
    is_informative,
    to_column,
    token_advantages,
    token_weights,
)
from tests.rl import papers


@pytest.fixture
def batch(rng):
    """Rewards and groups of ragged sizes, from 2 to 6, in any order."""
    groups = np.repeat([3, -1, 8, 5], [2, 6, 4, 5])
    order = rng.permutation(len(groups))
    return rng.choice([0.0, 0.25, 0.7, 1.0], len(groups))[order] + 0.01 * np.arange(len(groups)), groups[order]


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["none", "group_std"])
def test_advantages_within_groups(batch, baseline, scale):
    rewards, groups = batch
    ours = group_advantages(rewards, groups, baseline=baseline, scale=scale)
    assert ours.dtype == np.float64
    for i, reward in enumerate(rewards):
        own = [rewards[j] for j in range(len(groups)) if groups[j] == groups[i]]
        others = [rewards[j] for j in range(len(groups)) if groups[j] == groups[i] and j != i]
        expected = reward - statistics.fmean(own if baseline == "group_mean" else others)
        if scale == "group_std":
            expected /= statistics.stdev(own) + DEVIATION_FLOOR
        assert ours[i] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["none", "group_std"])
def test_shuffling_prompts_shuffles_advantages(batch, baseline, scale, rng):
    rewards, groups = batch
    order = rng.permutation(len(rewards))
    straight = group_advantages(rewards, groups, baseline=baseline, scale=scale)
    shuffled = group_advantages(rewards[order], groups[order], baseline=baseline, scale=scale)
    np.testing.assert_array_equal(shuffled, straight[order])  # to the last bit


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce++"])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1 / 3, -1e9])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 49])
def test_equal_rewards_give_exactly_zero(name, reward, size):
    config = ObjectiveConfig(name=name, kl="none")
    ours = token_advantages(config, rewards=[reward] * size, groups=[0] * size, lengths=[2] * size)
    assert not np.concatenate(ours.tokens).any()
    assert not is_informative([reward] * size)


def test_rewards_are_no_integers():
    np.testing.assert_allclose(group_advantages([0.0, 0.7], [1, 1], scale="none"), [-0.35, 0.35])
    np.testing.assert_allclose(group_advantages([0, 1], [1, 1], scale="none"), [-0.5, 0.5])
    assert is_informative([0.0, 0.7]) and is_informative([0.7, 0.7, 0.70001])


def test_rewards_that_hardly_differ_are_not_blown_up():
    assert np.abs(group_advantages([0.7, 0.7 + 1e-12], [1, 1])).max() < 1e-5


def test_a_completion_left_out_is_no_part_of_its_group(batch):
    rewards, groups = batch
    kept = np.arange(len(rewards)) % 3 != 0
    for baseline in ("group_mean", "leave_one_out"):
        ours = group_advantages(rewards, groups, baseline=baseline, kept=kept)
        np.testing.assert_array_equal(ours[kept], group_advantages(rewards[kept], groups[kept], baseline=baseline))
        assert not ours[~kept].any()


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_refused(reward):
    with pytest.raises(ValueError, match=f"reward {reward} of completion 1 is not a finite number"):
        group_advantages([0.0, reward], [0, 0])
    with pytest.raises(ValueError, match="of completion 0"):
        is_informative([reward])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_generalised_advantages_are_the_double_sum(gamma, lam, rng):
    for n in (1, 2, 17):
        rewards, values = rng.standard_normal((2, n))
        ours = generalised_advantages(rewards, values, gamma=gamma, gae_lambda=lam)
        np.testing.assert_allclose(ours, papers.gae(rewards, values, gamma, lam), rtol=1e-12, atol=1e-12)
    # Lambda 1 trusts rewards only: what comes, discounted, less what was expected.
    discounted = [sum(gamma ** (u - t) * rewards[u] for u in range(t, n)) for t in range(n)]
    if lam == 1.0:
        np.testing.assert_allclose(ours + values, discounted, rtol=1e-12)
    if lam == 0.0:
        np.testing.assert_allclose(ours[-1], rewards[-1] - values[-1])


def test_a_completion_that_goes_on_takes_the_value_of_what_follows(rng):
    rewards, values = rng.standard_normal((2, 5))
    whole = papers.gae([*rewards, 0.0], [*values, 2.0], 0.9, 0.8)
    ours = generalised_advantages(rewards, values, gamma=0.9, gae_lambda=0.8, last_value=2.0)
    # The token that follows is worth 2 and then loses it: its own term is taken out of the longer sum.
    ends = [(0.9 * 0.8) ** (5 - t) * -2.0 for t in range(5)]
    np.testing.assert_allclose(ours, np.array(whole[:5]) - ends, rtol=1e-12)


def test_costs_of_the_reference_are_borne_by_the_tokens_that_make_them():
    ratios = [np.array([0.5, -0.25, 1.0]), np.array([2.0])]
    known = {"rewards": [1.0, 0.0], "groups": [0, 0], "lengths": [3, 1], "log_ratios": ratios}
    by_token = token_advantages(ObjectiveConfig(name="reinforce++", scale="none", kl_coefficient=0.1), **known)
    np.testing.assert_allclose(by_token.tokens[0], [1 - 0.125, 1 - 0.075, 1 - 0.1])
    np.testing.assert_allclose(by_token.tokens[1], [-0.2])
    by_completion = token_advantages(ObjectiveConfig(name="rloo", kl_coefficient=0.1), **known)
    np.testing.assert_allclose(by_completion.tokens[0], [(1 - 0.125) - (-0.2)] * 3)
    assert by_token.returns is None


def test_returns_are_what_the_critic_should_have_said(rng):
    values = [rng.standard_normal(n).astype(np.float32) for n in (3, 5)]
    known = {"rewards": [1.0, -1.0], "groups": [0, 1], "lengths": [3, 5], "values": values}
    ours = token_advantages(ObjectiveConfig(name="ppo", kl="none", gae_lambda=1.0, gamma=0.5), **known)
    assert ours.returns is not None
    np.testing.assert_allclose(ours.returns[0], [0.25, 0.5, 1.0])
    np.testing.assert_allclose(ours.returns[1], [-0.0625, -0.125, -0.25, -0.5, -1.0])
    flat = np.concatenate(ours.tokens)
    assert abs(flat.mean()) < 1e-12 and flat.std() == pytest.approx(1.0, abs=1e-5)


def mean(values):
    return sum(values) / len(values)


AGGREGATIONS = {
    "sequence_mean": lambda terms: mean([mean(own) for own in terms]),
    "token_mean": lambda terms: mean([x for own in terms for x in own]),
    "sequence_sum": lambda terms: mean([sum(own) for own in terms]),
    "constant": lambda terms: mean([sum(own) for own in terms]) / 40,
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_weights_make_a_sum_of_each_mean(name, rng):
    lengths = [1, 7, 3, 12, 5]
    terms = [rng.standard_normal(n) for n in lengths]
    for kept in (np.ones(5, np.bool_), np.array([True, False, True, True, False])):
        weights = token_weights(name, lengths, kept=kept, longest=40)
        total = sum(weight * own.sum() for weight, own in zip(weights, terms, strict=True))
        assert total == pytest.approx(AGGREGATIONS[name]([terms[i] for i in np.flatnonzero(kept)]), rel=1e-12)
        assert not weights[~kept].any()
    whole = token_weights(name, lengths, longest=40)
    np.testing.assert_array_equal(token_weights(name, lengths, kept=np.ones(5, np.bool_), longest=40), whole)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_nothing_to_train_on_weighs_nothing(name):
    nobody = np.zeros(2, np.bool_)
    assert token_weights(name, [3, 4], kept=nobody, longest=8).tolist() == [0.0, 0.0]
    assert token_weights(name, [], longest=8).tolist() == []
    # A completion without a token is not counted among the others.
    assert token_weights(name, [0, 4], longest=8).tolist() == [0.0, *token_weights(name, [4], longest=8)]
    ours = token_advantages(
        ObjectiveConfig(name="reinforce++", kl="none"), rewards=[1.0, 0.0], groups=[0, 0], lengths=[1, 2], kept=nobody
    )
    assert not np.concatenate(ours.tokens).any()


def test_values_land_on_the_tokens_they_belong_to():
    trained = np.array([False, True, False, True, True])
    column = to_column(np.array([1.5, 2.5, 3.5]), trained)
    assert column.dtype == np.float32
    assert column.tolist() == [0.0, 1.5, 0.0, 2.5, 3.5]
    assert to_column(0.25, trained).tolist() == [0.0, 0.25, 0.0, 0.25, 0.25]
