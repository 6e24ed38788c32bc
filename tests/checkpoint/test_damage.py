"""A checkpoint that lost or changed a byte after it was committed is refused in a sentence, never read as zeros."""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.errors import JaxRuntimeError

from qwq_jax import __main__ as command_line
from qwq_jax.checkpoint import open_checkpoint, read_param, restore_params
from qwq_jax.checkpoint.directory import open_directory
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.export import export
from tests.checkpoint.sources import make_source

# Orbax drops the reads that were still under way when one fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def abandoned_reads_end_here() -> Iterator[None]:
    yield
    gc.collect()


NAME = "layers.1.mlp.up_kernel"


@pytest.fixture(scope="module", params=[None, "bfloat16"])
def intact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("intact")
    convert(str(make_source(root / "hf", dtype="float32")), str(root / "ours"), dtype=request.param)
    return root / "ours"


def lose_a_file(folder: Path) -> None:
    next(path for path in (folder / "c").rglob("*") if path.is_file()).unlink()


def flip_a_bit(folder: Path) -> None:
    path = next(path for path in (folder / "c").rglob("*") if path.is_file())
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [lose_a_file, flip_a_bit])
def test_damage_is_found_however_it_is_read(intact: Path, tmp_path: Path, harm, capsys) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(intact, copy)
    harm(copy / "params" / NAME)
    checkpoint = open_checkpoint(str(copy))
    with pytest.raises(ValueError, match=f"copy: {NAME} is damaged or incomplete"):
        restore_params(checkpoint, None)
    with pytest.raises(ValueError, match=NAME):
        read_param(checkpoint, NAME)
    assert command_line.main(["export", str(copy), str(tmp_path / "back")]) == 2
    error = capsys.readouterr().err
    assert NAME in error and error.count("\n") == 1 and not (tmp_path / "back").exists()


def raising(error: Exception):
    def restore(self, *args, **kwargs):
        raise error

    return restore


@pytest.mark.parametrize(
    "cause", [JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), MemoryError()]
)
def test_too_little_memory_is_no_damage(intact: Path, monkeypatch, cause) -> None:
    error = Exception("Encountered error while reading array index")  # as Orbax does
    error.__cause__ = cause
    monkeypatch.setattr(ocp.Checkpointer, "restore", raising(error))
    with pytest.raises(ValueError, match="ours: its arrays do not fit the memory of the devices; use a wider mesh"):
        restore_params(open_checkpoint(str(intact)), None)


@pytest.mark.parametrize("error", [JaxRuntimeError("INTERNAL: a device is lost"), AssertionError("a bug")])
def test_what_is_no_damage_keeps_its_name(intact: Path, monkeypatch, error) -> None:
    monkeypatch.setattr(ocp.Checkpointer, "restore", raising(error))
    with pytest.raises(type(error), match=str(error)):
        restore_params(open_checkpoint(str(intact)), None)


def test_converted_tensors_are_verified_too(intact: Path, tmp_path: Path) -> None:
    """Values that a checksum would pass, as if they had been written wrong."""
    import tensorstore as ts

    copy = tmp_path / "copy"
    shutil.copytree(intact, copy)
    kvstore = {"driver": "file", "path": f"{copy}/params/{NAME}/"}
    store = ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
    values = np.array(store.read().result())
    values[3, 5] += 1
    store.write(values).result()
    with pytest.raises(ValueError, match=f"{NAME} is damaged: its bytes are not those of model.layers.1.mlp.up_proj"):
        export(str(copy), str(tmp_path / "back"))


def test_every_tensor_is_verified(intact: Path, tmp_path: Path) -> None:
    report = export(str(intact), str(tmp_path / "back"))
    assert report.verified == report.tensors


def test_other_kinds_of_address_are_refused(capsys) -> None:
    with pytest.raises(ValueError, match="s3://bucket/x: expected a local path or a gs:// address, not s3://"):
        open_directory("s3://bucket/x")
    assert command_line.main(["export", "s3://bucket/x", "back"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_accepting_nan_is_part_of_what_a_conversion_is(tmp_path: Path, capsys) -> None:
    source = str(make_source(tmp_path / "hf"))
    assert command_line.main(["convert", source, str(tmp_path / "ours"), "--allow-nan"]) == 0
    assert command_line.main(["convert", source, str(tmp_path / "ours")]) == 2
    assert "with other files or settings" in capsys.readouterr().err
