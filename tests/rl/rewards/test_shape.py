r"""Rewards of tags and of length, against the formulas of the papers."""

import math

import pytest

from qwq_jax.config.rewards import FormatConfig, LengthConfig
from qwq_jax.rl.rewards.reward import make_reward
from tests.rl.rewards.replies import reply, task


@pytest.mark.parametrize(
    ("text", "opened", "value"),
    [
        (r"<think>a</think>\boxed{1}", False, 1.0),
        (r"a</think>\boxed{1}", True, 1.0),
        ("a</think>one", True, 0.7),
        (r"\boxed{1}", False, 0.3),
        (r"\boxed{1}", True, 0.0),
        (r"<think>\boxed{1}</think>one", False, 0.7),
        (r"<think>a</think>b</think>\boxed{1}", False, 0.3),
        (r"a<think>b</think>\boxed{1}", True, 0.3),
        (r"<think>a</think><think>b</think>\boxed{1}", False, 0.3),
        (r"<think>a</think>\boxed{}", False, 0.7),
        ("<think>a</think>  \n", False, 0.0),
        ("<think>a", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_format(text, opened, value):
    score = make_reward(FormatConfig(closed=0.7, boxed=0.3)).score(task(), reply(text, opened=opened))
    assert score.value == pytest.approx(value, abs=0) and type(score.value) is float
    assert score.correct is None
    assert bool(score.note) is (value < 1)


def test_overlong_is_that_of_dapo():
    """Equation 13, with the paper's L_max of 20,480 and L_cache of 4,096: counted in tokens."""
    longest, cache = 20_480, 4_096
    reward = make_reward(LengthConfig(soft_tokens=longest - cache, hard_tokens=longest))
    for tokens in (1, 16_384, 16_385, 18_432, 20_479, 20_480, 20_481, 40_000):
        if tokens <= longest - cache:
            expected = 0.0
        elif tokens <= longest:
            expected = ((longest - cache) - tokens) / cache
        else:
            expected = -1.0
        score = reward.score(task(), reply("x" * 7, tokens=tokens))
        assert score.value == pytest.approx(expected, abs=1e-12) and score.correct is None


def test_cosine_is_cosfn():
    """CosFn(t, T, low, high) = low + (high - low) (1 + cos(t pi / T)) / 2, from `shorter` at 0 to `longer` at T."""
    reward = make_reward(LengthConfig(curve="cosine", soft_tokens=0, hard_tokens=100, shorter=2.0, longer=1.0))
    for tokens in range(0, 101, 10):
        expected = 1.0 + 0.5 * (2.0 - 1.0) * (1 + math.cos(tokens * math.pi / 100))
        assert reward.score(task(), reply("", tokens=tokens)).value == pytest.approx(expected, abs=1e-12)
    assert reward.score(task(), reply("", tokens=1000)).value == pytest.approx(1.0)


def test_linear_may_rise():
    reward = make_reward(LengthConfig(curve="linear", soft_tokens=10, hard_tokens=20, shorter=-1.0, longer=0.0))
    values = [reward.score(task(), reply("", tokens=tokens)).value for tokens in (0, 10, 15, 20, 30)]
    assert values == pytest.approx([-1.0, -1.0, -0.5, 0.0, 0.0])
