"""Parts of an output: taken in whole, once, and only where they belong."""

import json
from pathlib import Path

import pytest

from qwq_jax.jobs.result_file import ResultFile
from qwq_jax.jobs.shared_output import part_path, runs_of, take_in_parts

ORIGIN = {"seed": 1}


def line(number: int) -> bytes:
    return json.dumps({"id": f"batch_req_{number}", "text": "x" * number}).encode() + b"\n"


def write(path: Path, *numbers: int, origin: dict[str, int] = ORIGIN, torn: bytes = b"") -> None:
    with ResultFile(path, origin) as file:
        for number in numbers:
            file.append(line(number))
    with path.open("ab") as raw:
        raw.write(torn)


def test_parts_are_taken_in_once_and_deleted(tmp_path: Path) -> None:
    output = tmp_path / "out[1].jsonl"
    write(output, 4, 1)
    write(part_path(output, 1), 2, 4, torn=line(9)[:-1])
    write(part_path(output, 12), 3, 2)
    (tmp_path / "out[1].jsonl.part-3.run.json").touch()  # its process died before it wrote
    write(tmp_path / "out1.jsonl.part-1", 8)  # of another output
    with ResultFile(output, ORIGIN) as results:
        take_in_parts(results, ORIGIN)
        assert results.done == {1, 2, 3, 4}
        results.finish()
    assert output.read_bytes() == b"".join(map(line, range(1, 5)))
    assert not list(tmp_path.glob("out[[]1].jsonl.part*"))
    assert (tmp_path / "out1.jsonl.part-1").exists()


def test_a_part_of_another_command_or_in_use_is_refused_and_kept(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    write(part_path(output, 1), 2, origin={"seed": 2})
    with ResultFile(output, ORIGIN) as results:
        with pytest.raises(ValueError, match="part-1 was begun with another seed"):
            take_in_parts(results, ORIGIN)
        assert part_path(output, 1).read_bytes() == line(2)
        part_path(output, 1).unlink()
        with ResultFile(part_path(output, 1), ORIGIN) as part:
            part.append(line(3))
            with pytest.raises(ValueError, match="part-1 is being written by another process"):
                take_in_parts(results, ORIGIN)
        take_in_parts(results, ORIGIN)
        assert results.done == {3}


def test_runs_cover_the_numbers() -> None:
    assert runs_of([]) == []
    assert runs_of({9, 1, 2, 4, 5, 6}) == [[1, 2], [4, 6], [9, 9]]
