"""A conversion killed anywhere goes on with the same command, and writes nothing twice."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwq_jax.__main__ import main
from qwq_jax.checkpoint import open_checkpoint
from qwq_jax.jobs import convert as convert_job
from qwq_jax.jobs import export as export_job
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.export import export
from tests.checkpoint.sources import make_source, read_tensors, tree_bytes

ROOT = Path(__file__).parents[2]


def crash(tmp_path: Path, count: int) -> None:
    source = make_source(tmp_path / "hf", dtype="bfloat16", shards=2)
    command = [
        sys.executable,
        "-m",
        "tests.checkpoint.crash_points",
        str(source),
        str(tmp_path),
        "20261123",
        str(count),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["tensors"] == 27 and seen["total"] > 200
    assert len(seen["results"]) == count
    for result in seen["results"]:
        assert result["kills"] >= 1, result
        assert result["rewritten"] == [], result
        assert result["equal"], result
    # the kills really lie all over the run
    finished = [result["finished_before"][1] for result in seen["results"]]
    assert min(finished) < 9 and max(finished) > 18, finished


def test_killed_at_5_seeded_points(tmp_path: Path) -> None:
    crash(tmp_path, 5)


@pytest.mark.slow
def test_killed_at_20_seeded_points(tmp_path: Path) -> None:
    crash(tmp_path, 20)


class Stop(Exception):
    """Stands for whatever ends a conversion from outside."""


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    write = convert_job.CheckpointWriter.write

    def stopping(self, array, record):
        if len(self.finished) >= count:
            raise Stop
        write(self, array, record)

    monkeypatch.setattr(convert_job.CheckpointWriter, "write", stopping)


def test_only_the_same_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dest = make_source(tmp_path / "hf"), str(tmp_path / "ours")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 10)
        convert(str(source), dest)
    with pytest.raises(ValueError, match="not a checkpoint: its conversion never finished"):
        open_checkpoint(dest)
    with pytest.raises(ValueError, match="unfinished checkpoint of .*/hf with other files or settings"):
        convert(str(source), dest, dtype="bfloat16")
    other = make_source(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="unfinished checkpoint of .*/hf with other files or settings"):
        convert(str(other), dest)
    report = convert(str(source), dest)
    assert report.tensors == 27 and report.written <= 17
    assert convert(str(source), dest).written == 0
    with pytest.raises(ValueError, match="holds a checkpoint of .*/hf with other files or settings"):
        convert(str(other), dest)


def test_a_source_replaced_in_between_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dest = make_source(tmp_path / "hf"), str(tmp_path / "ours")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 10)
        convert(str(source), dest)
    make_source(tmp_path / "hf", seed=1)
    with pytest.raises(ValueError, match="with other files or settings"):
        convert(str(source), dest)


def test_export_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path / "hf", dtype="bfloat16")
    ours, dest = str(tmp_path / "ours"), tmp_path / "back"
    convert(str(source), ours)
    export(ours, str(tmp_path / "calm"), max_shard_bytes=30_000)
    from qwq_jax.jobs import export as export_job

    write = export_job.write_bytes
    calls = []

    def stopping(file, values):
        calls.append(1)
        if len(calls) == 20:
            raise Stop
        write(file, values)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(export_job, "write_bytes", stopping)
        export(ours, str(dest), max_shard_bytes=30_000)
    assert not dest.exists()
    report = export(ours, str(dest), max_shard_bytes=30_000)
    assert 0 < report.verified < 27
    assert tree_bytes(dest) == tree_bytes(tmp_path / "calm")
    assert not (tmp_path / "back.exporting").exists()
    shutil.copytree(dest, tmp_path / "copy")
    assert read_tensors(tmp_path / "copy").keys() == read_tensors(source).keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_conversion_between_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    source = make_source(tmp_path / "hf", num_layers=6)
    convert(str(source), str(tmp_path / "calm"))
    write = convert_job.CheckpointWriter.write

    def signalled(self, array, record):
        write(self, array, record)
        if len(self.finished) == 5:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(convert_job.CheckpointWriter, "write", signalled)
        assert main(["convert", str(source), str(tmp_path / "ours")]) == 42
    said = capsys.readouterr().err.splitlines()[-1]
    found = re.fullmatch(r"interrupted: (\d+) of 75 tensors are in .*/ours; the same command goes on", said)
    assert found and 5 <= int(found[1]) < 75, said
    assert not (tmp_path / "ours" / "COMMITTED").exists()
    assert convert(str(source), str(tmp_path / "ours")).written == 75 - int(found[1])
    assert tree_bytes(tmp_path / "ours") == tree_bytes(tmp_path / "calm")


def test_a_signal_ends_an_export_between_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, ours, back = make_source(tmp_path / "hf"), str(tmp_path / "ours"), str(tmp_path / "back")
    convert(str(source), ours)
    monkeypatch.setattr(export_job.export, "__kwdefaults__", {"max_shard_bytes": 30_000})
    write = export_job._Writer._write

    def signalled(self, *arguments):
        write(self, *arguments)
        if self.verified == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(export_job._Writer, "_write", signalled)
        assert main(["export", ours, back]) == 42
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"interrupted: [1-9] of \d missing files are in .*/back.*; the same command goes on", said)
    assert not Path(back).exists() and not list(tmp_path.rglob("*.tmp"))
    assert main(["export", ours, back]) == 0
    tensors, expected = read_tensors(Path(back)), read_tensors(source)
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].tobytes() == expected[name].tobytes() for name in tensors)
