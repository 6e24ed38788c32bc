"""Presets of objectives, what overrides them, and combinations that make no sense."""

from typing import get_args

import pytest

from qwq_jax.config.load import build
from qwq_jax.config.objective import DpoConfig, ObjectiveConfig, ObjectiveName


@pytest.mark.parametrize("name", get_args(ObjectiveName))
def test_every_preset_is_whole(name):
    config = ObjectiveConfig(name=name)
    assert ObjectiveConfig(**config.model_dump()) == config
    assert (config.clip_low is None) == (config.surrogate != "clip")
    assert (config.kl_coefficient is None) == (config.kl == "none")
    assert config.rollout_correction == "truncate" and config.rollout_cap == 2.0
    assert hash(config) == hash(ObjectiveConfig(name=name))  # static where functions are compiled


def test_presets_are_those_of_the_papers():
    of = lambda name: ObjectiveConfig(name=name)  # noqa: E731
    assert of("grpo").kl_coefficient == 0.04 and of("grpo").kl == "k3_loss"
    assert of("dr_grpo").aggregation == "constant" and of("dr_grpo").scale == "none"
    assert (of("dapo").clip_low, of("dapo").clip_high, of("dapo").kl) == (0.2, 0.28, "none")
    assert of("dapo").uninformative_groups == "refill" and of("dapo").aggregation == "token_mean"
    assert (of("gspo").ratio, of("gspo").clip_low, of("gspo").clip_high) == ("sequence", 3e-4, 4e-4)
    assert of("cispo").cap == 5.0
    assert of("rloo").baseline == "leave_one_out"
    assert of("ppo").uses_critic and of("ppo").gae_lambda == 0.95 and not of("ppo").uses_groups


def test_a_switch_brings_its_settings_and_takes_them_away():
    cispo = ObjectiveConfig(name="dapo", surrogate="cispo")
    assert cispo.clip_high is None and cispo.cap == 5.0
    assert ObjectiveConfig(name="grpo", kl="none").kl_coefficient is None
    assert ObjectiveConfig(name="grpo", kl="k2_loss").kl_coefficient == 0.04
    assert ObjectiveConfig(name="dapo", kl="k2_loss").kl_coefficient == 0.001
    assert ObjectiveConfig(rollout_correction="none").rollout_cap is None
    plus = build(ObjectiveConfig, {"name": "grpo"}, ["clip_high=0.28", "delta=4"], source="file")
    assert (plus.clip_low, plus.clip_high, plus.delta) == (0.2, 0.28, 4.0)


NONSENSE = {
    "kl: k1 in the loss has a gradient of zero on average": {"kl": "k1"},
    "kl: k1_loss in the loss has a gradient of zero on average": {"kl": "k1_loss"},
    "name: expected 'grpo', .* got 'gpro'": {"name": "gpro"},
    "clip_hihg: unknown key, did you mean clip_high": {"clip_hihg": 0.3},
    "cap 3.0 has a meaning where surrogate is cispo, not clip": {"cap": 3.0},
    "clip_high 0.3 has a meaning where surrogate is clip, not cispo": {"name": "cispo", "clip_high": 0.3},
    "kl_coefficient 0.1 has a meaning where kl is k1_reward or k2_loss or k3_loss, not none": {
        "name": "dapo",
        "kl_coefficient": 0.1,
    },
    "rollout_cap 3.0 has a meaning where rollout_correction is truncate": {
        "rollout_cap": 3.0,
        "rollout_correction": "none",
    },
    "gae_lambda 0.9 has a meaning where baseline is critic": {"gae_lambda": 0.9},
    "delta 1.25 must lie above 1 [+] clip_high, which is 1.28": {"name": "dapo", "delta": 1.25},
    "scale group_std needs a baseline of the group, not critic": {"baseline": "critic"},
    "uninformative_groups refill needs a baseline of the group": {"name": "ppo", "uninformative_groups": "refill"},
    "ratio sequence needs one advantage a completion, and baseline critic": {"name": "ppo", "ratio": "sequence"},
    "ratio sequence .* kl k1_reward with baseline none": {"name": "reinforce++", "ratio": "sequence"},
    "rollout_cap: expected greater than or equal to 1": {"rollout_cap": 0.5},
    "clip_low: expected less than or equal to 1": {"clip_low": 1.5},
}


@pytest.mark.parametrize("message", NONSENSE)
def test_nonsense_is_refused_in_a_sentence(message):

    with pytest.raises(ValueError, match=f"^run.toml: .*{message}"):
        build(ObjectiveConfig, NONSENSE[message], source="run.toml")


def test_the_squared_form_of_dpo_has_no_label_smoothing():
    with pytest.raises(ValueError, match="label_smoothing 0.1 has a meaning where loss is sigmoid, not ipo"):
        build(DpoConfig, {"loss": "ipo", "label_smoothing": 0.1}, source="file")
    assert DpoConfig().beta == 0.1
