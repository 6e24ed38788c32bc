"""Every bad input: one sentence that names the file and the tensor, exit code 2, nothing half-written."""

import errno
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from qwq_jax import __main__ as command_line
from qwq_jax.checkpoint import directory as directory_module
from qwq_jax.checkpoint import open_checkpoint
from qwq_jax.checkpoint.directory import LocalDirectory, sole_writer
from tests.checkpoint.sources import make_source, model_config, random_tensors, tree_bytes, write_source
from tests.limits import file_size_limit

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `qwq-jax`, expects exit code 2, one sentence on stderr and no destination; returns the sentence."""

    def run(*arguments: str, verb: str = "convert", dest: Path | None = None) -> str:
        capsys.readouterr()
        dest = dest or tmp_path / "dest"
        assert command_line.main([verb, *arguments[:1], str(dest), *arguments[1:]]) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text, text
        if dest == tmp_path / "dest":
            assert not dest.exists()
            assert not (tmp_path / "dest.exporting").exists()
        return text

    return run


def edit_header(file: Path, change: Callable[[dict], None]) -> None:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_json(file: Path, change: Callable[[dict], None]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("keep", [0, 5, 40, -1, -5000])
def test_truncated_file(tmp_path: Path, refused: Callable[..., str], keep: int) -> None:
    source = make_source(tmp_path / "hf", shards=3)
    data = (source / FIRST).read_bytes()
    (source / FIRST).write_bytes(data[:keep])
    assert re.search(rf"hf/{FIRST} is truncated: .*\b\d+ bytes", refused(str(source)))


def _set(name: str, field: str, value: object) -> Callable[[dict], None]:
    return lambda header: header[name].update({field: value})


def _rename(old: str, new: str) -> Callable[[dict], None]:
    return lambda header: header.update({new: header.pop(old)})


NORM = "model.norm.weight"  # 40 float32


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_set(NORM, "data_offsets", [0, 160]), r"overlaps the tensor before it"),
        (_set(NORM, "shape", [41]), r"model\.norm\.weight of shape \[41\] and dtype F32 needs 164 bytes.*span 160"),
        (_set(NORM, "dtype", "I8"), r"model\.norm\.weight has dtype I8; BF16, F16, F32 can be converted"),
        (_set(NORM, "shape", [-40]), r"model\.norm\.weight has a shape or offsets that are not whole numbers"),
        (_set(NORM, "shape", "40"), r"model\.norm\.weight has a shape or offsets that are not whole numbers"),
        (lambda header: header[NORM].pop("dtype"), r"entry of model\.norm\.weight lacks dtype, shape or data_offsets"),
        (lambda header: header.update({NORM: 3}), r"entry of model\.norm\.weight lacks dtype"),
        (lambda header: header.pop(NORM), r"leaves a gap before it|belong to no tensor"),
        (_rename(NORM, "model.norm.scale"), r"unknown extra tensor model\.norm\.scale"),
    ],
)
def test_corrupt_header(
    tmp_path: Path, refused: Callable[..., str], change: Callable[[dict], None], sentence: str
) -> None:
    source = make_source(tmp_path / "hf")
    edit_header(source / "model.safetensors", change)
    text = refused(str(source))
    assert re.search(sentence, text) and "hf" in text


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\xff" * 64, "claims a header of"),
        (struct.pack("<Q", 8) + b"not json", "is not valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "should hold a JSON object"),
        (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "a occurs twice"),
    ],
)
def test_not_a_safetensors_file(tmp_path: Path, refused: Callable[..., str], data: bytes, sentence: str) -> None:
    source = make_source(tmp_path / "hf")
    (source / "model.safetensors").write_bytes(data)
    text = refused(str(source))
    assert "hf/model.safetensors" in text and sentence in text


def test_bytes_after_the_last_tensor(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = make_source(tmp_path / "hf")
    with open(source / "model.safetensors", "ab") as file:
        file.write(b"more")
    assert "hf/model.safetensors is damaged: 4 bytes at its end belong to no tensor" in refused(str(source))


def test_missing_shard(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = make_source(tmp_path / "hf", shards=3)
    (source / FIRST).unlink()
    assert f"hf/{FIRST} is missing, though {INDEX} names it" in refused(str(source))


def test_index_that_names_an_absent_tensor(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = make_source(tmp_path / "hf", shards=3)
    edit_json(source / INDEX, lambda index: index["weight_map"].update({"model.ghost.weight": FIRST}))
    assert f"hf/{INDEX} names tensor model.ghost.weight, which {FIRST} does not hold" in refused(str(source))


def test_index_that_omits_a_tensor(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = make_source(tmp_path / "hf", shards=3)
    edit_json(source / INDEX, lambda index: index["weight_map"].pop(NORM))
    assert f"does not list tensor {NORM}" in refused(str(source))


@pytest.mark.parametrize("file", ["../model.safetensors", "pytorch_model.bin", 3])
def test_index_that_leaves_the_directory(tmp_path: Path, refused: Callable[..., str], file: object) -> None:
    source = make_source(tmp_path / "hf", shards=3)
    edit_json(source / INDEX, lambda index: index["weight_map"].update({NORM: file}))
    assert f"weight_map gives {NORM} {file!r}, which is no .safetensors file beside it" in refused(str(source))


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_broken_index(tmp_path: Path, refused: Callable[..., str], content: str) -> None:
    source = make_source(tmp_path / "hf", shards=3)
    (source / INDEX).write_text(content)
    assert f"hf/{INDEX}" in refused(str(source))


def test_shape_that_contradicts_the_config(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = make_source(tmp_path / "hf")
    edit_json(source / "config.json", lambda config: config.update(intermediate_size=64))
    assert re.search(
        r"hf: model\.layers\.0\.mlp\.\w+_proj\.weight has shape \[.*56.*\], but config.json says .* \[.*64.*\]",
        refused(str(source)),
    )


def test_unknown_extra_tensor(tmp_path: Path, refused: Callable[..., str]) -> None:
    tensors = random_tensors(model_config(), "float32")
    tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(40, np.float32)
    source = write_source(tmp_path / "hf", model_config(), tensors)
    assert "hf: unknown extra tensor model.layers.0.self_attn.o_proj.bias" in refused(str(source))


def test_missing_tensor(tmp_path: Path, refused: Callable[..., str]) -> None:
    tensors = random_tensors(model_config(), "float32")
    del tensors["lm_head.weight"]
    source = write_source(tmp_path / "hf", model_config(), tensors)
    assert "hf: missing tensor lm_head.weight" in refused(str(source))


def test_tied_model_with_another_head(tmp_path: Path, refused: Callable[..., str]) -> None:
    tensors = random_tensors(model_config(), "float32")
    source = write_source(tmp_path / "hf", model_config(tied=True), tensors)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(str(source))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_nan_and_infinity(tmp_path: Path, refused: Callable[..., str], value: float, dtype: str) -> None:
    tensors = random_tensors(model_config(), dtype)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][-1, -1] = value
    source = write_source(tmp_path / "hf", model_config(), tensors)
    assert f"model.safetensors: {name} holds NaN or infinity (--allow-nan accepts it)" in refused(str(source))
    assert command_line.main(["convert", str(source), str(tmp_path / "allowed"), "--allow-nan"]) == 0


def test_broken_config(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = make_source(tmp_path / "hf")
    edit_json(source / "config.json", lambda config: config.update(hidden_act="relu"))
    assert re.search(r"hf/config\.json: .*hidden_act", refused(str(source)))
    (source / "config.json").write_text("{")
    assert "hf/config.json is not valid JSON" in refused(str(source))
    (source / "config.json").unlink()
    assert "hf/config.json is missing" in refused(str(source))


def test_no_source(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "absent: there is no such directory" in refused(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    assert "empty: there is no such directory, or it holds no files" in refused(str(tmp_path / "empty"))
    (tmp_path / "file").write_text("x")
    assert "file is a file, a directory was expected" in refused(str(tmp_path / "file"))
    source = make_source(tmp_path / "hf")
    (source / "model.safetensors").unlink()
    assert f"hf holds neither model.safetensors nor {INDEX}" in refused(str(source))


def test_hub_that_cannot_be_reached(refused: Callable[..., str]) -> None:
    assert "owner/name: no such directory here, and the Hugging Face hub answers" in refused("owner/name")


def test_destination_that_holds_something_else(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = str(make_source(tmp_path / "hf"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert "other holds something else; give an empty or new directory" in refused(source, dest=other)
    assert tree_bytes(other) == {"thesis.txt": b"years of work"}
    assert "holds something else" in refused(source, dest=tmp_path / "hf")
    assert command_line.main(["convert", source, str(tmp_path / "ours")]) == 0
    assert "other holds something else" in refused(str(tmp_path / "ours"), verb="export", dest=other)
    assert "is a file, a directory was expected" in refused(source, dest=other / "thesis.txt")
    assert "a part of the path is a file, not a directory" in refused(source, dest=other / "thesis.txt" / "x")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_unwritable_destination(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The tests may run as root, whom no permission stops, so the system call says it."""
    source = str(make_source(tmp_path / "hf"))
    make = Path.mkdir

    def failing(self: Path, *args: object, **kwargs: object) -> None:
        if "dest" in self.name:
            raise OSError(number, os.strerror(number), str(self))
        make(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", failing)
    assert re.search(r"cannot write .*/dest: (permission is denied|the file system is read-only)", refused(source))


def test_a_destination_that_another_process_writes(tmp_path: Path, refused: Callable[..., str]) -> None:
    source, ours = str(make_source(tmp_path / "hf")), str(tmp_path / "ours")
    with sole_writer(str(tmp_path / "dest")):
        assert "dest is being written by another process" in refused(source)
        assert command_line.main(["convert", source, ours]) == 0
        assert "dest is being written by another process" in refused(ours, verb="export")
    assert command_line.main(["export", ours, str(tmp_path / "dest")]) == 0


def test_locks_are_deleted_and_keep_out_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    inside, most, turns = 0, 0, 0

    def compete() -> None:
        nonlocal inside, most, turns
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            with suppress(ValueError), sole_writer("dest"):
                inside += 1
                most = max(most, inside)
                turns += 1
                time.sleep(0.0001)
                inside -= 1

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(compete) for _ in range(8)]:
            future.result()
    assert most == 1 and turns > 20
    assert list(tmp_path.iterdir()) == []


def test_unwritable_for_real(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "cannot write /proc/dest" in refused(str(make_source(tmp_path / "hf")), dest=Path("/proc/dest"))


def test_export_of_what_is_no_checkpoint(tmp_path: Path, refused: Callable[..., str]) -> None:
    text = refused(str(make_source(tmp_path / "hf")), verb="export")
    assert "hf is not a checkpoint: it has no COMMITTED" in text
    assert "absent is not a checkpoint" in refused(str(tmp_path / "absent"), verb="export")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for about half of the checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_is_foreseen(tmp_path: Path, refused: Callable[..., str], small_disk: Path) -> None:
    source = str(make_source(tmp_path / "hf", num_layers=6))
    assert re.search(r"\d+ bytes are needed and only \d+ are free", refused(source, dest=small_disk / "x"))
    assert os.listdir(small_disk) == []
    assert command_line.main(["convert", source, str(tmp_path / "ours")]) == 0
    assert re.search(
        r"\d+ bytes are needed and only \d+ are free",
        refused(str(tmp_path / "ours"), verb="export", dest=small_disk / "x"),
    )
    assert os.listdir(small_disk) == []


def test_disk_that_fills_up(
    tmp_path: Path, refused: Callable[..., str], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(make_source(tmp_path / "hf", num_layers=6))
    assert command_line.main(["convert", source, str(tmp_path / "ours")]) == 0
    monkeypatch.setattr(LocalDirectory, "free_bytes", lambda self: None)  # as if another job filled it meanwhile
    dest = small_disk / "x"
    text = refused(source, dest=dest)
    assert "no space is left on the device; " in text and "tensors are kept, the same command goes on" in text
    assert not (dest / "COMMITTED").exists()
    kept = {p.stem for p in (dest / "partial").glob("*.json")} - {"identity"}
    assert {p.name for p in (dest / "params").iterdir()} == kept  # no half-written tensor is left
    assert not list(dest.rglob("*.tmp"))
    with pytest.raises(ValueError, match="not a checkpoint"):
        open_checkpoint(str(dest))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert command_line.main(["convert", source, str(dest)]) == 0
    assert tree_bytes(dest) == tree_bytes(tmp_path / "ours")
    shutil.rmtree(dest)
    subprocess.run(["mount", "-o", "remount,size=256k", str(small_disk)], check=True)
    assert "no space is left on the device" in refused(str(tmp_path / "ours"), verb="export", dest=dest)
    assert not dest.exists()


def test_file_size_limit(tmp_path: Path, refused: Callable[..., str]) -> None:
    """The other way in which tensorstore and Python are told that no more bytes fit, without a mount."""
    source = str(make_source(tmp_path / "hf"))
    with file_size_limit(9_000):
        text = refused(source, dest=tmp_path / "limited")
    assert "cannot write" in text and "the file would be larger than the system allows" in text
    assert command_line.main(["convert", source, str(tmp_path / "limited")]) == 0


def test_file_size_limit_of_an_export(tmp_path: Path, refused: Callable[..., str]) -> None:
    ours = str(tmp_path / "ours")
    assert command_line.main(["convert", str(make_source(tmp_path / "hf")), ours]) == 0
    with file_size_limit(50_000):
        text = refused(ours, verb="export")
    assert "cannot write" in text and "the file would be larger than the system allows" in text
    assert command_line.main(["export", ours, str(tmp_path / "dest")]) == 0


def test_reason_names_every_cause() -> None:
    assert directory_module.reason(OSError(errno.ENOSPC, "x")) == "no space is left on the device"
    assert directory_module.reason(OSError("odd\nlines")) == "odd"
