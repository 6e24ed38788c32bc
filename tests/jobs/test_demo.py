"""The demo tells its story from one end to the other, and again from what it left."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from qwq_jax.embedded import TINY_REASONER
from qwq_jax.jobs.demo import demo


def test_the_demo_runs_and_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo(tmp_path / "out", count=4)
    first = capsys.readouterr().out
    assert "of 4 right" in first and "tokens/s, loading" in first and "50 verified by sha256" in first
    exported = load_file(tmp_path / "out" / "exported" / "model.safetensors")
    source = load_file(TINY_REASONER / "model.safetensors")
    assert exported.keys() == source.keys()
    assert all(exported[name].tobytes() == source[name].tobytes() for name in source)
    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    demo(tmp_path / "out", count=4)
    second = capsys.readouterr().out
    assert "nothing to do: all 50 tensors were already there" in second and "tokens/s, loading" not in second
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == answers
