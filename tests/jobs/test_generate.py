"""`generate` as its users meet it: text in, text out, killed and resumed, refused in a sentence."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qwq_jax import __main__ as command_line
from qwq_jax.chat import ChatTokenizer, split_thinking
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Request
from qwq_jax.interrupt import Interrupted
from qwq_jax.jobs import generate as job
from qwq_jax.jobs.answer import with_special_stops
from qwq_jax.jobs.batch_file import result_number
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.generate import GenerateReport
from qwq_jax.jobs.result_file import ResultFile
from tests.checkpoint.sources import read_tensors
from tests.jobs.tiny_checkpoint import END, make_checkpoint
from tests.limits import file_size_limit

ENGINE = EngineConfig(
    max_sequences=4, page_size=32, max_context=128, prefill_chunk=32, max_prefill_sequences=2, compute_dtype="float32"
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: str) -> ChatTokenizer:
    return ChatTokenizer.from_directory(checkpoint)


def write_requests(path: Path, records: list[dict[str, Any] | str]) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8} | fields


def run(
    checkpoint: str, tmp_path: Path, records: list[dict[str, Any] | str], engine: EngineConfig = ENGINE
) -> list[dict[str, Any]]:
    tmp_path.mkdir(exist_ok=True)
    input = write_requests(tmp_path / "in.jsonl", records)
    job.generate(checkpoint, input, tmp_path / "out.jsonl", engine=engine, mesh=MeshConfig())
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def body_of(record: dict[str, Any]) -> dict[str, Any]:
    assert record["error"] is None, record["error"]
    return record["response"]["body"]


def test_the_three_prompts_give_the_same_answer(checkpoint: str, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    text = "[user]hello<think>\n"
    options = {"temperature": 0, "max_tokens": 8, "return_token_ids": True, "ignore_eos": True}
    answers = run(
        checkpoint,
        tmp_path,
        [
            {"custom_id": "chat", "body": ask("hello", **options)},
            {"prompt": text, **options},
            {"prompt_token_ids": tokenizer.encode(text), **options},
        ],
    )
    assert [answer["custom_id"] for answer in answers] == ["chat", "line-2", "line-3"]
    bodies = [body_of(answer) for answer in answers]
    assert bodies[0]["choices"] == bodies[1]["choices"] == bodies[2]["choices"]
    (choice,) = bodies[0]["choices"]
    assert choice["finish_reason"] == "length" and len(choice["token_ids"]) == 8
    reasoning, content = split_thinking(tokenizer.decode(choice["token_ids"]), opened=True)
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == (reasoning, content)
    prompt_tokens = len(tokenizer.encode(text))
    assert bodies[0]["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 8,
        "total_tokens": prompt_tokens + 8,
        "completion_tokens_details": {"reasoning_tokens": 8},
    }


def test_bad_lines_are_answered_and_the_rest_goes_on(checkpoint: str, tmp_path: Path) -> None:
    answers = run(
        checkpoint,
        tmp_path,
        [
            ask("good", custom_id="first"),
            "not json\n",
            ask("x" * 200, custom_id="long"),
            {"messages": [{"role": "wizard", "content": "x"}]},
            ask("bad", temperature=9),
            {"prompt": ""},
            {"prompt_token_ids": [1, 9999]},
            ask("again", custom_id="first"),
            ask("good", custom_id="last"),
        ],
    )
    errors = {answer["id"]: answer["error"]["message"] for answer in answers if answer["error"]}
    assert body_of(answers[0])["choices"] == body_of(answers[-1])["choices"]
    assert errors.keys() == {f"batch_req_{number}" for number in range(2, 9)}
    for (name, message), part in zip(
        errors.items(),
        ["expected a JSON object", "no room in the context of 128", "unknown role 'wizard'", "temperature",
         "the prompt is empty", "token id 9999 is not in the vocabulary of 260", "'first' is taken by line 1"],
        strict=True,
    ):  # fmt: skip
        assert message.startswith(f"line {name.rpartition('_')[2]}: ") and part in message


def test_stop_strings_cut_the_text_at_the_token_they_appear(
    checkpoint: str, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    free = {"prompt": "abc", "temperature": 0, "max_tokens": 30, "ignore_eos": True, "return_token_ids": True}
    (whole,) = body_of(run(checkpoint, tmp_path / "whole", [free])[0])["choices"]
    tokens = whole["token_ids"]
    text = tokenizer.decode(tokens)
    at = next(i for i in range(4, len(text) - 2) if text[i : i + 2].isascii() and text.find(text[i : i + 2]) == i)
    stop = text[at : at + 2]
    (cut,) = body_of(run(checkpoint, tmp_path, [free | {"stop": [stop, "never seen"]}])[0])["choices"]
    assert cut["finish_reason"] == "stop" and cut["message"]["content"] == text[:at]
    assert cut["token_ids"] == tokens[: len(cut["token_ids"])]
    assert tokenizer.decode(cut["token_ids"]).endswith(stop)
    assert stop not in tokenizer.decode(cut["token_ids"][:-1])


def test_stop_strings_that_are_special_tokens_are_stop_tokens(
    checkpoint: str, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    params = SamplingParams(stop=("a", "<|im_end|>", "</think>"), stop_token_ids=(7,))
    assert with_special_stops(params, tokenizer) == params.model_copy(
        update={"stop": ("a", "</think>"), "stop_token_ids": (7, END)}
    )
    requests: list[Request] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "check", lambda self, request: requests.append(request))
        answers = run(checkpoint, tmp_path, [ask("x", stop="<|im_end|>"), ask("x", stop=["Done<|im_end|>"])])
    assert requests[0].params.stop_token_ids == (END,) and not requests[0].params.stop
    assert answers[0]["error"] is None
    assert answers[1]["error"]["message"] == (
        "line 2: stop: 'Done<|im_end|>' holds the special token '<|im_end|>', which has to be a stop of its own"
    )


def test_a_logprob_that_is_no_number_is_the_error_of_its_line(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tensors = read_tensors(tmp_path / "source-0")
    tensors["lm_head.weight"][70] = np.nan
    save_file(tensors, tmp_path / "source-0" / "model.safetensors")
    convert(str(tmp_path / "source-0"), str(tmp_path / "nan"), allow_nan=True)
    requests = [ask("a", logprobs=True, n=3), ask("b"), ask("c", logprobs=True, top_logprobs=2, max_tokens=1)]
    answers = run(str(tmp_path / "nan"), tmp_path / "run", requests)
    assert [answer["error"] is None for answer in answers] == [False, True, False]
    for number in (0, 2):
        message = answers[number]["error"]["message"]
        assert re.fullmatch(rf"line {number + 1}: the model gave token \d+ the log-probability nan", message)


def test_what_is_answered_is_synced_after_every_step(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(ResultFile, "sync_if_due", lambda self: calls.append(len(self.done)))
    stepwise = ENGINE.model_copy(update={"decode_window": 1})
    run(checkpoint, tmp_path, [ask("a", max_tokens=1), ask("b", max_tokens=30, ignore_eos=True)], engine=stepwise)
    assert calls.count(1) > 20, "also while nothing is appended"


@pytest.mark.slow
def test_log_probabilities_of_a_prompt_are_those_of_its_tokens_when_they_were_drawn(
    checkpoint: str, tmp_path: Path
) -> None:
    drawn = {"prompt_token_ids": [65, 66, 67], "max_tokens": 6, "ignore_eos": True, "temperature": 0}
    drawn |= {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    (choice,) = body_of(run(checkpoint, tmp_path / "1", [drawn])[0])["choices"]
    again = {"prompt_token_ids": [65, 66, 67, *choice["token_ids"]], "max_tokens": 1, "prompt_logprobs": 1, "n": 2}
    body = body_of(run(checkpoint, tmp_path / "2", [again])[0])
    first, *rest = body["prompt_logprobs"]
    assert first is None and len(rest) == 2 + 6 and len(body["choices"]) == 2
    for scored, entry in zip(rest[2:], choice["logprobs"]["content"], strict=True):
        assert scored.keys() == entry.keys() and scored["token"] == entry["token"] and scored["bytes"] == entry["bytes"]
        assert scored["logprob"] == pytest.approx(entry["logprob"], abs=1e-4)
        assert [each["token"] for each in scored["top_logprobs"]] == [entry["token"]]
    assert "prompt_logprobs" not in body_of(run(checkpoint, tmp_path / "3", [ask("a", max_tokens=1)])[0])


def test_samples_logprobs_and_seeds(checkpoint: str, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    hot = {"temperature": 1.0, "n": 3, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    answers = run(
        checkpoint,
        tmp_path,
        [ask("x", seed=5, **hot), ask("x", seed=5, **hot), ask("x", seed=6, **hot), ask("x", **hot)],
    )
    choices = [body_of(answer)["choices"] for answer in answers]
    assert choices[0] == choices[1] != choices[2] != choices[3]
    assert [choice["index"] for choice in choices[0]] == [0, 1, 2]
    assert len({tuple(choice["token_ids"]) for each in choices for choice in each}) == 9
    for choice in choices[0]:
        entries = choice["logprobs"]["content"]
        assert [tokenizer.decode([t], skip_special_tokens=False) for t in choice["token_ids"]] == [
            entry["token"] for entry in entries
        ]
        for entry in entries:
            assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2
            assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]
            assert entry["bytes"] is None or bytes(entry["bytes"]).decode() == entry["token"]
    assert body_of(answers[0])["usage"]["completion_tokens"] == sum(len(c["token_ids"]) for c in choices[0])


def test_a_finished_run_is_left_alone_without_loading_the_model(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(checkpoint, tmp_path, [ask("a"), "bad\n", ask("b")])
    output = tmp_path / "out.jsonl"
    os.utime(output, ns=(1, 1))
    before = (output.read_bytes(), output.stat().st_mtime_ns)
    monkeypatch.setattr(Engine, "from_checkpoint", None)
    report = job.generate(checkpoint, tmp_path / "in.jsonl", output, engine=ENGINE, mesh=MeshConfig(data=2))
    assert report == GenerateReport(requests=3)
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before


def test_an_empty_file_is_an_empty_answer(checkpoint: str, tmp_path: Path) -> None:
    assert run(checkpoint, tmp_path, ["\n"]) == []
    assert (tmp_path / "out.jsonl").exists()


class OneLineThenStop(job.StopRequested):
    """As if a signal came after the first steps."""

    calls = 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls > 3


def test_a_signal_stops_between_steps_and_keeps_what_is_answered(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    input = write_requests(tmp_path / "in.jsonl", [ask("a", max_tokens=1), "bad\n", *[ask("b")] * 20])
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(job, "StopRequested", OneLineThenStop)
        with pytest.raises(Interrupted, match=r"2 of 22 requests are answered .* the same command goes on"):
            stepwise = ENGINE.model_copy(update={"decode_window": 1})
            job.generate(checkpoint, input, output, engine=stepwise, mesh=MeshConfig())
    assert {result_number(line) for line in output.read_bytes().splitlines()} == {1, 2}
    assert job.generate(checkpoint, input, output, engine=ENGINE, mesh=MeshConfig()).answered == 20


def test_bad_commands_are_one_sentence_and_exit_2(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    input, output = write_requests(tmp_path / "in.jsonl", [ask("a")]), tmp_path / "out.jsonl"
    settings = ["--set", "engine.max_context=64", "--set", "engine.max_sequences=2"]

    def refused(sentence: str, checkpoint: str, input: Path, output: Path, *more: str) -> None:
        arguments = ["generate", checkpoint, "--input", str(input), "--output", str(output), *settings, *more]
        assert command_line.main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and sentence in error

    refused("no such file", checkpoint, tmp_path / "absent.jsonl", output)
    refused("is not a checkpoint", str(tmp_path), input, output)
    refused(
        "gs://bucket/in.jsonl: requests and answers have to be local", checkpoint, Path("gs://bucket/in.jsonl"), output
    )
    refused(
        "gs://bucket/o.jsonl: requests and answers have to be local", checkpoint, input, Path("gs://bucket/o.jsonl")
    )
    refused("is the input", checkpoint, input, input)
    refused("cannot write", checkpoint, input, tmp_path / "absent" / "out.jsonl")
    refused("needs 64 devices", checkpoint, input, output, "--set", "mesh.data=64")
    refused("max_context 9999 is beyond", checkpoint, input, output, "--set", "engine.max_context=9999")
    assert not output.exists() or output.read_bytes() == b""
    with ResultFile(tmp_path / "other.jsonl", {"a": 1}):
        refused("is being written by another process", checkpoint, input, tmp_path / "other.jsonl")
    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine\n")
    refused("move it away first", checkpoint, input, foreign)
    assert foreign.read_text() == "mine\n"


def test_a_full_disk_exits_2_and_the_run_goes_on_when_there_is_room(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    input, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_requests(input, [ask("a", max_tokens=1, custom_id=f"{number}" * 2000) for number in range(30)])
    arguments = ["generate", checkpoint, "--input", str(input), "--output"]
    settings = ["--set", "engine.max_context=64", "--set", "engine.max_sequences=2"]
    assert command_line.main([*arguments, str(tmp_path / "whole.jsonl"), *settings]) == 0
    with file_size_limit(50_000):
        assert command_line.main([*arguments, str(output), *settings]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"error: cannot write {output}: File too large"
    assert 10 < len(output.read_bytes().splitlines()) < 30
    assert command_line.main([*arguments, str(output), *settings]) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_changed_input_checkpoint_or_type_is_refused(checkpoint: str, tmp_path: Path) -> None:
    run(checkpoint, tmp_path, [ask("a")])
    input, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    before = output.read_bytes()
    other = make_checkpoint(tmp_path, seed=1)
    bfloat16 = ENGINE.model_copy(update={"compute_dtype": "bfloat16"})
    with pytest.raises(ValueError, match="another checkpoint"):
        job.generate(other, input, output, engine=ENGINE, mesh=MeshConfig())
    with pytest.raises(ValueError, match="another cache_dtype and compute_dtype"):
        job.generate(checkpoint, input, output, engine=bfloat16, mesh=MeshConfig())
    write_requests(input, [ask("b")])
    with pytest.raises(ValueError, match="another input"):
        job.generate(checkpoint, input, output, engine=ENGINE, mesh=MeshConfig())
    assert output.read_bytes() == before


# Runs the command line, and dies of a signal at a chosen result line: before it, within it, or before the last rename.
DYING = """
import os, pathlib, signal, sys
from qwq_jax import __main__ as command_line
from qwq_jax.jobs import result_file
number, fraction, signal_number = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
written = 0
def write_all(file, raw, write=result_file._write_all):
    global written
    if written == number:
        if signal_number == signal.SIGKILL:
            write(file, raw[: int(fraction * len(raw))])
            os.kill(os.getpid(), signal_number)
        os.kill(os.getpid(), signal_number)
    written += 1
    write(file, raw)
def replace(self, target):
    os.kill(os.getpid(), signal.SIGKILL)
result_file._write_all = write_all
if number < 0:
    pathlib.Path.replace = replace
sys.exit(command_line.main(sys.argv[4:]))
"""
BEFORE_RENAME = -1


def settings_of(mesh: MeshConfig) -> list[str]:
    sizes = {f"engine.{name}": value for name, value in ENGINE.model_dump(exclude_defaults=True).items()}
    axes = {f"mesh.{name}": value for name, value in mesh.model_dump().items()}
    pairs = {**sizes, **axes, "engine.compute_dtype": "float32"}
    return [part for name, value in pairs.items() for part in ("--set", f"{name}={json.dumps(value).strip(chr(34))}")]


def killed_run(
    checkpoint: str, input: Path, output: Path, mesh: MeshConfig, number: int, fraction: float, signal_number: int
) -> int:
    return subprocess.run(
        [sys.executable, "-c", DYING, str(number), str(fraction), str(signal_number), "generate", checkpoint,
         "--input", str(input), "--output", str(output), *settings_of(mesh)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300,
    ).returncode  # fmt: skip


def mixed_requests(rng: random.Random) -> list[dict[str, Any] | str]:
    """Greedy and drawn, short and long, one and several samples, and a line that is wrong."""
    kinds = [{}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0, "seed": 3, "n": 2}, {"stop": "e"}]
    records: list[dict[str, Any] | str] = [
        ask("x" * rng.randrange(1, 60), **rng.choice(kinds) | {"max_tokens": rng.randrange(1, 24)}) for _ in range(24)
    ]
    records.insert(7, "not json\n")
    return records


def kill_and_resume(
    checkpoint: str, tmp_path: Path, seed: int, points: list[tuple[int, float, int]], meshes: list[MeshConfig]
) -> None:
    input = write_requests(tmp_path / "in.jsonl", mixed_requests(random.Random(seed)))
    undisturbed, output = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    job.generate(checkpoint, input, undisturbed, engine=ENGINE, mesh=MeshConfig())
    answered = 0
    for (number, fraction, signal_number), mesh in zip(points, meshes, strict=True):
        code = killed_run(checkpoint, input, output, mesh, number, fraction, signal_number)
        assert code == (-9 if signal_number == 9 else 42)
        whole = [line for line in output.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        numbers = [result_number(line) for line in whole]
        assert len(set(numbers)) == len(numbers)
        expected = 25 if number == BEFORE_RENAME else answered + number
        # A gentle stop ends after the step, which may bring more lines.
        assert len(numbers) == expected if signal_number == 9 else len(numbers) > expected
        answered = len(numbers)
    report = job.generate(checkpoint, input, output, engine=ENGINE, mesh=MeshConfig(data=2))
    assert report.answered == 25 - answered
    assert output.read_bytes() == undisturbed.read_bytes()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_and_resumed_on_other_meshes_the_file_is_the_same(checkpoint: str, tmp_path: Path) -> None:
    points = [(3, 0.0, 9), (4, 0.6, 9), (5, 0.0, 15)]
    meshes = [MeshConfig(), MeshConfig(data=2, tensor=4), MeshConfig(data=8)]
    kill_and_resume(checkpoint, tmp_path, 0, points, meshes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 6)])
def test_killed_at_any_point_the_file_is_the_same(seed: int, checkpoint: str, tmp_path: Path) -> None:
    rng = random.Random(seed)
    meshes = rng.choices([MeshConfig(), MeshConfig(data=2, tensor=4), MeshConfig(tensor=8)], k=3)
    points = [(rng.randrange(0, 10), rng.random(), 9), (rng.randrange(0, 10), rng.random(), 9), (BEFORE_RENAME, 0.0, 9)]
    kill_and_resume(checkpoint, tmp_path, seed, points, meshes)


def test_eos_is_counted_and_not_shown(checkpoint: str, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    records = [ask("x" * i, temperature=1.5, max_tokens=100, return_token_ids=True, n=4) for i in range(12)]
    choices = [choice for answer in run(checkpoint, tmp_path, records) for choice in body_of(answer)["choices"]]
    ended = [choice for choice in choices if choice["finish_reason"] == "stop"]
    assert ended, "with this checkpoint some samples are meant to end by themselves"
    for choice in ended:
        assert choice["token_ids"].index(END) == len(choice["token_ids"]) - 1
        text = (choice["message"].get("reasoning_content") or "") + choice["message"]["content"]
        assert "<|im_end|>" not in text


def test_a_run_that_cannot_start_leaves_nothing(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    arguments = ["generate", checkpoint, *files, "--set", "mesh.tensor=3"]
    assert command_line.main(arguments) == 2
    assert "sizes that work: 1, 2, 4, 8" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
