"""`generate` on several processes gives the file of one, whatever happens on the way."""

import random
import signal
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from qwq_jax.config.mesh import MeshConfig
from qwq_jax.jobs import generate as job
from qwq_jax.jobs.batch_file import result_number
from tests.jobs.test_generate import ENGINE, mixed_requests, settings_of, write_requests
from tests.jobs.tiny_checkpoint import make_checkpoint
from tests.multihost.launch import together

SPLIT, SPANNING = MeshConfig(data=2, tensor=1), MeshConfig(data=1, tensor=2)


class Batch:
    """A file of requests, what one process answers, and the same by several."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = make_checkpoint(folder)
        self.input = write_requests(folder / "in.jsonl", mixed_requests(random.Random(1)))
        job.generate(self.checkpoint, self.input, folder / "one.jsonl", engine=ENGINE, mesh=MeshConfig())
        self.expected = (folder / "one.jsonl").read_bytes()

    def run(
        self,
        output: Path,
        mesh: MeshConfig,
        *,
        count: int = 2,
        devices: int = 1,
        dying: tuple[int, int, int] = (-1, 0, 0),
    ) -> list[CompletedProcess[str]]:
        """Runs it; in `dying` a process sends itself a signal after so many steps."""
        arguments = ["generate", self.checkpoint, "--input", str(self.input), "--output", str(output)]
        arguments += ["--distributed", "--simulate-devices", str(devices), *settings_of(mesh)]
        worker = ("-m", "tests.multihost.generate_worker", *map(str, dying), "10")
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
        (2, 2, MeshConfig(data=2, tensor=2)),
        (2, 2, MeshConfig(tensor=4)),
        (4, 1, MeshConfig(data=2, tensor=2)),
        (4, 1, MeshConfig(data=2, fsdp=2)),
        (4, 2, MeshConfig(data=4, tensor=2)),
    ],
    ids=str,
)
def test_any_number_of_processes_gives_the_same_file(
    count: int, devices: int, mesh: MeshConfig, batch: Batch, tmp_path: Path
) -> None:
    ends = batch.run(tmp_path / "out.jsonl", mesh, count=count, devices=devices)
    assert codes(ends) == [0] * count, ends
    batch.check(tmp_path / "out.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [SPLIT, SPANNING], ids=["split", "spanning"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_all_and_the_next_run_goes_on(
    mesh: MeshConfig, victim: int, batch: Batch, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    ends = batch.run(output, mesh, dying=(victim, 20, signal.SIGKILL))
    survivor = ends[1 - victim]
    assert ends[victim].returncode == -signal.SIGKILL and survivor.returncode not in (0, 2), ends
    assert "another process" in survivor.stderr or "another task died" in survivor.stderr
    done = answered(output)
    assert done and len(set(done)) == len(done)
    ends = batch.run(output, mesh)
    assert codes(ends) == [0, 0], ends
    batch.check(output)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [SPLIT, SPANNING], ids=["split", "spanning"])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_asked_to_stop_stops_all_and_any_number_goes_on(
    mesh: MeshConfig, victim: int, batch: Batch, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    ends = batch.run(output, mesh, dying=(victim, 10, signal.SIGTERM))
    assert codes(ends) == [42, 42], ends
    assert all("the same command goes on" in end.stderr for end in ends)
    done = answered(output)
    assert 0 < len(done) < 25 and len(set(done)) == len(done)
    if victim:
        job.generate(batch.checkpoint, batch.input, output, engine=ENGINE, mesh=MeshConfig())
    else:
        ends = batch.run(output, MeshConfig(data=4), count=4)
        assert codes(ends) == [0] * 4, ends
    batch.check(output)
