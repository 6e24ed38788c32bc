"""An export that is already there is left alone, and nothing else is taken for it."""

from pathlib import Path

import pytest

from qwq_jax.jobs import export as job
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.export import export
from tests.checkpoint.sources import make_source


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    convert(str(make_source(tmp_path / "hf", dtype="bfloat16")), str(tmp_path / "ours"))
    export(str(tmp_path / "ours"), str(tmp_path / "back"))
    return tmp_path


def test_a_finished_export_is_not_written_again(exported: Path) -> None:
    weights = exported / "back" / "model.safetensors"
    before = weights.stat()
    report = export(str(exported / "ours"), str(exported / "back"))
    assert (report.nbytes, report.verified) == (0, 27) and report.sentence.startswith("nothing to do")
    assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize("place", [30, -1], ids=["header", "weights"])
def test_one_other_byte_is_something_else(exported: Path, place: int) -> None:
    weights = exported / "back" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[place] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="holds something else"):
        export(str(exported / "ours"), str(exported / "back"))
    assert weights.read_bytes() == data


def test_the_export_of_another_checkpoint_is_something_else(exported: Path) -> None:
    convert(str(make_source(exported / "other", dtype="bfloat16", seed=1)), str(exported / "theirs"))
    with pytest.raises(ValueError, match="holds something else"):
        export(str(exported / "theirs"), str(exported / "back"))


def test_a_run_that_only_finishes_does_not_claim_to_have_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(str(make_source(tmp_path / "hf", dtype="bfloat16")), str(tmp_path / "ours"))

    def fail(*arguments: object) -> None:
        raise OSError(5, "killed")

    with monkeypatch.context() as patch:
        patch.setattr(job, "_finish", fail)
        with pytest.raises(ValueError, match="cannot write"):
            export(str(tmp_path / "ours"), str(tmp_path / "back"))
    report = export(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert report.verified == 0 and "nothing to do" not in report.sentence
