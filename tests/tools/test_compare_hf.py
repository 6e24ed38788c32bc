"""The proof that transformers computes the same is one: it passes what is equal and fails what is not."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwq_jax.jobs.convert import convert
from tests.checkpoint.sources import make_source
from tools import compare_hf

# transformers and torch load from files that they close late, and their own internals deprecate each other.
pytestmark = pytest.mark.filterwarnings("ignore")


def compare(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["compare_hf", *map(str, paths), "--tokens", "20"])
    return compare_hf.main()


def test_equal_weights_are_equal_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source = make_source(tmp_path / "hf")
    convert(str(source), str(tmp_path / "ours"))
    assert compare(monkeypatch, tmp_path / "ours", source) == 0
    assert f"reads {source}: logits equal, largest difference" in capsys.readouterr().out
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.01)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert compare(monkeypatch, tmp_path / "ours", source) == 1
    assert "logits DIFFER" in capsys.readouterr().out


def test_without_transformers_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert compare(monkeypatch, tmp_path, tmp_path) == 0
    assert capsys.readouterr().out == "not compared: transformers is not installed\n"
