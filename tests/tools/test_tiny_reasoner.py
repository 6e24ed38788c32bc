"""The embedded model is what it is said to be, and is never lost on the way to a new one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qwq_jax.embedded import TINY_REASONER
from qwq_jax.jobs.convert import convert
from tools.score_tiny_reasoner import score

ROOT = Path(__file__).parents[2]


def test_it_is_small():
    assert sum(path.stat().st_size for path in TINY_REASONER.rglob("*")) <= 8_000_000


@pytest.mark.slow
@pytest.mark.exhaustive
def test_it_solves_about_half_of_problems_it_has_never_seen(tmp_path):
    convert(str(TINY_REASONER), str(tmp_path / "checkpoint"))
    result = score(str(tmp_path / "checkpoint"), 512)
    assert len(result.marks) == 512 and all(result.marks)
    assert 0.30 <= result.pass_at_1 <= 0.60


@pytest.mark.parametrize("exported", [True, False])
def test_the_shipped_model_goes_only_when_the_new_one_is_whole(tmp_path, exported):
    """The recipe in a copy of its surroundings, with programs that do nothing but write, or fail to."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shipped = tmp_path / "qwq_jax" / "embedded" / "tiny-reasoner"
    (tmp_path / "out" / "tiny-reasoner" / "run" / "model-000750").mkdir(parents=True)
    for path in (shipped, tmp_path / "tools", tmp_path / "bin"):
        path.mkdir(parents=True)
    (shipped / "config.json").write_text("old")
    for name in ("requirements.lock", "pyproject.toml", "tools/install.sh", "installed"):
        (tmp_path / name).touch()
    programs = {
        "python": "",
        "qwq-jax": f"[ $1 = sft ] || {{ mkdir -p $3; echo new > $3/config.json; {'true' if exported else 'false'}; }}",
    }
    for name, script in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    command = ["make", "tiny-reasoner", "BIN=bin", "INSTALLED=installed"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is exported, done.stdout + done.stderr
    assert (shipped / "config.json").read_text().strip() == ("new" if exported else "old")
