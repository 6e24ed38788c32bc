"""The result file: durable, resumable, kept from a second writer and from another run's results."""

import errno
import os
from pathlib import Path

import pytest

from qwq_jax.jobs import result_file
from qwq_jax.jobs.result_file import ResultFile

ORIGIN = {"checkpoint": "c", "input": "i", "seed": 0}


def line(number: int, text: str = "é") -> bytes:
    return f'{{"id": "batch_req_{number}", "text": "{text}"}}\n'.encode()


def write(path: Path, *numbers: int) -> None:
    with ResultFile(path, ORIGIN) as results:
        for number in numbers:
            results.append(line(number))


def test_lines_are_appended_and_sorted_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 5, 2)
    assert path.read_bytes() == line(5) + line(2)
    with ResultFile(path, ORIGIN) as results:
        assert results.done == {2, 5}
        results.append(line(3))
        results.finish()
    assert path.read_bytes() == line(2) + line(3) + line(5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def test_a_finished_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 1, 2, 7)
    os.utime(path, ns=(1, 1))
    before = path.stat()
    with ResultFile(path, ORIGIN) as results:
        results.finish()
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ino, after.st_size) == (before.st_mtime_ns, before.st_ino, before.st_size)


@pytest.mark.parametrize("kept", [0, 1, 10, len(line(9)) - 1])
def test_a_torn_last_line_is_cut_off(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 4, 2)
    with path.open("ab") as file:
        file.write(line(9)[:kept])
    with ResultFile(path, ORIGIN) as results:
        assert results.done == {2, 4}
        results.append(line(3))
        results.finish()
    assert path.read_bytes() == line(2) + line(3) + line(4)


@pytest.mark.parametrize("key", ORIGIN)
def test_another_origin_is_refused_by_name(key: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"was begun with another {key}:"), ResultFile(path, ORIGIN | {key: "new"}):
        pass
    assert path.read_bytes() == before
    path.unlink()
    with ResultFile(path, ORIGIN | {key: "new"}) as results:
        assert not results.done


def test_a_foreign_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")
    with pytest.raises(ValueError, match="is not the unfinished result"), ResultFile(path, ORIGIN):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"] and path.read_text() == "mine\n"


@pytest.mark.parametrize("damage", [b"nonsense\n", line(1)])
def test_damage_within_is_told_with_its_line(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 1)
    with path.open("ab") as file:
        file.write(damage + line(2))
    with pytest.raises(ValueError, match="line 2: "), ResultFile(path, ORIGIN):
        pass
    assert path.read_bytes() == line(1) + damage + line(2)


def test_a_second_writer_is_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultFile(path, ORIGIN) as results:
        results.append(line(1))
        with pytest.raises(ValueError, match="is being written by another process"), ResultFile(path, ORIGIN):
            pass
        results.append(line(2))
    write(path, 3)
    assert path.read_bytes() == line(1) + line(2) + line(3)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    real = os.write

    def full(file: int, data: bytes) -> int:
        real(file, bytes(data)[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ResultFile(path, ORIGIN) as results:
        results.append(line(1))
        monkeypatch.setattr(result_file.os, "write", full)
        with pytest.raises(ValueError, match=r"cannot write .*out.jsonl: No space left on device"):
            results.append(line(2))
        monkeypatch.undo()
    assert path.read_bytes() == line(1)
    write(path, 2)
    assert path.read_bytes() == line(1) + line(2)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(result_file.os, "write", lambda file, data: real(file, bytes(data)[:3]))
    write(tmp_path / "out.jsonl", 1, 2)
    assert (tmp_path / "out.jsonl").read_bytes() == line(1) + line(2)


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot write .*absent/out.jsonl.run.json: No such file"):
        with ResultFile(tmp_path / "absent" / "out.jsonl", ORIGIN):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder"), ResultFile(tmp_path / "folder", ORIGIN):
        pass


def test_lines_are_synced_once_a_second_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    now = 0.0
    with ResultFile(tmp_path / "out.jsonl", ORIGIN, clock=lambda: now) as results:
        monkeypatch.setattr(result_file.os, "fsync", synced.append)
        for number in range(1, 31):
            now += 0.1
            results.append(line(number))
        assert 2 <= len(synced) <= 3
        before = len(synced)
        results.append(line(31))
    assert len(synced) == before + 1


def test_a_line_waits_no_longer_than_a_second_though_none_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    now = 0.0
    with ResultFile(tmp_path / "out.jsonl", ORIGIN, clock=lambda: now) as results:
        monkeypatch.setattr(result_file.os, "fsync", synced.append)
        results.append(line(1))
        results.sync_if_due()
        assert not synced
        now += 1.0
        results.sync_if_due()
        results.sync_if_due()
        assert len(synced) == 1
