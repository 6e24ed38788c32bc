"""Checkpoints go where a relative path points, as well as an absolute one."""

from pathlib import Path

import jax.numpy as jnp
import pytest
from etils import epath

from qwq_jax.checkpoint.train_store import TrainStore


def test_a_relative_directory_saves_and_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    store = TrainStore(epath.Path("run/checkpoints"))
    store.save(3, {"x": jnp.arange(4)}, {"stream": {}, "identity": {}}, metric=None)
    assert (tmp_path / "run" / "checkpoints").is_dir()
    assert TrainStore(epath.Path("run/checkpoints")).steps() == [3]


def test_a_bucket_stays_a_bucket():
    assert "gs://bucket/run" in str(TrainStore(epath.Path("gs://bucket/run")).directory)
