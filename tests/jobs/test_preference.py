"""The verbs themselves: they learn, a run that died goes on bitwise, and bad input is one sentence."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwq_jax.__main__ import main
from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint.peft import read_adapter
from qwq_jax.checkpoint.store import Checkpoint, open_checkpoint, read_param
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.rewards import RewardModelConfig
from qwq_jax.rl.learner import Rows
from qwq_jax.rl.preference_data import answer_ids
from qwq_jax.rl.reward_model import RewardModelScorer
from qwq_jax.sharding import make_mesh, train_layout
from qwq_jax.train.metrics import MetricsLog, read_records
from tests.sft.chat_directory import THINKING, write_tokenizer
from tests.sft.test_lora import write_base
from tests.sft.test_run import KILLED, MODEL, stored_state, without_times

STEPS = 8
VERBS = ("dpo", "reward-model")
TABLES = {"dpo": "[dpo]\nbeta = 0.5", "reward-model": "[reward_model]\nthoughts = false"}
RATES = {"dpo": 3e-3, "reward-model": 3e-2}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    """Sums with their results, of which the right one is preferred, and a recipe for each verb."""
    directory = tmp_path_factory.mktemp("recipes")
    write_tokenizer(directory / "tokenizer", THINKING)
    (directory / "model.toml").write_text(MODEL)
    write_base(directory, seed=1)
    for name, numbers in (("train", range(10, 40)), ("held_out", range(50, 55))):
        with (directory / f"{name}.jsonl").open("w") as file:
            for n in numbers:
                replies = [f"<think>\n{n}+{n}\n</think>\n\n{result}" for result in (2 * n, "I give up")]
                file.write(json.dumps({"prompt": f"{n}+{n}?", "chosen": replies[0], "rejected": replies[1]}) + "\n")
    for verb in VERBS:
        (directory / f"{verb}.toml").write_text(f"""
model = "{directory}/base"
train_files = ["{directory}/train.jsonl"]
eval_files = ["{directory}/held_out.jsonl"]
output_dir = "{directory}/{verb}"
sequence_length = 128
rows_per_step = 8
accumulation = 2
steps = {STEPS}
eval_every = 2
save_every = 3
remat = false
final_dtype = "float32"
{TABLES[verb]}
[optimizer]
learning_rate = {RATES[verb]}
""")
    return directory


def run(recipes, verb, *overrides) -> int:
    return main([verb, f"{recipes}/{verb}.toml", *(part for override in overrides for part in ("--set", override))])


@pytest.fixture(scope="module")
def whole(recipes) -> dict[str, Path]:
    """The output of an uninterrupted run of each verb."""
    for verb in VERBS:
        assert run(recipes, verb) == 0
    return {verb: recipes / verb for verb in VERBS}


def result(directory: Path) -> Checkpoint:
    return open_checkpoint(f"{directory}/model-{STEPS:06d}")


def assert_same_run(left: Path, right: Path) -> None:
    assert without_times(left) == without_times(right)
    assert [record["step"] for record in without_times(left)] == list(range(1, STEPS + 1))
    states = [stored_state(path) for path in (left, right)]
    assert states[0].keys() == states[1].keys() and any("mu" in key for key in states[0])
    assert all(states[0][key].tobytes() == value.tobytes() for key, value in states[1].items())
    for name in (f"model-{STEPS:06d}/manifest.json", f"checkpoints/step_{STEPS:08d}/record.json"):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


def test_dpo_prefers_what_was_preferred_and_leaves_an_ordinary_checkpoint(recipes, whole):
    records = read_records(whole["dpo"] / "metrics.jsonl")
    # The policy is its own reference at first, to the last bit but for the rows that its tokens lie in.
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(records[0]["margin"]) < 1e-5
    assert records[-1]["loss"] < 0.3 and records[-1]["eval_loss"] < 0.3
    assert records[-1]["accuracy"] == records[-1]["eval_accuracy"] == 1.0
    last = records[-1]
    assert last["chosen_reward"] - last["rejected_reward"] == pytest.approx(last["margin"], rel=1e-4)
    assert {record["pairs"] for record in records[:3]} == {8.0} and records[0]["tokens"] > 100
    checkpoint = result(whole["dpo"])
    assert checkpoint.config == open_checkpoint(f"{recipes}/base").config
    assert {"tokenizer.json", "config.json"} <= set(checkpoint.manifest.files)
    assert sorted(p.name for p in (whole["dpo"] / "checkpoints").iterdir()) == ["step_00000006", "step_00000008"]


def test_a_reward_model_scores_what_was_preferred_higher(recipes, whole):
    records = read_records(whole["reward-model"] / "metrics.jsonl")
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "a head of zeros"
    assert records[-1]["eval_loss"] < 0.3 and records[-1]["eval_accuracy"] == 1.0
    assert "tokens" not in records[-1] and records[-1]["pairs"] > 0
    checkpoint = result(whole["reward-model"])
    assert checkpoint.config.scalar_head and "reward_model.json" in checkpoint.manifest.files

    tokenizer = ChatTokenizer.from_directory(f"{recipes}/base")
    rows = Rows(64, 2, train_layout(make_mesh(MeshConfig(data=2))))
    config = RewardModelConfig(checkpoint=checkpoint.path)
    scorer = RewardModelScorer.open(config, rows, policy=tokenizer, compute_dtype="float32")
    prompts = [tokenizer.apply_template([{"role": "user", "content": f"{n}+{n}?"}]) for n in range(60, 65)]
    right = scorer.scores([(p, answer_ids(f"{2 * n}", tokenizer)) for n, p in enumerate(prompts, start=60)])
    wrong = scorer.scores([(p, answer_ids("I give up", tokenizer)) for p in prompts])
    assert (right > wrong + 0.5).all()


class Died(BaseException):
    """As a process that is killed: nothing is saved on the way out."""


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("verb", VERBS)
def test_stopped_by_a_signal_and_then_dead_it_is_bitwise_the_same_run(recipes, whole, tmp_path, monkeypatch, verb):
    write, output = MetricsLog.write, tmp_path / "run"

    def write_and_end(self, step, values):
        write(self, step, values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 5:
            raise Died

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_and_end)
        assert run(recipes, verb, f"output_dir={output}") == 42
        assert (output / "checkpoints" / "step_00000002" / "COMMITTED").exists()
        reference = {path: path.read_bytes() for path in output.glob("reference_logprobs.bin")}
        for path in reference:
            path.unlink()  # it is computed again
        with pytest.raises(Died):
            run(recipes, verb, f"output_dir={output}")
    assert len(reference) == (verb == "dpo") and all(path.read_bytes() == was for path, was in reference.items())
    # Nothing is loaded that the checkpoint has.
    monkeypatch.setattr("qwq_jax.jobs.preference.checkpoint_weights", None)
    monkeypatch.setattr("qwq_jax.jobs.preference.reward_weights", None)
    assert run(recipes, verb, f"output_dir={output}") == 0
    assert_same_run(output, whole[verb])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("verb", VERBS)
def test_killed_and_resumed_it_is_bitwise_the_same_run(recipes, whole, tmp_path, verb):
    output = tmp_path / "run"
    for at in (2, 5):
        command = [sys.executable, "-c", KILLED, "9", str(at), verb, f"{recipes}/{verb}.toml"]
        command += ["--set", f"output_dir={output}"]
        assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert run(recipes, verb, f"output_dir={output}") == 0
    assert_same_run(output, whole[verb])


def test_a_signal_while_the_reference_is_computed_is_answered(recipes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qwq_jax.jobs.preference._PART", 8)

    def make_scorer(run, rows):
        def score(params, segments):
            os.kill(os.getpid(), signal.SIGTERM)
            return [np.zeros(1)] * len(segments)

        return score

    monkeypatch.setattr("qwq_jax.jobs.preference.make_scorer", make_scorer)
    assert run(recipes, "dpo", f"output_dir={tmp_path}/run") == 42
    assert "the reference is not computed yet; the same command begins with it" in capsys.readouterr().err
    assert not (tmp_path / "run" / "reference_logprobs.bin").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("verb", VERBS)
def test_on_a_mesh_it_is_the_same_run(recipes, whole, tmp_path, verb):
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    assert run(recipes, verb, f"output_dir={tmp_path}/run", *mesh) == 0
    for left, right in zip(without_times(tmp_path / "run"), without_times(whole[verb]), strict=True):
        # Eight steps of Adam amplify the rounding of sums in another order.
        for name in ("loss", "chosen_reward", "rejected_reward"):
            assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-4), (left["step"], name)


def weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {record.path: np.asarray(read_param(checkpoint, record.path)) for record in checkpoint.manifest.tensors}


LORA = ("lora.rank=4", "optimizer.learning_rate=3e-2")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_dpo_of_adapters_leaves_them_and_the_model_merged(recipes, tmp_path):
    assert run(recipes, "dpo", f"output_dir={tmp_path}/run", *LORA) == 0
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and records[-1]["eval_loss"] < 0.5
    base = open_checkpoint(f"{recipes}/base")
    adapter = read_adapter(f"{tmp_path}/run/adapter-{STEPS:06d}", base.config)
    assert any(np.any(value) for name, value in adapter.params.items() if name.endswith("b"))
    before, after = weights(base), weights(result(tmp_path / "run"))
    changed = {name for name, value in after.items() if not np.array_equal(value, before[name])}
    assert changed and all(name.endswith("kernel") for name in changed)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_reward_model_of_adapters_trains_its_head_too(recipes, tmp_path):
    assert run(recipes, "reward-model", f"output_dir={tmp_path}/run", *LORA) == 0
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["eval_loss"] < 0.5
    trained = {key for key in stored_state(tmp_path / "run") if key.startswith("params|")}
    assert "params|score.kernel" in trained and all("_lora." in key or "score" in key for key in trained)
    before, after = weights(open_checkpoint(f"{recipes}/base")), weights(result(tmp_path / "run"))
    assert np.any(after["score.kernel"]) and not list((tmp_path / "run").glob("adapter-*"))
    changed = {name for name, value in after.items() if name in before and not np.array_equal(value, before[name])}
    assert changed and all(name.endswith("kernel") for name in changed)


def refused(capsys, recipes, verb, *overrides) -> str:
    """Expects exit code 2 and returns the one sentence."""
    capsys.readouterr()
    assert run(recipes, verb, *overrides) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize(
    ("verb", "override", "sentence"),
    [
        ("dpo", "dpo.beta=0.1", "was trained with dpo = "),
        ("dpo", "reward_model.centring=0.0", "expected one of the tables dpo and reward_model, got both"),
        ("reward-model", "reward_model.thoughts=true", "was trained with "),
        ("reward-model", "merge_adapters=false", "a reward model is stored as a whole"),
        ("dpo", "model=configs/models/tiny-reasoner.toml", "is a preset without weights"),
        ("dpo", "seed=7", "was trained with seed = 0, this run has 7"),
        ("dpo", 'train_files=["/absent.jsonl"]', "/absent.jsonl: no such file"),
        ("dpo", 'train_files=["gs://bucket/t.jsonl"]', "train_files: gs://bucket/t.jsonl is not local"),
        ("dpo", "rows_per_step=7", "rows_per_step 7 does not divide"),
        ("dpo", "sequence_length=64", "train.jsonl:1: both replies with their prompts take"),
        ("dpo", "sequence_length=256", "sequence_length 256 is beyond the 128 positions"),
        ("dpo", "stop_after=3", "is at step 8 already, beyond stop_after = 3"),
        ("dpo", "final=first", "final: expected 'last' or 'best', got 'first'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(recipes, whole, capsys, verb, override, sentence):
    assert sentence in refused(capsys, recipes, verb, override)
    assert without_times(whole[verb])[-1]["step"] == STEPS


def test_each_verb_asks_for_its_own_table(recipes, tmp_path, capsys):
    assert main(["dpo", f"{recipes}/reward-model.toml"]) == 2
    assert "dpo: missing; qwq-jax reward-model takes a config with reward_model" in capsys.readouterr().err
    assert main(["reward-model", f"{recipes}/dpo.toml"]) == 2
    assert "reward_model: missing; qwq-jax dpo takes a config with dpo" in capsys.readouterr().err


def test_dpo_does_not_train_a_reward_model(recipes, whole, tmp_path, capsys):
    model = f"{whole['reward-model']}/model-{STEPS:06d}"
    error = refused(capsys, recipes, "dpo", f"model={model}", f"output_dir={tmp_path}/run")
    assert error == f"error: model {model} is a reward model, and dpo trains a policy"


@pytest.mark.parametrize(("verb", "warned"), [("dpo", True), ("reward-model", False)])
def test_dpo_says_that_it_learns_nothing_from_a_margin(recipes, tmp_path, capsys, monkeypatch, verb, warned):
    lines = [json.loads(line) | {"margin": 1.0} for line in (recipes / "train.jsonl").read_text().splitlines()]
    (tmp_path / "margins.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def enough(*_, **__):
        raise ValueError("enough")

    monkeypatch.setattr("qwq_jax.jobs.preference.begin", enough)
    assert run(recipes, verb, f'train_files=["{tmp_path}/margins.jsonl"]', f"output_dir={tmp_path}/run") == 2
    sentence = "30 pairs have a margin, which a reward model learns from and dpo does not"
    assert (sentence in capsys.readouterr().err) is warned
