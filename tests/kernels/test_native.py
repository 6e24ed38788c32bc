"""Decode attention by the kernel that is compiled for this CPU: against float64, with NaN in all unused memory."""

import functools
import os
import shutil
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_jax.kernels.attention import Implementation, Target, attention, load_native, native, paged_attention
from qwq_jax.runtime import cache_directory
from tests.kernels.ragged_batches import check, make_batch

# Scores reach 20, and float32 rounds them by 1e-6: that much of a probability, and of outputs of size 4.
TOLERANCE = 2e-5


@pytest.fixture(scope="module", autouse=True)
def loaded():
    load_native(cache_directory() / "native")


@functools.partial(jax.jit, static_argnames=("decode_rows", "max_query"))
def run(q, k, v, layer, rows, *, decode_rows, max_query):
    how = {"decode_rows": decode_rows, "max_query": max_query, "implementation": Implementation.NATIVE}
    return paged_attention(q, k, v, layer, rows, scale=q.shape[2] ** -0.5, **how)


def serve(batch):
    counts = {"decode_rows": batch.decode_rows, "max_query": batch.max_query}
    return run(batch.q, batch.k, batch.v, batch.layer, batch.rows, **counts)


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


def test_scores_far_apart(rng):
    """Weights from 1 to what float32 cannot hold, in an order that raises the running maximum and in one that does not.

    Scores of size 1,000 are rounded by 1e-4, and what is weighed by them is of size 1.
    """
    for order in (1, -1):
        batch = make_batch(rng, [(0, True), (700, True)], [], heads=(3, 1), page=32, H=16)
        slots = np.arange(batch.layer.kv.shape[1] * 32)[::order]
        ramp = jnp.asarray(np.linspace(-40, 40, slots.size)[slots].reshape(1, -1, 32, 1), jnp.float32)
        layer = batch.layer._replace(kv=batch.layer.kv.at[:, :, 0].multiply(ramp))
        how = {"scale": 0.25, "decode_rows": 2, "max_query": 0}
        want = paged_attention(
            batch.q, batch.k, batch.v, layer, batch.rows, **how, implementation=Implementation.REFERENCE
        )
        got = paged_attention(batch.q, batch.k, batch.v, layer, batch.rows, **how, implementation=Implementation.NATIVE)
        np.testing.assert_allclose(got.out, want.out, atol=1e-3)
        np.testing.assert_allclose(got.lse, want.lse, rtol=1e-5)


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
    devices = jax.devices()

    def repeat(device):
        mine = jax.device_put(batch.layer, device)
        arguments = jax.device_put((batch.q, batch.k, batch.v), device)
        rows = jax.device_put(batch.rows, device)
        for _ in range(20):
            got = run(*arguments, mine, rows, decode_rows=batch.decode_rows, max_query=0)
            np.testing.assert_array_equal(got.out, want.out)

    with ThreadPoolExecutor(len(devices)) as pool:
        for future in [pool.submit(repeat, device) for device in devices]:
            future.result(timeout=120)


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
