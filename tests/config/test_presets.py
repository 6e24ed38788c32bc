from pathlib import Path

import pytest

from qwq_jax.config.load import load_toml
from qwq_jax.config.model import ModelConfig
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


def test_every_member_has_a_preset():
    # A preset of another family member, such as the tiny model, may stand beside them.
    assert set(PARAMETERS) <= {path.stem for path in DIRECTORY.glob("*.toml")}


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_has_the_published_size(name):
    config = load_toml(DIRECTORY / f"{name}.toml", ModelConfig)
    assert round(config.num_parameters / 1e9, 3) == PARAMETERS[name]


@pytest.mark.parametrize("path", sorted(DIRECTORY.glob("*.toml")), ids=lambda path: path.stem)
def test_preset_survives_huggingface(path):
    config = load_toml(path, ModelConfig)
    assert ModelConfig.from_huggingface(config.to_huggingface("bfloat16")) == config


@pytest.mark.parametrize("path", sorted((DIRECTORY.parent / "sft").glob("*.toml")), ids=lambda path: path.stem)
def test_every_run_loads(path):
    assert isinstance(load_toml(path, SftConfig), SftConfig)


def test_every_config_is_of_a_kind_that_is_tested():
    assert {path.name for path in DIRECTORY.parent.iterdir()} <= {"models", "sft"}
