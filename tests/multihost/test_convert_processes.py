"""`convert` on several processes gives the files of one, whatever happens on the way."""

import signal
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from qwq_jax.jobs.convert import convert
from tests.checkpoint.sources import random_tensors, write_source
from tests.multihost.launch import together
from tests.multihost.test_two_processes import MODEL


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "hf", MODEL, random_tensors(MODEL, "bfloat16"))


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    alone = tmp_path_factory.mktemp("alone") / "checkpoint"
    convert(str(source), str(alone))
    return files_of(alone)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def run(source: Path, dest: Path, *, count: int = 2, hit: tuple[int, int, int] = (-1, 0, 0)) -> list[CompletedProcess]:
    words = (*map(str, hit), "convert", str(source), str(dest), "--distributed")
    return together("-m", "tests.multihost.convert_worker", *words, count=count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_processes_write_what_one_would(source: Path, expected: dict[str, bytes], tmp_path: Path, count: int) -> None:
    ends = run(source, tmp_path / "checkpoint", count=count)
    assert [end.returncode for end in ends] == [0] * count, ends
    assert files_of(tmp_path / "checkpoint") == expected
    assert all(f"{len(expected_tensors(expected))} of" in ends[0].stdout and not end.stdout for end in ends[1:])
    again = run(source, tmp_path / "checkpoint", count=count)
    assert [end.returncode for end in again] == [0] * count and "nothing to do" in again[0].stdout, again


def expected_tensors(files: dict[str, bytes]) -> set[str]:
    return {name.split("/")[1] for name in files if name.startswith("params/") and name.endswith("zarr.json")}


@pytest.mark.slow
def test_all_stop_when_one_is_asked_to_and_others_go_on(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    dest = tmp_path / "checkpoint"
    ends = run(source, dest, hit=(1, 1, signal.SIGTERM))
    assert [end.returncode for end in ends] == [42, 42], ends
    assert all("the same command goes on" in end.stderr for end in ends), ends
    assert (dest / "partial").is_dir() and not (dest / "COMMITTED").exists()
    kept = {path: path.stat().st_mtime_ns for path in (dest / "params").glob("*/zarr.json")}
    assert 0 < len(kept) < len(expected_tensors(expected))
    convert(str(source), str(dest))  # a process alone goes on as well
    assert files_of(dest) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_rerun_finishes(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    dest = tmp_path / "checkpoint"
    ends = run(source, dest, hit=(1, 2, signal.SIGKILL))
    assert [end.returncode for end in ends] == [42, -signal.SIGKILL], ends
    assert "process 1 has not been heard of" in ends[0].stderr
    assert [end.returncode for end in run(source, dest)] == [0, 0]
    assert files_of(dest) == expected


@pytest.mark.slow
def test_other_sources_are_refused(source: Path, tmp_path: Path) -> None:
    """Each machine has a directory of that name, but not with the same model."""
    for index, seed in enumerate((1, 2)):
        write_source(tmp_path / f"hf-{index}", MODEL, random_tensors(MODEL, "bfloat16", seed=seed))
    words = ("convert", str(tmp_path / "hf-INDEX"), str(tmp_path / "checkpoint"), "--distributed")
    ends = together("-m", "tests.multihost.generate_worker", "-1", "0", "0", "5", *words)
    assert [end.returncode for end in ends] == [2, 2], ends
    assert all("process 1 was given another source than process 0" in end.stderr for end in ends), ends
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_committed_is_finished(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Between the manifest and the marker, when the records of the tensors are gone already."""
    dest = tmp_path / "checkpoint"
    convert(str(source), str(dest))
    (dest / "COMMITTED").unlink()
    assert not (dest / "partial").exists()
    ends = run(source, dest)
    assert [end.returncode for end in ends] == [0, 0], ends
    assert files_of(dest) == expected
