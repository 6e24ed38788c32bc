"""Instruction tuning of adapters: the verb itself, its exact resume, what it leaves, and what it leaves alone."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from qwq_jax.__main__ import main
from qwq_jax.checkpoint.peft import read_adapter
from qwq_jax.checkpoint.store import Checkpoint, open_checkpoint, read_param
from qwq_jax.config.load import load_toml
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.train import SftConfig
from qwq_jax.jobs.sft import sft
from qwq_jax.model.lora import num_adapter_parameters
from qwq_jax.model.params import random_params, stack
from qwq_jax.train.metrics import MetricsLog, read_records
from qwq_jax.train.weights import companion_files, write_checkpoint
from tests.sft.chat_directory import THINKING, write_tokenizer
from tests.sft.test_run import MODEL, refused, stored_state, without_times

STEPS = 8


def write_base(directory: Path, seed: int) -> None:
    """A checkpoint of random weights; its embedding, which stays as it is, is large enough for confident answers."""
    model = load_toml(directory / "model.toml", ModelConfig)
    params = stack(random_params(model, jax.random.key(seed)), model.num_layers)
    write_checkpoint(
        str(directory / "base"),
        params | {"embed.embedding": 15 * params["embed.embedding"]},
        model,
        dtype="float32",
        files=companion_files(str(directory / "tokenizer")),
        identity=str(seed),
        origin="somebody/a-model",
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    write_tokenizer(directory / "tokenizer", THINKING)
    (directory / "model.toml").write_text(MODEL)
    write_base(directory, seed=1)
    with (directory / "train.jsonl").open("w") as file:
        for n in range(10, 40):
            answer = {"role": "assistant", "content": f"<think>\n{n}+{n}\n</think>\n\n{2 * n}"}
            file.write(json.dumps({"messages": [{"role": "user", "content": f"{n}+{n}?"}, answer]}) + "\n")
    path = directory / "sft.toml"
    path.write_text(f"""
model = "{directory}/base"
train_files = ["{directory}/train.jsonl"]
eval_files = ["{directory}/train.jsonl"]
output_dir = "{directory}/whole"
sequence_length = 64
rows_per_step = 8
accumulation = 2
steps = {STEPS}
save_every = 3
final_dtype = "float32"
[lora]
rank = 8
alpha = 16
[optimizer]
learning_rate = 3e-2
""")
    return path


def weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {record.path: np.asarray(read_param(checkpoint, record.path)) for record in checkpoint.manifest.tensors}


def run(recipe, *overrides) -> int:
    return main(["sft", str(recipe), *(part for override in overrides for part in ("--set", override))])


@pytest.fixture(scope="module")
def whole(recipe) -> Path:
    before = weights(open_checkpoint(f"{recipe.parent}/base"))
    assert run(recipe) == 0
    after = weights(open_checkpoint(f"{recipe.parent}/base"))
    assert all(after[name].tobytes() == value.tobytes() for name, value in before.items())
    return recipe.parent / "whole"


@pytest.mark.slow
def test_a_run_learns_with_a_state_of_adapters_only(whole):
    records = read_records(whole / "metrics.jsonl")
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert records[-1]["eval_loss"] < records[2]["eval_loss"]
    model = open_checkpoint(f"{whole}/model-{STEPS:06d}").config
    lora = load_toml(whole.parent / "sft.toml", SftConfig).lora
    assert lora is not None
    saved = stored_state(whole)
    names = {key for key in saved if key.startswith("params|")}
    assert names and all("_lora." in name for name in names)
    # Parameters, two moments, and the counters of Adam, of the schedule and of the state.
    assert sum(value.size for value in saved.values()) == 3 * num_adapter_parameters(model, lora) + 3


def test_the_model_it_writes_is_the_base_with_its_adapter_merged(whole):
    base, merged = open_checkpoint(f"{whole.parent}/base"), open_checkpoint(f"{whole}/model-{STEPS:06d}")
    adapter = read_adapter(f"{whole}/adapter-{STEPS:06d}", base.config)
    assert adapter.base_model == "somebody/a-model" and adapter.lora.scale == 2.0
    saved = stored_state(whole)
    old, new = weights(base), weights(merged)
    for name, value in adapter.params.items():
        np.testing.assert_array_equal(value, saved[f"params|{name}"])
    for name, value in old.items():
        if not name.endswith("kernel"):
            np.testing.assert_array_equal(new[name], value)
            continue
        _, layer, rest = name.split(".", 2)
        stem = f"layers.{rest.removesuffix('_kernel')}_lora"
        a, b = (adapter.params[f"{stem}.{letter}"][int(layer)].astype(np.float64) for letter in "ab")
        change = 2.0 * a.reshape(-1, 8) @ b.reshape(8, -1)
        np.testing.assert_allclose(new[name], value + change.reshape(value.shape), atol=1e-6, err_msg=name)
        assert np.abs(change).max() > 0.01


def test_interrupted_and_resumed_it_is_bitwise_the_same_run(recipe, whole, tmp_path, monkeypatch):
    write = MetricsLog.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        if step in (2, 5):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_and_stop)
        assert run(recipe, f"output_dir={tmp_path}/run") == 42
        assert run(recipe, f"output_dir={tmp_path}/run") == 42
    assert run(recipe, f"output_dir={tmp_path}/run") == 0
    output = tmp_path / "run"
    assert without_times(output) == without_times(whole)
    states = [stored_state(path) for path in (output, whole)]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][key].tobytes() == value.tobytes() for key, value in states[1].items())
    for name in (f"model-{STEPS:06d}/manifest.json", f"adapter-{STEPS:06d}/adapter_model.safetensors"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_on_a_mesh_it_is_the_same_run(recipe, whole, tmp_path):
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    assert run(recipe, f"output_dir={tmp_path}/run", *mesh) == 0
    for left, right in zip(without_times(tmp_path / "run"), without_times(whole), strict=True):
        assert left["tokens"] == right["tokens"]
        # Eight steps of Adam amplify the rounding of sums in another order.
        assert left["loss"] == pytest.approx(right["loss"], rel=2e-4)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_frozen_weights_may_be_bfloat16_and_the_adapter_alone_the_result(recipe, tmp_path):
    settings = load_toml(
        recipe,
        SftConfig,
        ["param_dtype=bfloat16", "merge_adapters=false", "stop_after=2", f"output_dir={tmp_path}/run"],
    )
    report = sft(settings)
    assert report.model is None and report.adapter == f"{tmp_path}/run/adapter-000002"
    assert not list((tmp_path / "run").glob("model-*"))
    model = open_checkpoint(f"{recipe.parent}/base").config
    assert any(np.any(value) for name, value in read_adapter(report.adapter, model).params.items() if name[-1] == "b")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["lora.rank=4"], "was trained with lora = "),
        (['lora.target_modules=["qproj"]'], 'lora.target_modules: expected "all-linear" or a list of some of q_proj'),
        (["lora.dropout=0.1"], "dropout: adapters are trained without dropout"),
        (["init=random"], "lora adapts trained weights, so init must be 'pretrained'"),
    ],
)
def test_bad_settings_are_one_sentence(recipe, whole, capsys, overrides, sentence):
    assert sentence in refused(capsys, recipe, *overrides)


def test_a_run_does_not_go_on_over_other_weights(recipe, whole, tmp_path, capsys):
    base = recipe.parent / "base"
    base.rename(tmp_path / "kept")
    try:
        write_base(recipe.parent, seed=2)
        assert "was trained with frozen_weights = " in refused(capsys, recipe)
    finally:
        base.rename(tmp_path / "other")
        (tmp_path / "kept").rename(base)
