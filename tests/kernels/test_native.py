"""Decode attention by the kernel that is compiled for this CPU: against float64, with NaN in all unused memory."""

import functools
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_jax.kernels.attention import (
    Implementation,
    PagedLayer,
    Target,
    attention,
    load_native,
    native,
    paged_attention,
)
from qwq_jax.runtime import cache_directory
from tests.kernels.ragged_batches import check, make_batch

# Scores reach 20, and float32 rounds them by 1e-6: that much of a probability, and of outputs of size 4.
TOLERANCE = 2e-5


@pytest.fixture(scope="module", autouse=True)
def loaded():
    if not any(map(shutil.which, native.COMPILERS)):
        pytest.skip("no C++ compiler, so that there is no kernel either")
    load_native(cache_directory() / "native")


@functools.partial(jax.jit, static_argnames=("decode_rows", "max_query"))
def run(q, k, v, layer, rows, *, decode_rows, max_query):
    how = {"decode_rows": decode_rows, "max_query": max_query, "implementation": Implementation.NATIVE}
    return paged_attention(q, k, v, layer, rows, scale=q.shape[2] ** -0.5, **how)


def serve(batch):
    counts = {"decode_rows": batch.decode_rows, "max_query": batch.max_query}
    result = run(batch.q, batch.k, batch.v, batch.layer, batch.rows, **counts)
    empty = np.flatnonzero(batch.rows.kv_length[: batch.decode_rows] == 0)
    assert not np.asarray(result.out)[empty].any() and np.isfinite(np.asarray(result.lse)[empty]).all()
    return result


# Lengths at the borders of vectors, pages and units (512 tokens), rows of several units, and empty ones.
DECODE = [(0, True), (14, True), (15, True), (16, True), (0, False), (63, True), (511, True), (512, True), (1700, True)]


@pytest.mark.parametrize(("H", "page"), [(8, 16), (16, 64), (64, 1024), (72, 16), (128, 64)])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (9, 3), (4, 1), (5, 1), (7, 1), (10, 1)])
def test_kernel_equals_float64(rng, heads, H, page):
    batch = make_batch(rng, DECODE, [], heads=heads, page=page, H=H)
    check(batch, serve(batch), TOLERANCE)


def test_beside_chunks_of_prompts(rng):
    batch = make_batch(rng, DECODE, [(0, 20), (90, 7), (0, 0)], heads=(9, 3), page=16, H=64)
    check(batch, serve(batch), TOLERANCE)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    decode=st.lists(st.tuples(st.integers(0, 900), st.booleans()), min_size=6, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_raggedness(decode, seed):
    batch = make_batch(np.random.default_rng(seed), decode, [], heads=(6, 2), page=32, H=32, width=29)
    check(batch, serve(batch), TOLERANCE)


@pytest.mark.parametrize("order", [1, -1])
def test_scores_far_apart(order):
    """Weights from 1 to what float32 cannot hold, while the running maximum rises with each page, or never again."""
    page, W, H = 32, 22, 16
    positions = np.arange(page * W).reshape(W, page)[::order]
    scores = np.linspace(0, 300, page * W, dtype=np.float32)[positions]
    kv = np.ones((1, W, 2, page, H), np.float32)
    kv[0, :, 0], kv[0, :, 1] = scores[..., None], positions[..., None]
    q, table = jnp.full((1, 1, H), 1 / H), jnp.arange(W, dtype=jnp.int32)[None]
    out, lse = native.attend_decode(q, PagedLayer(jnp.asarray(kv)), table, jnp.asarray([page * W], jnp.int32), 1.0)
    flat = scores.astype(np.float64).ravel()
    weights = np.exp(flat - flat.max())
    # Scores of 300 are rounded by 1e-5, and so are weights; positions are up to 700.
    np.testing.assert_allclose(out[0, 0], np.full(H, weights @ positions.ravel() / weights.sum()), atol=0.02)
    np.testing.assert_allclose(lse[0, 0], flat.max() + np.log(weights.sum()), atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["query", "first key", "later key"])
def test_what_is_not_a_number_stays_so(rng, where, bad):
    """As in the reference: an overflow that vanished would be a wrong answer."""
    kv = rng.standard_normal((1, 3, 2, 32, 16)).astype(np.float32)
    q = rng.standard_normal((1, 2, 16)).astype(np.float32)
    if where == "query":
        q[0, 1, 3] = bad
    else:
        kv[0, 1, 0, 0 if where == "first key" else 9, 3] = bad
    rows = jnp.arange(3, dtype=jnp.int32)[None], jnp.asarray([70], jnp.int32)
    for x in native.attend_decode(jnp.asarray(q), PagedLayer(jnp.asarray(kv)), *rows, 0.25):
        assert np.isnan(x[0, 1]).all()


def test_a_row_has_the_same_bits_whatever_is_beside_it(rng):
    batch = make_batch(rng, DECODE, [], heads=(9, 3), page=64, H=64)
    call = jax.jit(lambda *of_rows: native.attend_decode(of_rows[0], batch.layer, *of_rows[1:], 0.125))
    # The new token's place is NaN until it is appended, and each row is looked at as far as before it.
    length = jnp.maximum(batch.rows.kv_length - 1, 0)
    together = call(batch.q, batch.rows.page_table, length)
    for b in range(len(DECODE)):
        alone = call(*(x[b : b + 1] for x in (batch.q, batch.rows.page_table, length)))
        for one, all_ in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one[0], all_[b])


def test_calls_at_the_same_time_on_many_devices_all_end(rng):
    """A call shares its work with the pool's threads and waits for none that may be waiting itself."""
    batch = make_batch(rng, DECODE * 4, [], heads=(9, 3), page=64, H=64)
    want = serve(batch)
    equal: list[bool] = []

    def repeat(device):
        mine = jax.device_put(batch.layer, device)
        arguments = jax.device_put((batch.q, batch.k, batch.v), device)
        rows = jax.device_put(batch.rows, device)
        for _ in range(20):
            got = run(*arguments, mine, rows, decode_rows=batch.decode_rows, max_query=0)
            equal.append(np.array_equal(got.out, want.out) and not np.isnan(got.out).any())

    # Threads that hang must not keep the process.
    threads = [threading.Thread(target=repeat, args=(device,), daemon=True) for device in jax.devices()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(equal) == 20 * len(threads) and all(equal)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_other_caches_are_refused(rng, dtype):
    batch = make_batch(rng, [(3, True)], [], heads=(2, 1), page=16, dtype=dtype)
    with pytest.raises(ValueError, match=f"float32 on a CPU, not for float32 and {dtype} in the cache on cpu"):
        serve(batch)


def test_other_platforms_and_dense_attention_are_refused(rng):
    batch = make_batch(rng, [(3, True)], [], heads=(2, 1), page=16)
    how = {"scale": 1.0, "decode_rows": 1, "max_query": 0, "implementation": Implementation.NATIVE}
    with pytest.raises(ValueError, match="on gpu"):
        paged_attention(batch.q, batch.k, batch.v, batch.layer, batch.rows, **how, target=Target("gpu", "NVIDIA H100"))
    x = jnp.zeros((1, 4, 2, 16))
    with pytest.raises(ValueError, match="native has no dense attention"):
        attention(x, x, x, scale=1.0, implementation=Implementation.NATIVE)


def test_shapes_of_different_batches_are_refused(rng):
    batch = make_batch(rng, [(3, True), (5, True)], [], heads=(2, 1), page=16, H=16)
    table, length = batch.rows.page_table, batch.rows.kv_length
    for arguments in (
        (batch.q[..., :8], batch.layer, table, length),
        (batch.q, batch.layer, table[:1], length),
        (batch.q, batch.layer, table, length[:1]),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="not of one batch"):
            jax.block_until_ready(native.attend_decode(*arguments, 1.0))


def test_another_directory_is_not_needed_once_it_is_known(tmp_path):
    load_native(tmp_path / "elsewhere")
    assert native.is_loaded() and not (tmp_path / "elsewhere").exists()


def test_before_it_is_known_it_is_refused(rng, monkeypatch):
    monkeypatch.setattr(native, "_LOADED", threading.Event())
    batch = make_batch(rng, [(3, True)], [], heads=(2, 1), page=16, H=24)
    with pytest.raises(ValueError, match="load_native comes first"):
        serve(batch)


def test_a_library_that_does_not_load_is_made_again(tmp_path):
    """In a process of its own, since a process knows the kernel once."""
    library = native.compile_into(tmp_path)
    library.write_bytes(b"cut off")
    program = (
        "import pathlib, sys; from qwq_jax.kernels.attention import native; native.load(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)
    assert len(library.read_bytes()) > 1000


def test_it_is_compiled_once(tmp_path):
    first = native.compile_into(tmp_path / "new")
    made = first.stat().st_mtime_ns
    assert native.compile_into(tmp_path / "new") == first and first.stat().st_mtime_ns == made
    assert list(first.parent.iterdir()) == [first]


def test_a_machine_without_a_compiler_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no C\+\+ compiler: none of c\+\+, g\+\+, clang\+\+ is on the path"):
        native.compile_into(tmp_path / "new")


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    broken = tmp_path / "c++"
    broken.write_text(f"#!{shutil.which('sh')}\necho 'x.cc:1:1: error: no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"c\+\+ does not compile paged_decode.cc: .*no such header"):
        native.compile_into(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_the_source_is_in_the_package():
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["qwq_jax"]
    files = {path for pattern in patterns for path in (root / "qwq_jax").glob(pattern)}
    assert Path(native.__file__).with_name("paged_decode.cc") in files
