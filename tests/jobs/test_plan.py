"""``plan``: what it says of jobs and slices; the compiler's part is canned here but for the slow test."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qwq_jax.__main__ import main
from qwq_jax.config.load import load_toml
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.jobs import plan as job
from qwq_jax.jobs.plan_job import read_job
from qwq_jax.jobs.plan_worker import described_devices
from qwq_jax.plan.chips import CHIPS, GB, parse_topology
from qwq_jax.plan.compiler import Request
from qwq_jax.plan.search import Trained, TrainWay, train_choice

QWQ = "configs/models/qwq-32b.toml"
INFERENCE = "configs/inference/qwq_32b.toml"
USABLE = {"v5e": 16.9, "v6e": 33.5, "v5p": 102.8}


def canned(request: Request) -> dict[str, Any]:
    """What a compiler might say, in round figures."""
    chip = request.job["topology"].partition(":")[0].rpartition("*")[2]
    match request.task:
        case "device":
            return {"usable": int(USABLE[chip] * GB)}
        case "arrays":
            tensor = (request.job["config"].get("decode_mesh") or request.job["config"]["mesh"])["tensor"]
            trained = {} if request.job["kind"] == "inference" else {"trained weights and moments": 6 * 10**9}
            engine = {"engine's weights": 65_000_000_000 // tensor, "key-value cache": 10**9}
            return {
                "usable": int(USABLE[chip] * GB),
                "held": trained,
                "engine": {} if request.job["kind"] == "sft" else engine,
                "page": 33_554_432 // tensor,
                "gradients": 10**9 if request.job["kind"] == "rl" else 0,
                "counts": {"decode": 6, "prompts": 4},
            }
        case "gradient" if request.job["config"]["rows_per_micro_batch"] > 64:
            return {"used": 120 * 10**9, "usable": int(USABLE[chip] * GB)}
        case _:
            exchange = {"kind": "all-reduce", "group": 8, "stride": 1, "bytes": 655_360, "count": 129}
            return {
                "temporaries": 10**8,
                "result": 0,
                "code": 10**7 if request.job["machine_code"] else None,
                "flops": 6e11,
                "moved": 9 * 10**9,
                "collectives": [exchange],
            }


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Request]:
    asked: list[Request] = []

    def answer_all(requests: Sequence[Request], **_: Any) -> list[Mapping[str, Any]]:
        asked.extend(requests)
        return [canned(each) for each in requests]

    if "slow" not in request.keywords:
        monkeypatch.setattr(job, "answer_all", answer_all)
        monkeypatch.setattr(job, "is_kept", lambda request, store: True)
    return asked


def run(*words: str) -> int:
    return main(["plan", *words])


def test_inference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prices.toml").write_text("currency = 'EUR'\n[chip_hour]\n'v6e.spot' = 3.6\n")
    code = run(
        *(INFERENCE, "--model", QWQ, "--topology", "v6e:2x4", "--output", str(tmp_path)),
        *("--prices", str(tmp_path / "prices.toml"), "--provisioning", "spot"),
        *("--prompt-tokens", "1024", "--completion-tokens", "4096", "--machine-code"),
    )
    assert code == 0
    shown = capsys.readouterr().out
    assert "tokens/s/chip" in shown and "cost of 1M tokens, EUR" in shown
    plan = json.loads((tmp_path / "plan.json").read_text())["topologies"][0]
    step = plan["programs"]["decode"]["seconds"]
    assert step["hbm"] == pytest.approx(9e9 / 1.64e12)
    assert step["total"] == pytest.approx(step["hbm"] + step["network_waited"])
    prompts = plan["programs"]["prompts"]["seconds"]["total"] * 64 * 1024 / 4096 / 2048
    rate = 64 / (step["total"] + prompts)
    assert plan["facts"]["tokens_per_second"] == pytest.approx(rate)
    assert plan["facts"]["price_of_million_tokens"] == pytest.approx(8 * 3.6 / 3600 / rate * 1e6)
    # 6 programs of decoding and 4 of prompts, of 10 MB each, stay.
    assert plan["memory"]["held"] == {"programs": 10 * 10**7}
    page, free = 33_554_432 // 8, plan["memory"]["usable"] - 65e9 / 8 - 1e8 - 1e8
    assert plan["facts"]["cache_tokens_of_replica"] == free // page * 128
    page = (tmp_path / "plan.html").read_text()
    assert "v6e:2x4" in page and "<script" not in page and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("machine_code", [False, True])
def test_programs_without_machine_code_have_a_reserve(
    machine_code: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", QWQ, "--output", str(tmp_path), "--topology", "v5p:4x4x4"]
    assert run("configs/rl/qwq_32b_stage1.toml", *words, *(["--machine-code"] if machine_code else [])) == 0
    assert ("reserved for programs" in capsys.readouterr().out) is not machine_code
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["machine_code"] is machine_code
    held = document["topologies"][0]["memory"]["held"]
    # Ten steps of the engine, and five programs of an update.
    assert held.get("programs", 0) == (15 * 10**7 if machine_code else 0)
    assert held.get("reserved for programs", 0) == (0 if machine_code else (10 * 48 + 5 * 128) << 20)


def test_a_job_that_would_fit_without_the_reserve_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    # Of the 102.8 GB, 6 are the state and 16.25 the engine's weights, as the canned compiler has it.
    pages = (102_800_000_000 - 22_250_000_000 - 500_000_000) // (33_554_432 // 4)
    words = ("configs/rl/qwq_32b_stage1.toml", "--model", QWQ, "--topology", "v5p:4x4x4")
    settings = ("--set", f"engine.num_pages={pages}")
    assert run(*words, *settings) == 2
    assert "1.17 GB of it are a reserve for programs, which --machine-code measures" in " ".join(
        capsys.readouterr().out.split()
    )
    assert run(*words, *settings, "--machine-code") == 0


def test_a_calibration_corrects_what_it_measured(tmp_path: Path) -> None:
    (tmp_path / "measured.toml").write_text(
        "[[measured]]\nchip = 'v6e'\nprogram = 'decode'\nseconds = 3.0\npredicted = 2.0\n"
    )
    for name, words in (("plain", ()), ("calibrated", ("--calibration", str(tmp_path / "measured.toml")))):
        assert run(INFERENCE, "--model", QWQ, "--topology", "v6e:2x4", "--output", str(tmp_path / name), *words) == 0
    plain, calibrated = (
        json.loads((tmp_path / name / "plan.json").read_text())["topologies"][0]["programs"]
        for name in ("plain", "calibrated")
    )
    assert calibrated["decode"]["seconds"]["total"] == pytest.approx(1.5 * plain["decode"]["seconds"]["total"])
    assert calibrated["prompts"]["seconds"]["total"] == plain["prompts"]["seconds"]["total"]


def test_a_slice_that_is_too_small_is_refused_with_what_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(INFERENCE, "--model", QWQ, "--topology", "v5e:2x2") == 2
    printed = capsys.readouterr()
    text = " ".join(printed.out.split())
    assert "does not fit v5e:2x2" in text and "--set engine.weights=int" in text, "it says what would fit"
    # 65.5 GB of weights over 4 devices, and what a cache is that has a ninth more than one sequence.
    assert "weights take 16.4 GB of each and one sequence of 16,384 tokens 1.1 GB, of 16.9 GB: short by 0.7 GB" in text
    assert printed.err.startswith("error: qwq_32b.toml does not fit v5e:2x2; see above")


def test_what_no_type_makes_fit_is_told_which_slice_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "configs/models/qwen2.5-72b.toml", "--topology", "v5e:1x1")
    assert run(INFERENCE, *words) == 2
    text = " ".join(capsys.readouterr().out.split())
    assert "over 1 device weights take 145.4 GB" in text and "nor with 8 or 4 bits; v5e:2x4 would hold it" in text


def test_a_cache_that_is_too_large_is_refused_before_anything_is_compiled_with_it(
    compiler: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", INFERENCE, "--model", QWQ, "--topology", "v5e:2x4", "--set", "engine.num_pages=4096"]
    assert main(words) == 2
    said = " ".join(capsys.readouterr().out.split())
    # A page is 33,554,432 / 8 bytes and the weights 65 / 8 GB.
    assert "the cache of engine.num_pages = 4,096 needs 17.2 GB: short by 8.4 GB; 2,092 pages would fit" in said
    assert {request.task for request in compiler} == {"device", "arrays"}


def test_a_program_that_is_too_large_says_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ("configs/rl/qwq_32b_stage1.toml", "--model", QWQ, "--topology", "v5p:4x4x4")
    assert run(*recipe, "--set", "rows_per_micro_batch=128") == 2
    text = " ".join(capsys.readouterr().out.split())
    assert "gradient needs 120.00 GB of the 102.80 GB of a device, 17.20 GB too much; lower rows_per_micro" in text
    assert "v5p:4x4x4: fits by estimate: --set mesh.data=1" in text


def test_rows_that_a_micro_batch_has_fit_where_others_would(compiler: list[Request]) -> None:
    words = ("--model", QWQ, "--topology", "v6e:8x16", "--set", "rows_per_micro_batch=256")
    run("configs/rl/qwq_32b_stage1_v6e.toml", *words)
    config = next(request.job["config"] for request in compiler if request.task == "gradient")
    mesh = config["mesh"]
    way = TrainWay(MeshConfig(**mesh), config["remat"], config["rows_per_micro_batch"] // (mesh["data"] * mesh["fsdp"]))
    trained = Trained(load_toml(Path(QWQ), ModelConfig), 22_528)
    assert train_choice(trained, parse_topology("v6e:8x16"), way).bytes_needed < USABLE["v6e"] * GB


def test_several_slices_have_the_state_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("configs/sft/qwq_32b_sft.toml", "--model", QWQ, "--topology", "2*v5e:4x4") == 2
    text = " ".join(capsys.readouterr().out.split())
    assert "524.2 GB and all devices of a slice have 270.4 GB, short by 253.8 GB; v5e:" in text


def test_advice_is_never_what_the_job_has(compiler: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ("configs/rl/qwq_32b_stage1.toml", "--model", QWQ, "--topology", "v5p:4x4x4")
    assert run(*recipe, "--set", "rows_per_micro_batch=128") == 2
    first = capsys.readouterr().out
    advice = first.partition("fits by estimate: ")[2].split("No cost")[0].split()
    assert advice and run(*recipe, *advice) in (0, 2)
    assert " ".join(advice) not in " ".join(capsys.readouterr().out.split())


def test_reinforcement_learning_adds_up(tmp_path: Path) -> None:
    words = ("--model", QWQ, "--topology", "v5p:4x4x4", "--output", str(tmp_path))
    assert run("configs/rl/qwq_32b_stage1.toml", *words) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())["topologies"][0]
    parts = {part["program"]: part for part in plan["parts"]}
    # 2,048 completions on 16 replicas, whose pages hold 93 sequences of the mean length, half of the longest.
    assert plan["facts"]["rows"] == 8192 * 128 // (1024 + 10_240) == 93
    assert parts["decode"]["runs"] == pytest.approx(2048 / 16 / 93 * 10_240)
    micro_batches = 2048 * (1024 + 10_240) / 22_528 / 32
    assert parts["gradient"]["runs"] == pytest.approx(micro_batches)
    assert plan["facts"]["step_seconds"] == pytest.approx(sum(part["seconds"] for part in plan["parts"]))
    assert plan["facts"]["run_seconds"] == pytest.approx(400 * plan["facts"]["step_seconds"])


def test_another_slice_gets_a_mesh_of_its_own(compiler: list[Request], tmp_path: Path) -> None:
    words = ("--model", QWQ, "--topology", "v6e:4x4,v6e:2x4", "--output", str(tmp_path))
    assert run(INFERENCE, *words) == 0
    plans = json.loads((tmp_path / "plan.json").read_text())["topologies"]
    for plan in plans:
        assert plan["mesh"]["data"] * plan["mesh"]["tensor"] == parse_topology(plan["topology"]).devices
    assert any(word.startswith("mesh.data") for word in plans[0]["settings"])
    assert not plans[1]["settings"]
    compiled = {
        request.job["topology"]: request.job["config"]["mesh"] for request in compiler if request.task == "decode"
    }
    assert compiled == {plan["topology"]: plan["mesh"] for plan in plans}


def test_a_search_compiles_what_it_recommends(compiler: list[Request], tmp_path: Path) -> None:
    words = ("--model", QWQ, "--topology", "v6e:2x4", "--output", str(tmp_path), "--search")
    assert run(INFERENCE, *words) == 0
    (plan,) = json.loads((tmp_path / "plan.json").read_text())["topologies"]
    assert plan["recommended"]["settings"] == plan["advice"] != []
    weights = [request.job["config"]["engine"]["weights"] for request in compiler if request.task == "decode"]
    assert weights[0] is None and weights[1] in ("int8", "int4")


def test_a_search_of_training_tries_rematerialisation_and_rows(compiler: list[Request], tmp_path: Path) -> None:
    words = ("configs/sft/qwq_32b_sft.toml", "--model", QWQ, "--topology", "v5p:4x4x4", "--output", str(tmp_path))
    assert run(*words, "--search") == 0
    own, other = (request.job["config"] for request in compiler if request.task == "step")
    assert own["remat"] and not other["remat"], "memory is left for activations"
    assert other["rows_per_step"] == own["rows_per_step"], "the batch is the user's"


def test_what_the_compiler_does_not_confirm_is_no_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def slow_in_8_bits(requests: Sequence[Request], **_: Any) -> list[Mapping[str, Any]]:
        answers = [canned(each) for each in requests]
        for request, answer in zip(requests, answers, strict=True):
            if request.task == "decode" and request.job["config"]["engine"]["weights"]:
                answer["moved"] *= 1000
        return answers

    monkeypatch.setattr(job, "answer_all", slow_in_8_bits)
    words = ("--model", QWQ, "--topology", "v6e:2x4", "--output", str(tmp_path), "--search")
    assert run(INFERENCE, *words) == 0
    (plan,) = json.loads((tmp_path / "plan.json").read_text())["topologies"]
    assert plan["recommended"] is None and plan["advice"] == []


def test_one_slice_that_a_batch_does_not_divide_over_is_not_the_others_problem(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ("rows_per_step=4", "accumulation=1", "mesh.fsdp=4", "mesh.context=2", "mesh.tensor=8")
    words = [word for setting in settings for word in ("--set", setting)]
    topologies = "v5p:4x4x4,v5e:16x16"
    assert run("configs/sft/qwq_32b_sft.toml", "--model", QWQ, "--topology", topologies, *words) == 2
    text = " ".join(capsys.readouterr().out.split())
    assert "cannot be arranged on v5e:16x16: " in text and "rows_per_step 4 does not divide" in text
    assert "v5p:4x4x4 │ fsdp 4 x context 2 x tensor 8 │ 6." in text, "its own mesh, as before"


@pytest.mark.parametrize("topology", ["v5e:16x16", "2*v5e:16x16"])
def test_a_mesh_that_a_batch_divides_over_is_found(topology: str, compiler: list[Request]) -> None:
    assert run("configs/sft/qwq_32b_sft.toml", "--model", QWQ, "--topology", topology) == 0
    mesh = next(request.job["config"]["mesh"] for request in compiler if request.task == "step")
    assert 64 % (mesh["data"] * mesh["fsdp"]) == 0 and mesh["data"] == (2 if "*" in topology else 1)


def test_slices_exchange_gradients(tmp_path: Path) -> None:
    words = ("configs/sft/qwq_32b_sft.toml", "--model", QWQ, "--topology", "v5e:16x16,2*v5e:16x16")
    assert run(*words, "--output", str(tmp_path)) == 0
    steps = [each["programs"]["step"] for each in json.loads((tmp_path / "plan.json").read_text())["topologies"]]
    between = [[each for each in step["collectives"] if each["axes"] == "data"] for step in steps]
    # The canned compiler says 6 GB of weights and two moments.
    assert between[0] == [] and [(each["devices"], each["bytes"]) for each in between[1]] == [(2, 2 * 10**9)]
    network = [step["seconds"]["network_waited"] + step["seconds"]["network_hidden"] for step in steps]
    bandwidth = CHIPS["v5e"].between_slices
    assert bandwidth and network[1] - network[0] == pytest.approx(2e9 / bandwidth, rel=1e-3)


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("--prices", "[chip_hour]\n'v5lite.spot' = 1.0\n", "'v5lite.spot' is no CHIP.PROVISIONING: of v4, v5e"),
        (
            "--calibration",
            "[[measured]]\nchip = 'v5e'\nprogram = 'prefil'\nseconds = 1.0\npredicted = 1.0\n",
            "measured.0.program",
        ),
    ],
)
def test_files_beside_a_plan_name_what_there_is(
    option: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.toml").write_text(text)
    assert run(INFERENCE, "--model", QWQ, "--topology", "v6e:2x4", option, str(tmp_path / "file.toml")) == 2
    assert said in capsys.readouterr().err


def test_a_slice_that_the_compiler_does_not_know_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="topology v5e:3x5: the compiler knows no such slice"):
        described_devices(parse_topology("v5e:3x5"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((INFERENCE, "--model", QWQ), "say which slices: --topology v5e:4x4,v6e:2x4, or --all"),
        ((INFERENCE, "--model", QWQ, "--topology", "h100:8"), "topology h100:8: the chip is 'h100'"),
        ((INFERENCE, "--topology", "v5e:4x4"), "say which architecture with --model"),
        ((INFERENCE, "--model", "absent.toml", "--topology", "v5e:4x4"), "absent.toml: cannot be read"),
        (("absent.toml", "--model", QWQ, "--topology", "v5e:4x4"), "absent.toml: cannot be read"),
        (("configs/rl/tiny_dpo.toml", "--topology", "v5e:4x4"), "plans are made of rl, sft and inference"),
        (
            (INFERENCE, "--model", QWQ, "--topology", "v5e:4x4", "--output", "README.md"),
            "README.md: expected a directory",
        ),
        (
            ("configs/rl/qwq_32b_stage2.toml", "--model", QWQ, "--topology", "v5p:4x4x4"),
            "say its architecture with --reward-model",
        ),
        (
            ("configs/rl/qwq_32b_stage1.toml", "--topology", "v5p:4x4x4"),
            "model gs://BUCKET/qwq-32b is not here; say its architecture with --model",
        ),
        ((INFERENCE, "--model", QWQ, "--reward-model", QWQ, "--topology", "v5e:4x4"), "has no reward model"),
        ((INFERENCE, "--model", QWQ, "--all", "--topology", "v5e:4x4"), "--all and --topology exclude each other"),
        ((INFERENCE, "--model", QWQ, "--topology", "v5e:4x4", "--set", "engine.pages=3"), "engine.pages: unknown key"),
    ],
)
def test_bad_input_is_one_sentence(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_model_is_read_from_what_hugging_face_has(tmp_path: Path) -> None:
    own = read_job(
        Path(INFERENCE), (), model=Path("qwq_jax/embedded/tiny-reasoner"), reward_model=None, lengths=(None, None)
    )
    assert own.model.num_layers == 4


@pytest.fixture
def two_layers(tmp_path: Path) -> Path:
    """Two layers of the 32B, where there is a compiler for them."""
    pytest.importorskip("libtpu", reason="the TPU compiler runs on Linux only")
    small = tmp_path / "two_layers.toml"
    small.write_text(Path(QWQ).read_text().replace("num_layers = 64", "num_layers = 2"))
    return small


@pytest.mark.slow
def test_a_real_compiler_agrees_with_the_arithmetic(two_layers: Path, tmp_path: Path) -> None:
    """Two layers of the 32B on eight chips: bytes and products of a step are those of its weights and its cache."""
    words = ("--model", str(two_layers), "--topology", "v6e:2x4", "--output", str(tmp_path))
    lengths = ("--prompt-tokens", "4096", "--completion-tokens", "8192")
    assert run(INFERENCE, *words, *lengths) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())["topologies"][0]
    decode = plan["programs"]["decode"]
    layer = 2 * 5120 * 48 * 128 + 3 * 5120 * 27_648
    products = 2 * layer + 152_064 * 5120
    assert decode["matrix_flops"] == pytest.approx((2 * products * 64) / 8, rel=0.02)
    cache = 2 * 64 * 8192 * 2 * 128 * 2
    assert decode["hbm_bytes"] == pytest.approx(2 * products / 8 + cache, rel=0.1)
    reduced = [each for each in decode["collectives"] if each["bytes"] == 64 * 5120 * 2]
    assert sum(each["count"] for each in reduced) == 2 * 2 + 1 and {each["axes"] for each in reduced} == {"tensor"}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_products_of_training_with_gathered_weights_are_those_of_the_model(
    two_layers: Path, tmp_path: Path
) -> None:
    """The compiler makes loops of products with weights that it gathers, piece by piece: all their rounds count."""
    words = ["mesh.fsdp=16", "mesh.context=1", "mesh.tensor=1", "sequence_length=8192", "rows_per_step=16"]
    words += ["accumulation=1", "optimizer.warmup_steps=1", "lora.rank=8", "optimizer.learning_rate=1e-5"]
    settings = [part for word in words for part in ("--set", word)]
    config = ("configs/sft/qwq_32b_sft.toml", "--model", str(two_layers), "--topology", "v4:2x2x4")
    assert run(*config, "--output", str(tmp_path), *settings) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())["topologies"][0]
    used = 2 * (2 * 5120 * 48 * 128 + 3 * 5120 * 27_648) + 152_064 * 5120
    # Forward and the gradients of activations, and forward again but for what nothing reads: two to three passes.
    assert 2.0 < plan["programs"]["step"]["matrix_flops"] / (2 * used * 8192) < 3.1


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [("v5e:2x4", {"context": 2, "tensor": 4}), ("2*v6e:2x2", {"data": 2, "fsdp": 2, "tensor": 2})],
)
def test_training_over_tokens_and_over_slices_compiles(
    topology: str, mesh: dict[str, int], two_layers: Path, tmp_path: Path
) -> None:
    words = [f"mesh.{axis}={mesh.get(axis, 1)}" for axis in ("data", "fsdp", "context", "tensor")]
    words += ["sequence_length=2048", "rows_per_step=4", "accumulation=1", "optimizer.warmup_steps=1"]
    settings = [part for word in words for part in ("--set", word)]
    config = ("configs/sft/qwq_32b_sft.toml", "--model", str(two_layers), "--topology", topology)
    assert run(*config, "--output", str(tmp_path), *settings) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())["topologies"][0]
    used = {axis for each in plan["programs"]["step"]["collectives"] for axis in each["axes"].split(" x ")}
    assert {axis for axis in mesh if mesh[axis] > 1} <= used
