"""Processes of ``plan`` with the real compiler: what they read early is what they read of whole programs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwq_jax.jobs.plan_job import read_job
from qwq_jax.plan.compiler import CompilerFailed, Request, Workers
from qwq_jax.plan.cost import ProgramCost
from qwq_jax.plan.memory import RESERVED, held_by_programs
from tests.cases import exhaustive

pytestmark = pytest.mark.slow

INFERENCE, RL = "configs/inference/qwq_32b.toml", "configs/rl/qwq_32b_stage1.toml"
WORKER = (sys.executable, "-m", "qwq_jax.jobs.plan_worker")
PAGES = ("engine.num_pages=64",)
TRAINING = (
    *("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"),
    *("sequence_length=2048", "rows_per_step=8", "accumulation=2"),
)


@pytest.fixture(autouse=True)
def compiler() -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler runs on Linux only")


def described(config: str, topology: str, *settings: str, layers: int = 2) -> dict[str, Any]:
    model, lengths = Path("configs/models/qwq-32b.toml"), (None, None)
    job = read_job(Path(config), settings, model=model, reward_model=None, lengths=lengths)
    described = job.described(topology)
    return {**described, "model": {**described["model"], "num_layers": layers}}


@pytest.mark.parametrize(
    ("config", "topology", "settings", "program"),
    [
        pytest.param(INFERENCE, "v6e:2x4", PAGES, "decode"),
        exhaustive(INFERENCE, "v6e:2x4", PAGES, "prompts"),
        exhaustive("configs/sft/qwq_32b_sft.toml", "v5e:2x4", TRAINING, "step"),
        exhaustive("configs/sft/qwq_32b_sft.toml", "2*v5e:2x2", (*TRAINING, "mesh.data=2", "mesh.fsdp=2"), "step"),
        *(
            exhaustive(RL, "v5p:4x4x4", (), name)
            for name in ("gradient", "update", "sync", "reference", "log-probabilities")
        ),
    ],
)
def test_what_is_decided_before_the_machine_code_is_what_the_whole_program_has(
    config: str, topology: str, settings: tuple[str, ...], program: str
) -> None:
    job = described(config, topology, *settings)
    with Workers(2) as workers:
        early, whole = (workers.ask(Request({**job, "machine_code": code}, program)) for code in (False, True))
    assert early.pop("code") is None and whole.pop("code") > 0
    assert early == whole
    assert early["flops"] or early["moved"] or early["collectives"]


def busy(folder: Path, *, machine_code: bool) -> tuple[subprocess.Popen, int]:
    """A process that was asked for a program of all layers, and its copy that compiles it."""
    request = Request({**described(INFERENCE, "v6e:2x4", layers=64), "machine_code": machine_code}, "decode")
    command = [*WORKER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(f"{request.text}\n".encode())
    process.stdin.flush()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (copies := children.read_text().split()):
        assert process.poll() is None
        time.sleep(0.1)
    return process, int(copies[0])


def is_gone(process: int) -> bool:
    """Whether it ended; what nobody has asked for its status is still listed, as a zombie."""
    for _ in range(50):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("machine_code", [False, exhaustive(True)])
def test_a_program_that_does_not_fit_is_refused_either_way(machine_code: bool) -> None:
    job = described(INFERENCE, "v5e:2x4", "engine.num_pages=300000")
    with Workers(1) as workers:
        found = workers.ask(Request({**job, "machine_code": machine_code}, "decode"))
    assert found["used"] > found["usable"] > 16e9


def test_a_request_that_fails_ends_its_process_with_the_reason() -> None:
    job = described(INFERENCE, "v6e:2x4")
    with (
        Workers(1) as workers,
        pytest.raises(CompilerFailed, match=r"ended with code 1\n[\s\S]*KeyError: 'no program'"),
    ):
        workers.ask(Request(job, "no program"))


def test_a_request_whose_copy_is_killed_ends_its_process_so(tmp_path: Path) -> None:
    process, copy = busy(tmp_path, machine_code=False)
    with process:
        os.kill(copy, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL


def test_a_process_whose_reader_is_gone_ends_and_its_copy_too(tmp_path: Path) -> None:
    process, copy = busy(tmp_path, machine_code=True)
    with process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(10) == -signal.SIGKILL
    assert is_gone(copy)


def test_a_copy_does_not_outlive_its_process(tmp_path: Path) -> None:
    process, copy = busy(tmp_path, machine_code=True)
    time.sleep(1.0)  # it has asked for its own end by then
    process.kill()
    process.communicate(timeout=5)  # no copy holds its output
    assert is_gone(copy)


def test_a_process_answers_one_request_after_another(tmp_path: Path) -> None:
    job = described(INFERENCE, "v6e:2x4", "engine.num_pages=64")
    lines = "".join(f"{Request(job, task).text}\n" for task in ("device", "arrays"))
    told = subprocess.run(
        [*WORKER, str(tmp_path)], input=lines, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    device, arrays = (json.loads(line)["answer"] for line in told)
    assert device["usable"] == arrays["usable"] and arrays["engine"]["engine's weights"] > 5e8


@pytest.mark.exhaustive
@pytest.mark.parametrize(("topology", "pages", "part"), [("v6e:2x4", 5600, 0.4), ("tpu7x:2x2x1", 21_500, 0.5)])
def test_a_step_on_a_full_device_takes_no_more_than_its_reserve(topology: str, pages: int, part: float) -> None:
    """And a good part of it, the most on tpu7x, which the reserve is made for.

    Where there is room it takes more: libtpu compresses code, at the cost of time, where there is none.
    """
    settings = (f"engine.num_pages={pages}", "mesh.data=1", "mesh.tensor=8")
    job = {**described(INFERENCE, topology, *settings, layers=64), "machine_code": True}
    with Workers(2) as workers:
        found = workers.ask(Request(job, "prompts"))
    reserve = held_by_programs({"prompts": ProgramCost.from_json({**found, "code": None})}, {"prompts": 1})[RESERVED]
    assert part * reserve < found["code"] <= reserve
