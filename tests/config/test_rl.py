"""Runs of reinforcement learning: what fits together, and one sentence for each thing that does not."""

from pathlib import Path

import pytest

from qwq_jax.config.load import build, load_toml
from qwq_jax.config.rl import RlConfig

BASE = {
    "model": "m",
    "output_dir": "o",
    "steps": 10,
    "tasks": [{"kind": "arithmetic"}],
    "rewards": [{"kind": "arithmetic"}],
}
EVALUATION = {"tasks": [{"kind": "arithmetic", "split": "held-out"}]}


def made(**changes):
    return build(RlConfig, BASE | changes, source="run.toml")


def test_defaults_fit_together():
    config = made()
    assert config.last_step == 10 and config.updates == 10
    assert config.rollout.samples_per_step == 64 * 16
    assert not config.needs_old_logprobs and config.reward_models == ()
    assert config.critic_or_default is None


RECIPES = [
    path for path in sorted(Path("configs/rl").glob("*.toml")) if not path.stem.endswith(("dpo", "reward_model"))
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_read(path):
    config = load_toml(path, RlConfig)
    first = path.read_text().splitlines()[0]
    assert first.startswith("#") and f"qwq-jax rl {path}" in first, "it opens with the command that runs it"
    assert config.evaluation is not None


def test_updates_count_every_pass():
    config = made(updates_per_step=4, passes_per_step=2, stop_after=3)
    assert config.updates == 80 and config.last_step == 3, "the schedule is planned for all steps"
    assert config.needs_old_logprobs


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"passes_per_step": 2}, True),
        ({"updates_per_step": 2}, True),
        ({"objective": {"name": "rloo"}}, True),  # its reward has the divergence in it
        ({"objective": {"name": "grpo"}}, False),
    ],
)
def test_old_logprobs_are_computed_where_the_policy_moves(changes, needed):
    assert made(**changes).needs_old_logprobs is needed


def test_reward_models_are_those_of_the_devices():
    rewards = [{"kind": "arithmetic"}, {"kind": "model", "checkpoint": "c"}]
    assert [reward.checkpoint for reward in made(rewards=rewards).reward_models] == ["c"]


def test_the_engine_has_room_for_what_is_trained_on_and_what_is_held_out():
    rollout = {"max_prompt_tokens": 100, "max_tokens": 50}
    assert made(rollout=rollout).longest_sequence == 150
    assert made(rollout=rollout, evaluation=EVALUATION | {"max_tokens": 90}).longest_sequence == 190
    assert made(rollout=rollout, evaluation=EVALUATION | {"max_tokens": 9}).longest_sequence == 150


NONSENSE = {
    "rollout.group_size 1: baseline group_mean compares completions of one prompt, so it must be at least 2": {
        "rollout": {"group_size": 1}
    },
    "rollout.prompts_per_step 64 does not divide into updates_per_step 3": {"updates_per_step": 3},
    "row_length 64 is less than rollout.max_prompt_tokens + rollout.max_tokens = 5120": {"row_length": 64},
    "rows_per_micro_batch 8 does not divide into mesh.data 3 x mesh.fsdp 2": {"mesh": {"data": 3, "fsdp": 2}},
    "row_length (rollout.max_prompt_tokens + rollout.max_tokens) 5120 does not divide by 6: mesh.context 3": {
        "mesh": {"context": 3}
    },
    "decode_mesh has 4 devices, mesh 1: it must arrange the same ones": {"decode_mesh": {"tensor": 4}},
    "curriculum.least_difficulty is above curriculum.most_difficulty": {
        "curriculum": {"least_difficulty": 0.9, "most_difficulty": 0.1}
    },
    "engine.max_context 100 is less than the 5120 tokens of a longest prompt with a longest completion": {
        "engine": {"max_context": 100}
    },
    "engine.logprobs is decided by the run": {"engine": {"logprobs": "temperature"}},
    "stop_after 11 lies beyond steps 10": {"stop_after": 11},
    "optimizer.warmup_steps 10 is not below 10 updates": {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 10}},
    "final 'best' needs evaluation": {"final": "best"},
    "critic: objective grpo with baseline group_mean has none": {"critic": {}},
    "critic.optimizer.warmup_steps 20 is not below 10 updates": {
        "objective": {"name": "ppo"},
        "critic": {"optimizer": {"warmup_steps": 20}},
    },
    "rollout.group_size: ": {"rollout": {"group_size": 129}},
    "rollout.temperature: ": {"rollout": {"temperature": 2.5}},
    "rollout.temperature: expected": {"rollout": {"temperature": 0}},
    "evaluation.samples: ": {"evaluation": EVALUATION | {"samples": 129}},
    "evaluation.temperature: ": {"evaluation": EVALUATION | {"temperature": 2.5}},
    "evaluation.tasks: ": {"evaluation": {"tasks": []}},
    "tasks: ": {"tasks": []},
    "rewards: expected at least one reward": {"rewards": []},
    "two rewards are called arithmetic": {"rewards": [{"kind": "arithmetic"}] * 2},
    "rollout.top_p: unknown key": {"rollout": {"top_p": 0.9}},
    "stepz: unknown key, did you mean steps": {"stepz": 3},
    "steps: expected": {"steps": 0},
    "seed: expected": {"seed": -1},
}


@pytest.mark.parametrize("sentence", NONSENSE)
def test_what_does_not_fit_is_one_sentence(sentence):
    with pytest.raises(ValueError) as error:
        made(**NONSENSE[sentence])
    text = str(error.value)
    assert text.startswith("run.toml: ") and sentence in text and "\n" not in text, text


def test_one_completion_a_prompt_is_enough_without_a_group():
    assert made(objective={"name": "reinforce++"}, rollout={"group_size": 1}).rollout.group_size == 1
