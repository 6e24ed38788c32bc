"""Sums of rewards, and tasks that lack what a reward reads."""

import pytest

from qwq_jax.config.frozen import Frozen
from qwq_jax.config.load import build
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
    RewardConfigs,
    RewardModelConfig,
)
from qwq_jax.rl.rewards.graded import Graded, add_up, check_task, with_values
from qwq_jax.rl.types import Score
from tests.rl.rewards.replies import task

PARTS = {"math": Score(1.0, True), "format": Score(0.5), "exact": Score(0.25, True)}
THREE = (MathConfig(), FormatConfig(weight=0.1), ExactConfig(weight=-2.0))


class Rewards(Frozen):
    rewards: RewardConfigs


def test_a_sum_weighs():
    graded = add_up(THREE, task(), PARTS)
    assert graded == Graded(pytest.approx(1.0 + 0.05 - 0.5), True, PARTS)


def test_small_rewards_survive():
    """0.7 and 0.0 of one group stay what they are: nothing is cut to an integer (tunix)."""
    values = [add_up((ExactConfig(),), task(), {"exact": Score(value)}).value for value in (0.7, 0.0)]
    assert values == [0.7, 0.0] and all(type(value) is float for value in values)


@pytest.mark.parametrize(
    ("verdicts", "correct"),
    [
        ([True, None, True], True),
        ([True, None, False], False),
        ([None, None, None], None),
        ([False, None, None], False),
    ],
)
def test_all_that_judge_must_agree(verdicts, correct):
    parts = {name: Score(0.0, verdict) for name, verdict in zip(PARTS, verdicts, strict=True)}
    assert add_up(THREE, task(), parts).correct is correct


@pytest.mark.parametrize(("correct", "value"), [(True, 1.0), (False, 10.0), (None, 0.0)])
def test_some_count_only_where_it_is_right_or_wrong(correct, value):
    configs = (
        MathConfig(weight=0.0),
        FormatConfig(name="a", when="correct"),
        FormatConfig(name="b", weight=10.0, when="wrong"),
    )
    parts = {"math": Score(1.0, correct), "a": Score(1.0), "b": Score(1.0)}
    assert add_up(configs, task(), parts).value == value


def test_sources():
    configs = (MathConfig(sources=("gsm8k", "math")), CodeConfig(sources=("mbpp",)), FormatConfig())
    graded = add_up(configs, task("gsm8k"), {"math": Score(1.0, True), "format": Score(1.0)})
    assert graded.value == 2.0 and set(graded.parts) == {"math", "format"}


def test_reward_models_come_from_outside():
    configs = (MathConfig(), RewardModelConfig(name="judge", weight=0.5, checkpoint="x", clip=3.0))
    graded = add_up(configs, task(), {"math": Score(1.0, True)}, failed=["math"])
    assert (graded.value, graded.missing) == (1.0, ("judge",))
    full = with_values(graded, configs, task(), {"judge": -2.0})
    assert (full.value, full.missing, full.correct, full.failed) == (0.0, (), True, ("math",))
    assert full.parts["judge"] == Score(-2.0)
    assert with_values(graded, configs, task(), {"judge": 100.0}).value == 1.0 + 0.5 * 3.0
    for values in ({"judge": float("nan")}, {"other": 1.0}):
        with pytest.raises(ValueError, match="reward model"):
            with_values(graded, configs, task(), values)


@pytest.mark.parametrize(
    ("config", "judge", "message"),
    [
        (MathConfig(), {}, "judge.answer"),
        (ExactConfig(), {}, "judge.answer"),
        (NumericConfig(), {"answer": "x"}, "judge.answer"),
        (ArithmeticConfig(), {"answer": "1.5"}, "judge.answer"),
        (ReasoningGymConfig(), {}, "judge.entry"),
        (CodeConfig(), {}, "judge.tests"),
        (InstructionsConfig(), {}, "judge.instructions"),
    ],
)
def test_a_task_that_lacks_something_is_refused(config, judge, message):
    with pytest.raises(ValueError, match=rf"task t-1: {message}: "):
        check_task((FormatConfig(), config), task(**judge))
    check_task((FormatConfig(), config.model_copy(update={"sources": ("other",)})), task(**judge))


def test_a_task_that_nothing_judges_is_refused():
    with pytest.raises(ValueError, match="task t-1: no reward judges source 'x'"):
        check_task((FormatConfig(sources=("y",)),), task("x"))


def test_these_need_nothing():
    check_task(
        (
            FormatConfig(),
            LengthConfig(soft_tokens=1, hard_tokens=2),
            CustomConfig(function="a.b:c"),
            RewardModelConfig(checkpoint="x"),
        ),
        task(),
    )


def test_from_toml():
    tables = [
        {"kind": "math", "sources": ["gsm8k"], "when": "always"},
        {"kind": "code", "sandbox": "none-i-trust-this-code"},
        {"kind": "length", "curve": "cosine", "soft_tokens": 0, "hard_tokens": 100, "when": "correct"},
        {"kind": "model", "checkpoint": "gs://x"},
    ]
    made = build(Rewards, {"rewards": tables}, source="run.toml")
    assert made.rewards[0] == MathConfig(sources=("gsm8k",))
    assert Rewards.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "rewards: expected at least one reward"),
        ([{"kind": "maths"}], "'maths'"),
        ([{"kind": "math"}, {"kind": "math"}], "rewards: two rewards are called math: give one of them another name"),
        ([{"kind": "math"}, {"kind": "exact", "name": "math"}], "two rewards are called math"),
        ([{"kind": "math", "weigth": 2.0}], "rewards.0.math.weigth: unknown key"),
        ([{"kind": "math", "weight": float("nan")}], "rewards.0.math.weight"),
        ([{"kind": "code", "sandbox": "none"}], "expected 'bubblewrap' or 'none-i-trust-this-code', got 'none'"),
        ([{"kind": "custom", "function": "mine.reward"}], "expected module:function, got 'mine.reward'"),
        ([{"kind": "length", "soft_tokens": 5, "hard_tokens": 5}], "soft_tokens 5 is not less than hard_tokens 5"),
        ([{"kind": "length", "soft_tokens": 5, "hard_tokens": 6, "longer": -2.0}], "curve overlong goes from 0 to -1"),
    ],
)
def test_refused_configurations(tables, message):
    with pytest.raises(ValueError, match="run.toml") as error:
        build(Rewards, {"rewards": tables}, source="run.toml")
    assert message in str(error.value)
