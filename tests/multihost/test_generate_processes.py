"""`generate` on several processes gives the file of one, whatever happens on the way."""

import signal
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.jobs import generate as job
from qwq_jax.jobs.batch_file import result_number
from tests.jobs.test_generate import ask, write_requests
from tests.jobs.tiny_checkpoint import make_checkpoint
from tests.multihost.launch import together

# One page holds a whole sequence: only two programs are compiled.
ENGINE = EngineConfig(max_sequences=2, page_size=64, max_context=64, prefill_chunk=64, compute_dtype="float32")
SPLIT, SPANNING = MeshConfig(data=2, tensor=1), MeshConfig(data=1, tensor=2)
LINES = 25


def requests() -> list[dict[str, Any] | str]:
    """Greedy and drawn, short and long, one and several samples, and a line that is wrong."""
    kinds = [{}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0, "seed": 3, "n": 2}, {"stop": "e"}]
    lines: list[dict[str, Any] | str] = [
        ask("x" * (i % 17), **kinds[i % 4] | {"max_tokens": 4 + 7 * i % 20}) for i in range(LINES - 1)
    ]
    return [*lines[:7], "not json\n", *lines[7:]]


class Batch:
    """A file of requests, what one process answers, and the same by several."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = make_checkpoint(folder)
        self.input = write_requests(folder / "in.jsonl", requests())
        self.alone(folder / "one.jsonl")
        self.expected = (folder / "one.jsonl").read_bytes()

    def alone(self, output: Path) -> None:
        """Runs it in this process."""
        job.generate(self.checkpoint, self.input, output, engine=ENGINE, mesh=MeshConfig())

    def run(
        self,
        output: str | Path,
        mesh: MeshConfig,
        *,
        count: int = 2,
        devices: int = 1,
        dying: tuple[int, int, int] = (-1, 0, 0),
    ) -> list[CompletedProcess[str]]:
        """Runs it in several; in `dying` one sends itself a signal after so many steps. INDEX is that of a process."""
        arguments = ["generate", self.checkpoint, "--input", str(self.input), "--output", str(output), "--distributed"]
        settings = {f"engine.{name}": value for name, value in ENGINE.model_dump(exclude_defaults=True).items()}
        settings |= {f"mesh.{name}": value for name, value in mesh.model_dump().items()}
        arguments += [
            "--simulate-devices",
            str(devices),
            *(f"--set={name}={value}" for name, value in settings.items()),
        ]
        worker = ("-m", "tests.multihost.generate_worker", *map(str, dying), "8")
        return together(*worker, *arguments, count=count)

    def check(self, output: Path) -> None:
        assert output.read_bytes() == self.expected
        assert sorted(path.name for path in output.parent.iterdir()) == [output.name, f"{output.name}.run.json"]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return Batch(tmp_path_factory.mktemp("batch"))


def codes(ends: list[CompletedProcess[str]]) -> list[int]:
    return [end.returncode for end in ends]


def answered(output: Path) -> list[int]:
    """The lines answered so far, in the output and the parts beside it."""
    files = [path for path in output.parent.iterdir() if not path.name.endswith(".run.json")]
    lines = [line for path in files for line in path.read_bytes().splitlines(keepends=True)]
    return [result_number(line) for line in lines if line.endswith(b"\n")]


@pytest.mark.slow
def test_two_processes_with_replicas_of_their_own_share_the_lines(batch: Batch, tmp_path: Path) -> None:
    ends = batch.run(tmp_path / "out.jsonl", SPLIT)
    assert codes(ends) == [0, 0], ends
    batch.check(tmp_path / "out.jsonl")
    assert "25 of 25 requests answered, 1 with an error" in ends[0].stderr
    assert [f"{share} of {share} requests" in end.stderr for share, end in zip((13, 12), ends, strict=True)] == [
        True
    ] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (2, 1, SPANNING),
        pytest.param(2, 2, MeshConfig(data=2, tensor=2), marks=pytest.mark.exhaustive),
        pytest.param(4, 1, MeshConfig(data=2, tensor=2), marks=pytest.mark.exhaustive),
    ],
    ids=["spanning", "split", "spanning-pairs"],
)
def test_any_number_of_processes_gives_the_same_file(
    count: int, devices: int, mesh: MeshConfig, batch: Batch, tmp_path: Path
) -> None:
    ends = batch.run(tmp_path / "out.jsonl", mesh, count=count, devices=devices)
    assert codes(ends) == [0] * count, ends
    batch.check(tmp_path / "out.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "victim"), [pytest.param(SPLIT, 1, marks=pytest.mark.exhaustive), (SPANNING, 0)], ids=str
)
def test_a_process_that_dies_ends_all_and_the_next_run_goes_on(
    mesh: MeshConfig, victim: int, batch: Batch, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    ends = batch.run(output, mesh, dying=(victim, 20, signal.SIGKILL))
    survivor = ends[1 - victim]
    assert ends[victim].returncode == -signal.SIGKILL
    if victim:
        assert survivor.returncode == 42 and "process 1 has not been heard of" in survivor.stderr, survivor
    else:  # the place where they meet goes with it, and JAX does not ask us
        assert survivor.returncode == -signal.SIGABRT and "another task died" in survivor.stderr, survivor
    done = answered(output)
    assert done and len(set(done)) == len(done)
    ends = batch.run(output, mesh)
    assert codes(ends) == [0, 0], ends
    batch.check(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "victim", "next_count"),
    [
        pytest.param(SPLIT, 1, 1, marks=pytest.mark.exhaustive),
        pytest.param(SPANNING, 1, 4, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_one_process_asked_to_stop_stops_all_and_any_number_goes_on(
    mesh: MeshConfig, victim: int, next_count: int, batch: Batch, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    ends = batch.run(output, mesh, dying=(victim, 10, signal.SIGTERM))
    assert codes(ends) == [42, 42], ends
    assert all("the same command goes on" in end.stderr for end in ends)
    done = answered(output)
    assert 0 < len(done) < LINES and len(set(done)) == len(done)
    if next_count == 1:
        batch.alone(output)
    else:
        ends = batch.run(output, MeshConfig(data=next_count), count=next_count)
        assert codes(ends) == [0] * next_count, ends
    batch.check(output)


@pytest.mark.slow
def test_a_directory_that_is_not_shared_is_told_before_anything_is_computed(batch: Batch, tmp_path: Path) -> None:
    for index in range(2):
        (tmp_path / str(index)).mkdir()
    ends = batch.run(tmp_path / "INDEX" / "out.jsonl", SPLIT)
    assert codes(ends) == [2, 2], ends
    part = tmp_path / "0" / "out.jsonl.part-1"
    assert all(f"{part}, which process 1 writes, cannot be seen by process 0" in end.stderr for end in ends)


@pytest.mark.slow
def test_an_error_of_one_process_is_told_by_all(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    ends = batch.run(tmp_path / "INDEX" / "out.jsonl", SPLIT)
    assert codes(ends) == [2, 2], ends
    assert all(f"cannot write {tmp_path}/1/out.jsonl.part-1.run.json" in end.stderr for end in ends)
