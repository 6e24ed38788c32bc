"""The verb itself: a run killed and resumed is the run that was not, and bad input is one sentence."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from qwq_jax.__main__ import main
from qwq_jax.checkpoint.directory import sole_writer
from qwq_jax.checkpoint.store import open_checkpoint, read_param
from qwq_jax.checkpoint.train_store import TrainStore
from qwq_jax.jobs.export import export
from qwq_jax.train.metrics import read_records
from tests.limits import file_size_limit
from tests.sft.chat_directory import THINKING, VOCABULARY, write_tokenizer

MODEL = f"""
vocab_size = {VOCABULARY}
hidden_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 16
intermediate_size = 64
rope_theta = 10_000.0
rms_norm_eps = 1e-6
tie_word_embeddings = true
max_position_embeddings = 128
eos_token_ids = [258]
"""
STEPS = 8

# Sends itself a signal right after a step's record is written, before its checkpoint.
KILLED = """
import os, sys
from qwq_jax.train import metrics
number, at, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
write = metrics.MetricsLog.write
def write_and_die(self, step, values):
    write(self, step, values)
    if step == at:
        os.kill(os.getpid(), number)
metrics.MetricsLog.write = write_and_die
from qwq_jax.__main__ import main
sys.exit(main(arguments))
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    write_tokenizer(directory / "tokenizer", THINKING)
    (directory / "model.toml").write_text(MODEL)
    for name, numbers in (("train", range(10, 40)), ("held_out", range(50, 55))):
        with (directory / f"{name}.jsonl").open("w") as file:
            for n in numbers:
                answer = {"role": "assistant", "content": f"<think>\n{n}+{n}\n</think>\n\n{2 * n}"}
                file.write(json.dumps({"messages": [{"role": "user", "content": f"{n}+{n}?"}, answer]}) + "\n")
    path = directory / "sft.toml"
    path.write_text(f"""
model = "{directory}/model.toml"
init = "random"
tokenizer = "{directory}/tokenizer"
train_files = ["{directory}/train.jsonl"]
eval_files = ["{directory}/held_out.jsonl"]
output_dir = "{directory}/whole"
sequence_length = 64
rows_per_step = 8
accumulation = 2
steps = {STEPS}
eval_every = 2
save_every = 3
remat = false
final_dtype = "float32"
[optimizer]
learning_rate = 1e-2
warmup_steps = 2
""")
    return path


@pytest.fixture(scope="module")
def whole(recipe) -> Path:
    assert main(["sft", str(recipe)]) == 0
    return recipe.parent / "whole"


def killed(recipe, output, *, signal, at) -> int:
    command = [sys.executable, "-c", KILLED, str(signal), str(at), "sft", str(recipe), "--set", f"output_dir={output}"]
    return subprocess.run(command, capture_output=True, check=False).returncode


def without_times(path: Path) -> list[dict]:
    timed = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in record.items() if k not in timed} for record in read_records(path / "metrics.jsonl")]


def stored_state(run: Path) -> dict[str, np.ndarray]:
    path = run / "checkpoints" / f"step_{STEPS:08d}" / "arrays"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        names = checkpointer.metadata(path).item_metadata.tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def assert_same_run(left: Path, right: Path) -> None:
    assert without_times(left) == without_times(right)
    assert [record["step"] for record in without_times(left)] == list(range(1, STEPS + 1))
    names = [record.path for record in open_checkpoint(f"{left}/model-{STEPS:06d}").manifest.tensors]
    for name in names:
        values = [read_param(open_checkpoint(f"{run}/model-{STEPS:06d}"), name) for run in (left, right)]
        assert values[0].tobytes() == values[1].tobytes(), name
    states = [stored_state(run) for run in (left, right)]
    assert states[0].keys() == states[1].keys() and any("mu" in key for key in states[0])
    for key, value in states[0].items():
        assert value.tobytes() == states[1][key].tobytes(), key
    records = [(run / "checkpoints" / f"step_{STEPS:08d}" / "record.json").read_text() for run in (left, right)]
    assert records[0] == records[1]


def test_a_run_learns_and_leaves_an_ordinary_checkpoint(whole):
    records = read_records(whole / "metrics.jsonl")
    assert records[-1]["eval_loss"] < 0.8 * records[1]["eval_loss"]
    checkpoint = open_checkpoint(f"{whole}/model-{STEPS:06d}")
    assert checkpoint.dtype == np.float32 and {"tokenizer.json", "config.json"} <= set(checkpoint.manifest.files)
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step_00000006", "step_00000008"]


def test_activations_are_float32_on_the_cpu_unless_it_is_said_otherwise(whole):
    record = json.loads((whole / "checkpoints" / f"step_{STEPS:08d}" / "record.json").read_text())["record"]
    assert record["identity"]["compute_dtype"] == "float32"


@pytest.mark.slow
def test_killed_twice_and_resumed_it_is_bitwise_the_same_run(recipe, whole, tmp_path):
    output = tmp_path / "run"
    assert killed(recipe, output, signal=9, at=2) == -9
    assert killed(recipe, output, signal=9, at=5) == -9
    assert main(["sft", str(recipe), "--set", f"output_dir={output}"]) == 0
    assert_same_run(output, whole)


def test_a_termination_signal_saves_and_says_so(recipe, whole, tmp_path):
    output = tmp_path / "run"
    assert killed(recipe, output, signal=15, at=4) == 42
    assert (output / "checkpoints" / "step_00000004" / "COMMITTED").exists()
    assert main(["sft", str(recipe), "--set", f"output_dir={output}"]) == 0
    assert_same_run(output, whole)


@pytest.mark.slow
def test_an_interruption_ranks_no_checkpoint(recipe, tmp_path):
    output = tmp_path / "run"
    assert killed(recipe, output, signal=15, at=4) == 42  # evaluated after step 4, and saved only because of the signal
    record = json.loads((output / "checkpoints" / "step_00000004" / "record.json").read_text())
    assert record["metric"] is None


def test_foreign_metrics_are_refused(recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"loss": 1}\n')
    assert main(["sft", str(recipe), "--set", f"output_dir={tmp_path}/run"]) == 2
    assert "metrics.jsonl:1: not a record of a training run" in capsys.readouterr().err


def test_a_model_that_cannot_be_written_down_is_not_trained(recipe, tmp_path, capsys):
    (tmp_path / "model.toml").write_text(MODEL + "qkv_bias = false\n")
    overrides = [f"model={tmp_path}/model.toml", f"output_dir={tmp_path}/run"]
    assert main(["sft", str(recipe), *(part for o in overrides for part in ("--set", o))]) == 2
    assert "bias" in capsys.readouterr().err and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_resumed_run_makes_no_initial_weights(recipe, whole, monkeypatch):
    def wasted(*_):
        raise AssertionError("two states at once")

    monkeypatch.setattr("qwq_jax.jobs.sft.initial_weights", wasted)
    assert main(["sft", str(recipe)]) == 0


def test_the_best_checkpoint_can_be_the_result(recipe, tmp_path, monkeypatch):
    restore = TrainStore.restore
    held = []

    def watched(self, step, target):
        held.extend(array for array in jax.live_arrays() if array.shape == (VOCABULARY, 32))
        return restore(self, step, target)

    monkeypatch.setattr(TrainStore, "restore", watched)
    overrides = ["final=best", "optimizer.learning_rate=3.0", f"output_dir={tmp_path}/run"]
    assert main(["sft", str(recipe), *(part for o in overrides for part in ("--set", o))]) == 0
    saved = {
        r["step"]: r["eval_loss"] for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["step"] in (3, 6, 8)
    }
    best = min(saved, key=saved.__getitem__)
    assert best != STEPS and not held, "the last state goes before the best one comes"
    assert (tmp_path / "run" / f"model-{best:06d}" / "COMMITTED").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_order_of_data_and_the_losses_are_those_of_any_mesh(recipe, whole, tmp_path):
    output = tmp_path / "run"
    mesh = ["--set", "mesh.data=2", "--set", "mesh.fsdp=2", "--set", "mesh.tensor=2"]
    assert main(["sft", str(recipe), "--set", f"output_dir={output}", *mesh]) == 0
    for left, right in zip(without_times(output), without_times(whole), strict=True):
        assert left["tokens"] == right["tokens"]
        # Eight steps of Adam amplify the rounding of sums in another order.
        assert left["loss"] == pytest.approx(right["loss"], rel=2e-4)


def test_training_goes_on_from_a_checkpoint(recipe, whole, tmp_path):
    overrides = [f"model={whole}/model-{STEPS:06d}", "init=pretrained", f"output_dir={tmp_path}/next", "stop_after=3"]
    assert main(["sft", str(recipe), *(part for o in overrides for part in ("--set", o))]) == 0
    before = read_records(whole / "metrics.jsonl")
    assert read_records(tmp_path / "next" / "metrics.jsonl")[0]["loss"] < 0.8 * before[0]["loss"]
    assert (
        open_checkpoint(f"{tmp_path}/next/model-000003").config == open_checkpoint(f"{whole}/model-{STEPS:06d}").config
    )


@pytest.mark.parametrize("name", ["record.json", "arrays/d/*"])
def test_a_damaged_checkpoint_of_the_run_exits_2(recipe, whole, tmp_path, capsys, name):
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}").glob(name):
        path.write_bytes(path.read_bytes()[:-9])
    assert main(["sft", str(recipe), "--set", f"output_dir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/run/checkpoints/step_{STEPS:08d}")
    assert "is damaged or incomplete" in error


def test_two_runs_do_not_share_a_directory(recipe, whole, capsys):
    with sole_writer(str(whole)):
        assert main(["sft", str(recipe)]) == 2
    assert f"{whole} is being written by another process" in capsys.readouterr().err


def test_the_model_is_exported_and_verified_against_what_training_held(whole, tmp_path):
    model = f"{whole}/model-{STEPS:06d}"
    report = export(model, str(tmp_path / "hf"))
    assert report.verified == report.tensors
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    gate = stored_state(whole)["params|layers.mlp.gate_kernel"]
    for layer in range(2):
        np.testing.assert_array_equal(weights[f"model.layers.{layer}.mlp.gate_proj.weight"], gate[layer].T)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("compute_dtype=bfloat16", "was trained with compute_dtype = float32, this run has bfloat16"),
        ("seed=7", "was trained with seed = 0, this run has 7"),
        ('train_files=["/absent.jsonl"]', "/absent.jsonl: no such file"),
        ('train_files=["gs://bucket/t.jsonl"]', "train_files: gs://bucket/t.jsonl is not local"),
        ('eval_files=["gs://bucket/t.jsonl"]', "eval_files: gs://bucket/t.jsonl is not local"),
        ("tokenizer=gs://bucket/t", "tokenizer: gs://bucket/t is not local"),
        ("mesh.data=16", "rows_per_step 8 does not divide"),
        ("rows_per_step=7", "rows_per_step 7 does not divide"),
        ("optimizer.warmup_steps=8", "warmup_steps 8 is not below steps 8"),
        ("tokenizer=/absent", "/absent: no tokenizer.json"),
        ("model=/absent", "/absent"),
        ("stepz=3", "stepz"),
        ("stop_after=3", "is at step 8 already, beyond stop_after = 3"),
        ("sequence_length=256", "sequence_length 256 is beyond the 128 positions"),
        ("eval_files=[]", "was trained with held_out_data = "),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(recipe, whole, capsys, override, sentence):
    assert main(["sft", str(recipe), "--set", override]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert without_times(whole)[-1]["step"] == STEPS


def refused(capsys, recipe, *overrides) -> str:
    """Expects exit code 2 and returns the one sentence."""
    capsys.readouterr()
    assert main(["sft", str(recipe), *(part for o in overrides for part in ("--set", o))]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "expected a JSON object"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', "messages[0] has unknown role 'wizard'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "the conversation ends with role 'user'"),
    ],
)
def test_a_bad_line_exits_2_and_names_the_line(recipe, tmp_path, capsys, line, sentence):
    good = (recipe.parent / "train.jsonl").read_text().splitlines()[0]
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n")
    error = refused(capsys, recipe, f'train_files=["{tmp_path}/bad.jsonl"]', f"output_dir={tmp_path}/run")
    assert error.startswith(f"error: {tmp_path}/bad.jsonl:2: ") and sentence in error
    assert not (tmp_path / "run").exists()


def test_an_output_directory_that_cannot_be_used_is_named(recipe, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    error = refused(capsys, recipe, f"output_dir={tmp_path}")
    assert error == f"error: {tmp_path} holds something else; give an empty or new directory"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    error = refused(capsys, recipe, f"output_dir={tmp_path}/thesis.txt")
    assert error == f"error: {tmp_path}/thesis.txt is a file, a directory was expected"
    assert refused(capsys, recipe, "output_dir=/proc/run").startswith("error: cannot write /proc/run: ")


# Orbax drops the writes that it has not begun when one fails.
@pytest.mark.filterwarnings("ignore:coroutine 'async_serialize_from_host:RuntimeWarning")
def test_a_full_disk_exits_2_and_the_run_goes_on_when_there_is_room(recipe, whole, tmp_path, capsys):
    output = tmp_path / "run"
    # Less than one array of the embedding: Orbax joins arrays into files of sizes that differ from save to save.
    with file_size_limit(25_000):
        error = refused(capsys, recipe, f"output_dir={output}")
    assert error.startswith(f"error: cannot write {output}/checkpoints/step_00000003: ")
    assert main(["sft", str(recipe), "--set", f"output_dir={output}"]) == 0
    assert_same_run(output, whole)


def test_metrics_that_cannot_be_written_are_named(recipe, tmp_path, capsys, monkeypatch):
    def full(self, step, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qwq_jax.train.metrics.MetricsLog.write", full)
    error = refused(capsys, recipe, f"output_dir={tmp_path}/run")
    assert error == f"error: cannot write {tmp_path}/run: no space is left on the device"
