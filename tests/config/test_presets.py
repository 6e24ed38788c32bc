from pathlib import Path

import pytest

from qwq_jax.config.inference import InferenceConfig
from qwq_jax.config.load import load_toml
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.preference import PreferenceConfig
from qwq_jax.config.rl import RlConfig
from qwq_jax.config.train import SftConfig

DIRECTORY = Path(__file__).parents[2] / "configs" / "models"

# Published sizes, in billions; a wrong width, depth, tie or vocabulary moves at least one of them.
PARAMETERS = {
    "qwq-32b": 32.764,
    "qwq-32b-preview": 32.764,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.544,
    "qwen2.5-3b": 3.086,
    "qwen2.5-7b": 7.616,
    "qwen2.5-14b": 14.770,
    "qwen2.5-32b": 32.764,
    "qwen2.5-72b": 72.706,
    "deepseek-r1-distill-qwen-1.5b": 1.777,
    "deepseek-r1-distill-qwen-7b": 7.616,
    "deepseek-r1-distill-qwen-14b": 14.770,
    "deepseek-r1-distill-qwen-32b": 32.764,
}


QWEN, DISTILL = (151_645, 151_643), (151_643,)
# What the published config.json and generation_config.json say: rope_theta, rms_norm_eps, positions, tied, bos, ends.
PUBLISHED = {
    "qwq-32b": (1e6, 1e-5, 40_960, False, 151_643, QWEN),
    "qwq-32b-preview": (1e6, 1e-5, 32_768, False, 151_643, QWEN),
    "qwen2.5-0.5b": (1e6, 1e-6, 32_768, True, 151_643, QWEN),
    "qwen2.5-1.5b": (1e6, 1e-6, 32_768, True, 151_643, QWEN),
    "qwen2.5-3b": (1e6, 1e-6, 32_768, True, 151_643, QWEN),
    "qwen2.5-7b": (1e6, 1e-6, 32_768, False, 151_643, QWEN),
    "qwen2.5-14b": (1e6, 1e-6, 32_768, False, 151_643, QWEN),
    "qwen2.5-32b": (1e6, 1e-6, 32_768, False, 151_643, QWEN),
    "qwen2.5-72b": (1e6, 1e-6, 32_768, False, 151_643, QWEN),
    "deepseek-r1-distill-qwen-1.5b": (1e4, 1e-6, 131_072, False, 151_646, DISTILL),
    "deepseek-r1-distill-qwen-7b": (1e4, 1e-6, 131_072, False, 151_646, DISTILL),
    "deepseek-r1-distill-qwen-14b": (1e6, 1e-5, 131_072, False, 151_646, DISTILL),
    "deepseek-r1-distill-qwen-32b": (1e6, 1e-5, 131_072, False, 151_646, DISTILL),
}


def test_every_member_has_a_preset():
    # A preset of another family member, such as the tiny model, may stand beside them.
    assert set(PARAMETERS) <= {path.stem for path in DIRECTORY.glob("*.toml")}


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_has_the_published_size(name):
    config = load_toml(DIRECTORY / f"{name}.toml", ModelConfig)
    assert round(config.num_parameters / 1e9, 3) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_says_what_was_published(name):
    c = load_toml(DIRECTORY / f"{name}.toml", ModelConfig)
    found = (c.rope_theta, c.rms_norm_eps, c.max_position_embeddings, c.tie_word_embeddings, c.bos_token_id)
    assert (*found, c.eos_token_ids) == PUBLISHED[name]
    assert c.qkv_bias and c.yarn is None and c.pad_token_id == 151_643
    assert "nsure" not in (DIRECTORY / f"{name}.toml").read_text()


@pytest.mark.parametrize("path", sorted(DIRECTORY.glob("*.toml")), ids=lambda path: path.stem)
def test_preset_survives_huggingface(path):
    config = load_toml(path, ModelConfig)
    assert ModelConfig.from_huggingface(config.to_huggingface("bfloat16")) == config


@pytest.mark.parametrize("path", sorted((DIRECTORY.parent / "sft").glob("*.toml")), ids=lambda path: path.stem)
def test_every_run_loads(path):
    assert isinstance(load_toml(path, SftConfig), SftConfig)


@pytest.mark.parametrize("path", sorted((DIRECTORY.parent / "rl").glob("*.toml")), ids=lambda path: path.stem)
def test_every_run_of_reinforcement_learning_loads(path):
    kind = PreferenceConfig if path.stem.endswith(("dpo", "reward_model")) else RlConfig
    assert isinstance(load_toml(path, kind), kind)


@pytest.mark.parametrize("path", sorted((DIRECTORY.parent / "inference").glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_of_inference_loads(path):
    assert isinstance(load_toml(path, InferenceConfig), InferenceConfig)


def test_every_config_is_of_a_kind_that_is_tested():
    assert {path.name for path in DIRECTORY.parent.iterdir()} <= {"models", "sft", "rl", "inference", "gcp"}
