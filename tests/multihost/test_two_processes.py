"""Two processes are one run: the same numbers, each reading only its part, resumed after a stop."""

import hashlib
import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from qwq_jax.__main__ import main
from qwq_jax.checkpoint.store import open_checkpoint, read_param, restore_params
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.jobs.convert import convert
from qwq_jax.sharding import make_mesh, train_layout
from qwq_jax.train.metrics import read_records
from tests.checkpoint.sources import random_tensors, write_source
from tests.multihost.launch import ends_of, start, together
from tests.sft.chat_directory import THINKING, VOCABULARY, write_tokenizer

STEPS = 6

MODEL = ModelConfig(
    vocab_size=VOCABULARY + 3,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=64,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    max_position_embeddings=128,
    eos_token_ids=(258,),
)


def test_each_process_reads_only_its_part(tmp_path: Path) -> None:
    config = MODEL.model_copy(update={"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 8192})
    source = write_source(tmp_path / "hf", config, random_tensors(config, "float32"))
    convert(str(source), str(tmp_path / "checkpoint"))
    checkpoint = open_checkpoint(str(tmp_path / "checkpoint"))
    whole = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in checkpoint.spec.values())
    expected = restore_params(checkpoint, train_layout(make_mesh(MeshConfig(fsdp=4, tensor=2))))

    ends = together("-m", "tests.multihost.restore_worker", str(tmp_path / "checkpoint"))
    assert [end.returncode for end in ends] == [0, 0], ends
    reports = [json.loads(end.stdout.splitlines()[-1]) for end in ends]
    for report in reports:
        # Half of the kernels, all of the small things that every device holds, and metadata.
        assert 0.4 * whole < report["bytes_read"] < 0.6 * whole
    seen = reports[0]["shards"] | reports[1]["shards"]
    for name, array in expected.items():
        for shard in array.addressable_shards:
            digest = hashlib.sha256(np.ascontiguousarray(shard.data).tobytes()).hexdigest()
            assert seen[f"{name} {shard.index}"] == digest


@pytest.mark.slow
def test_processes_that_see_different_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "0" / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "record.json").write_text('{"metric": null, "record": {"identity": {}}}')
    (checkpoint / "COMMITTED").touch()
    for directory, answer in (("0", "3"), ("INDEX", "processes find different checkpoints there (-1, 3)")):
        ends = together("-m", "tests.multihost.resume_worker", str(tmp_path / directory))
        assert [end.returncode for end in ends] == [0, 0], ends
        assert all(answer in end.stdout for end in ends), ends


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("multihost")
    source = write_source(directory / "hf", MODEL, random_tensors(MODEL, "float32"))
    write_tokenizer(source, THINKING)
    with (directory / "train.jsonl").open("w") as file:
        for n in range(10, 40):
            answer = {"role": "assistant", "content": f"<think>\n{n}+{n}\n</think>\n\n{2 * n}"}
            file.write(json.dumps({"messages": [{"role": "user", "content": f"{n}+{n}?"}, answer]}) + "\n")
    path = directory / "sft.toml"
    path.write_text(f"""
model = "{source}"
train_files = ["{directory}/train.jsonl"]
eval_files = ["{directory}/train.jsonl"]
output_dir = "{directory}/one"
sequence_length = 64
rows_per_step = 8
steps = {STEPS}
eval_every = 3
save_every = 2
final = "best"
compute_dtype = "float32"
final_dtype = "bfloat16"
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
[mesh]
data = 2
fsdp = 2
tensor = 2
""")
    return path


@pytest.fixture(scope="module")
def one(recipe: Path) -> Path:
    """What one process makes."""
    assert main(["sft", str(recipe)]) == 0
    return recipe.parent / "one"


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_training_is_that_of_one_process_also_after_a_stop(recipe: Path, one: Path, count: int) -> None:
    several = recipe.parent / f"of {count}"
    command = ("-m", "qwq_jax", "sft", str(recipe), "--distributed", "--simulate-devices", str(8 // count))
    command += ("--set", f"output_dir={several}")
    for stop in ("--set=stop_after=3", f"--set=stop_after={STEPS}"):
        ends = together(*command, stop, count=count)
        assert [end.returncode for end in ends] == [0] * count, ends
    records = [read_records(run / "metrics.jsonl") for run in (one, several)]
    assert [r["step"] for r in records[1]] == [r["step"] for r in records[0]] == list(range(1, STEPS + 1))
    for left, right in zip(*records, strict=True):
        assert left["tokens"] == right["tokens"]
        # Sums over devices are taken in another order.
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
    checkpoints = [open_checkpoint(f"{run}/model-{STEPS:06d}") for run in (one, several)]
    for name in checkpoints[0].spec:
        left, right = (read_param(checkpoint, name).astype(np.float32) for checkpoint in checkpoints)
        # Adam divides by the root of its second moment, and bf16 keeps 8 bits: one rounding apart.
        np.testing.assert_allclose(left, right, rtol=2**-6, atol=2e-4)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_when_one_process_is_stopped_or_dies_all_end_and_the_same_command_goes_on(recipe: Path, sent: int) -> None:
    folder = recipe.parent
    long = [part for each in ("steps=60", "eval_every=20", "save_every=10") for part in ("--set", each)]
    calm, output = folder / f"calm {sent}", folder / f"disturbed {sent}"
    command = ("-m", "qwq_jax", "sft", str(recipe), "--distributed", "--simulate-devices", "4", *long)
    assert [end.returncode for end in together(*command, "--set", f"output_dir={calm}")] == [0, 0]
    started = start(*command, "--set", f"output_dir={output}")
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or len(read_records(metrics)) < 13:
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.1)
    started[1].send_signal(sent)
    sent_at = time.monotonic()
    ends = ends_of(started)
    assert time.monotonic() - sent_at < 60
    assert ends[0].returncode == 42 and ends[1].returncode == (42 if sent == signal.SIGTERM else -sent), ends
    said = "the same command goes on" if sent == signal.SIGTERM else "process 1 has not been heard of"
    assert said in ends[0].stderr
    hosts = json.loads((output / "hosts.json").read_text())["hosts"]
    assert [host["process"] for host in hosts] == [0, 1] and all(host["memory_gb"] > 0.05 for host in hosts)
    assert len(read_records(metrics)) < 60, "in the middle"
    assert [end.returncode for end in together(*command, "--set", f"output_dir={output}")] == [0, 0]
    records = [read_records(run / "metrics.jsonl") for run in (calm, output)]
    assert [r["step"] for r in records[1]] == [r["step"] for r in records[0]] == list(range(1, 61))
    for left, right in zip(*records, strict=True):
        assert (left["tokens"], left["loss"]) == (right["tokens"], right["loss"]), "to the last bit"
