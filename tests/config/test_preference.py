"""Which kind of preference training a file asks for, and that those of the repository load."""

from pathlib import Path

import pytest

from qwq_jax.config.load import build, load_toml
from qwq_jax.config.preference import PreferenceConfig

RECIPES = Path(__file__).parents[2] / "configs" / "rl"
RUN = {"model": "m", "train_files": ["t.jsonl"], "output_dir": "out", "steps": 10}


@pytest.mark.parametrize(("name", "table"), [("tiny_dpo", "dpo"), ("tiny_reward_model", "reward_model")])
def test_recipes_load_as_what_they_are(name, table):
    config = load_toml(RECIPES / f"{name}.toml", PreferenceConfig)
    assert {"dpo": config.dpo, "reward_model": config.reward_model}[table] is not None


def test_an_empty_table_is_enough():
    config = build(PreferenceConfig, RUN | {"dpo": {}}, source="x")
    assert config.dpo is not None and config.dpo.beta == 0.1 and config.last_step == 10
    judge = build(PreferenceConfig, RUN | {"reward_model": {}}, source="x").reward_model
    assert judge is not None and not judge.thoughts


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "expected one of the tables dpo and reward_model, got none"),
        ({"dpo": {}, "reward_model": {}}, "expected one of the tables dpo and reward_model, got both"),
        ({"dpo": {"label_smoothing": 0.7}}, "dpo.label_smoothing: expected less than 0.5"),
        ({"dpo": {}, "final": "best"}, "final 'best' needs eval_files"),
        ({"dpo": {}, "stop_after": 11}, "stop_after 11 lies beyond steps 10"),
        ({"dpo": {}, "optimizer": {"warmup_steps": 10}}, "optimizer.warmup_steps 10 is not below steps 10"),
        ({"reward_model": {"center": 1.0}}, "reward_model.center: unknown key"),
        ({"reward_model": {}, "merge_adapters": False}, "a reward model is stored as a whole"),
        ({"dpo": {}, "model": "a.toml"}, "is a preset without weights"),
        ({"dpo": {}, "tokenizer": "gs://b/t"}, "tokenizer: gs://b/t is not local"),
        (
            {"dpo": {}, "mesh": {"context": 2}},
            "mesh.context 2: pairs are told by their order in a row; use mesh.fsdp",
        ),
        (
            {"dpo": {}, "rows_per_step": 8, "mesh": {"data": 16}},
            "rows_per_step 8 does not divide into accumulation 1 x",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(given, sentence):
    with pytest.raises(ValueError) as raised:
        build(PreferenceConfig, RUN | given, source="run.toml")
    assert str(raised.value).startswith("run.toml: ") and sentence in str(raised.value)
