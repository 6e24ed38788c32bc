"""The kernels' tests must be able to fail: each of these mistakes, put into a copy of the package, makes them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGED = "tests/kernels/test_paged.py"

BUGS = {
    "a late wait": (
        "paged.py",
        "            stream.wait(slot, stream.units(tile, j))\n",
        "            late = stream.units(tile, j)\n",
        "        jax.lax.fori_loop(begin, end, one_block, None)\n",
        "        jax.lax.fori_loop(begin, end, one_block, None)\n        jax.lax.fori_loop(begin, end, lambda j, _: "
        "stream.wait(rem(first_item + j, sizes.depth), stream.units(tile, j)), None)\n",
        "test_kernel_equals_float64 and on_wait",
    ),
    "an off-by-one page": (
        "stream.py",
        "block * pages + index]",
        "block * pages + index + 1]",
        "test_kernel_equals_float64 and on_wait",
    ),
    "positions in 16 bits": (
        "paged.py",
        "visible = (key <= query) & (key < length)",
        "key = key.astype(jnp.int16).astype(jnp.int32)\n                    visible = (key <= query) & (key < length)",
        "long_row",
    ),
    "no mask on values": (
        "paged.py",
        "limits[1], keys)\n",
        "keys, keys)\n",
        "test_kernel_equals_float64 and on_wait",
    ),
    "a wrong scale for one head": (
        "paged.py",
        "    scores = row_dot(q, k.astype(q.dtype))\n",
        "    scores = row_dot(q, k.astype(q.dtype))\n"
        "    scores = scores * jnp.where(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) == 3, 1.01, 1.0)\n",
        "test_kernel_equals_float64 and on_wait",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
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
