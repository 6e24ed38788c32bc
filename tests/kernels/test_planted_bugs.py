"""The kernels' tests must be able to fail: each of these mistakes, put into a copy of the package, makes them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGED = "tests/kernels/test_paged.py"

FLOATS = "test_kernel_equals_float64 and float32 and on_wait-1"
SCORES = "            scores = row_dot(q, k.astype(q.dtype))\n"
BUGS = {
    "a late wait": (
        "decode.py",
        "            stream.wait(slot, stream.units(now.tile, now.block))\n            pl.when",
        "            pl.when",
        "        pl.when(more)(lambda: stream.advance(part))\n",
        "        pl.when(real)(lambda: stream.wait(slot, stream.units(now.tile, now.block)))\n"
        "        pl.when(more)(lambda: stream.advance(part))\n",
        FLOATS,
    ),
    "an off-by-one page": ("stream.py", "first + index]", "first + index + 1]", FLOATS),
    "positions in 16 bits": (
        "decode.py",
        "left = self.stream.tiles.length[item.tile] - ",
        "left = self.stream.tiles.length[item.tile].astype(jnp.int16).astype(jnp.int32) - ",
        "long_row",
    ),
    "no mask on values": (
        "decode.py",
        "= merge_rows(merged, jnp.zeros_like(new), offset + 1, stream.unit)",
        "= merged",
        FLOATS,
    ),
    "no mask on values of a chunk": ("paged.py", "limits[1], keys)\n", "keys, keys)\n", FLOATS),
    "a wrong scale for one head": (
        "decode.py",
        SCORES,
        SCORES
        + "            scores *= jnp.where(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) == 3, 1.01, 1.0)\n",
        FLOATS,
    ),
}


OFTEN = ("a late wait",)  # of the pipeline, which no other test looks into


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.exhaustive) for name in BUGS]
)
def test_a_planted_bug_is_found(name, tmp_path):
    file, *changes, selection = BUGS[name]
    shutil.copytree(ROOT / "qwq_jax", tmp_path / "qwq_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "qwq_jax" / "kernels" / "attention" / file
    text = path.read_text()
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", PAGED, "-k", selection]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout[-2000:]
    assert "1 failed" in done.stdout, done.stdout[-2000:]
