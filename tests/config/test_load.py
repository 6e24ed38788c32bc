from pathlib import Path

import pytest
from pydantic import ValidationError

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.load import build, key_paths, load_toml
from qwq_jax.config.rl import RlConfig
from qwq_jax.config.train import SftConfig

CONFIGS = Path(__file__).parents[2] / "configs"

RUN = """
model = "weights"
train_files = ["train.jsonl"]
output_dir = "out"
steps = 10

[mesh]
data = 2

[optimizer]
learning_rate = 3e-4
"""


@pytest.fixture
def run_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def test_loads(run_toml):
    config = load_toml(run_toml, SftConfig)
    assert config.train_files == ("train.jsonl",)
    assert config.mesh.size == 2
    assert config.optimizer.learning_rate == 3e-4


def test_overrides_are_toml_or_bare_strings(run_toml):
    overrides = [
        "mesh.fsdp=2",
        "optimizer.clip_norm=2",
        "remat=false",
        "model=/a/b c",
        'eval_files=["x", "y"]',
        'output_dir="quoted"',
    ]
    config = load_toml(run_toml, SftConfig, overrides)
    assert config.mesh.model_dump() == {"data": 2, "fsdp": 2, "context": 1, "tensor": 1}
    assert config.optimizer.clip_norm == 2.0
    assert config.remat is False
    assert (config.model, config.output_dir) == ("/a/b c", "quoted")
    assert config.eval_files == ("x", "y")


def test_the_last_override_wins(run_toml):
    assert load_toml(run_toml, SftConfig, ["steps=3", "steps=4"]).steps == 4


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.learningrate=1", "optimizer.learningrate: unknown key, did you mean optimizer.learning_rate?"),
        ("stepz=1", "stepz: unknown key, did you mean steps?"),
        ("steps=many", "steps: expected a valid integer, got 'many'"),
        ("steps=0", "steps: expected greater than 0, got 0"),
        ("steps=1.0", "steps: expected a valid integer, got 1.0"),
        ("remat=1", "remat: expected a valid boolean, got 1"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate: expected a finite number, got nan"),
        ("mesh=3", "mesh: expected a table of MeshConfig, got 3"),
        ("init=maybe", "init: expected 'pretrained' or 'random', got 'maybe'"),
        ("mesh.context=3", "sequence_length 4096 does not divide by 6: mesh.context 3 deals each device two pieces"),
        ("mesh.data=3", "rows_per_step 8 does not divide into accumulation 1 x mesh.data 3 x mesh.fsdp 1"),
        ("optimizer.warmup_steps=10", "optimizer.warmup_steps 10 is not below steps 10"),
        ("model=preset.toml", "model preset.toml is a preset without weights, so init must be 'random'"),
        ("train_files=[]", "train_files: "),
        ("train_files=[1]", "train_files.0: expected a valid string, got 1"),
        ("steps", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("steps.x=3", "steps is a value, not a table"),
    ],
)
def test_bad_overrides_are_one_sentence(run_toml, override, sentence):
    with pytest.raises(ValueError) as caught:
        load_toml(run_toml, SftConfig, [override])
    message = str(caught.value)
    assert sentence in message
    assert f"--set {override}" in message
    assert "\n" not in message


def test_bad_files_are_one_sentence(tmp_path):
    for name, text, sentence in [
        ("broken.toml", "steps = ", "not valid TOML"),
        ("unknown.toml", RUN + "rate = 1\n", "optimizer.rate: unknown key"),
        ("missing.toml", "steps = 1", "model: missing; train_files: missing; output_dir: missing"),
    ]:
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{name}: .*{sentence}"):
            load_toml(path, SftConfig)
    with pytest.raises(ValueError, match="absent.toml: cannot be read: No such file"):
        load_toml(tmp_path / "absent.toml", SftConfig)
    (tmp_path / "binary.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_toml(tmp_path / "binary.toml", SftConfig)


def test_build_leaves_its_argument_alone():
    values = {"page_size": 16}
    config = build(EngineConfig, values, ["page_size=8"], source="engine")
    assert config.page_size == 8
    assert values == {"page_size": 16}


def test_key_paths_reach_into_tables():
    assert {"steps", "mesh.tensor", "optimizer.eps"} <= set(key_paths(SftConfig))


def test_configs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        EngineConfig().page_size = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_table_that_is_absent_may_be_set_in_values_that_name_it():
    """What a config dumps has its optional tables as None."""
    values = load_toml(CONFIGS / "rl" / "tiny_grpo.toml", RlConfig).model_dump()
    assert values["decode_mesh"] is None
    changed = build(RlConfig, values, ["decode_mesh.data=4", "mesh.data=4"], source="tiny_grpo.toml")
    assert changed.decode_mesh is not None and changed.decode_mesh.data == 4
    assert values["decode_mesh"] is None
