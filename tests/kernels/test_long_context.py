"""Rounding at 131,072 tokens: float32 sums must not lose what float64 keeps, whatever the size of the blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qwq_jax.kernels.attention import flash
from qwq_jax.kernels.attention.flash import Sizes, flash_forward
from qwq_jax.kernels.attention.ragged import ragged_attention
from qwq_jax.kernels.attention.steps import Steps, plan_steps
from qwq_jax.kernels.attention.stream import PagedSizes
from qwq_jax.kernels.attention.work import find_work
from tests.kernels.ragged_batches import brute_force, make_batch

LENGTH = 131_072
# float32: a few roundings of 2^-24, on outputs of size 1. bfloat16: half of its last place, 2^-9, below 2.
BOUND = {"float32": 1e-5, "bfloat16": 4e-3}

pytestmark = pytest.mark.slow


@pytest.fixture
def wide_products(monkeypatch):
    """Products of bfloat16 as float32: exactly what they are on TPU, and thirty times as fast on a CPU."""
    original = flash.contract
    wide = lambda a, b, *dims: original(a.astype(jnp.float32), b.astype(jnp.float32), *dims)  # noqa: E731
    monkeypatch.setattr(flash, "contract", wide)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.exhaustive)])
def test_one_decoded_token(rng, dtype, wide_products):
    batch = make_batch(rng, [(LENGTH - 1, True)], [], heads=(5, 1), page=128, H=128, dtype=dtype)
    inputs = [jnp.asarray(x, dtype) for x in (batch.q, batch.k, batch.v)]
    # The reference sees the query as it was rounded.
    kv = np.asarray(batch.layer.kv[0].astype(jnp.float32))[np.asarray(batch.rows.page_table[0])]
    old = kv.swapaxes(0, 1).reshape(2, -1, 1, 128)[:, : LENGTH - 1]
    full = [np.concatenate([o, x.astype(jnp.float32)]) for o, x in zip(old, inputs[1:], strict=True)]
    want, _ = brute_force(inputs[0].astype(jnp.float32), *full, np.ones((1, LENGTH), bool))
    errors = []
    for block in (1024, 4096):
        sizes = {"decode": PagedSizes(1, block), "prefill": PagedSizes(8, block)}
        work = find_work(batch.rows, batch.layer, tokens=1, decode_rows=1, max_query=0, **sizes)
        interpret = pltpu.InterpretParams(uninitialized_memory="nan")
        run = functools.partial(ragged_attention, scale=128**-0.5, interpret=interpret)
        out = jax.jit(run)(*inputs, batch.layer, work).out
        errors.append(np.abs(np.asarray(out, np.float64) - want).max())
    assert np.abs(want).max() > 0.01
    assert max(errors) < BOUND[dtype]


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        *((dtype, Sizes(512, 2048, 512)) for dtype in BOUND),
        ("float32", Sizes(128, 1024, 256)),
        pytest.param("bfloat16", Sizes(128, 1024, 256), marks=pytest.mark.exhaustive),
    ],
)
def test_last_queries_of_a_row(rng, dtype, sizes, wide_products, monkeypatch):
    """The kernel itself, given only the visits of the last block of queries: all of them would take an hour here."""

    def last_visits(*args, **kwargs):
        steps = plan_steps(*args, **kwargs)
        keep = steps.outer[0, 0] == steps.outer.max()
        return Steps(*(x[..., keep] for x in steps))

    monkeypatch.setattr(flash, "plan_steps", last_visits)
    q, k, v = (jnp.asarray(rng.standard_normal((1, LENGTH, 1, 128)), dtype) for _ in range(3))
    out, _ = jax.jit(functools.partial(flash_forward, scale=128**-0.5, sizes=sizes, interpret=True))(q, k, v, None)
    rows = LENGTH - 1 - np.array([0, 17, sizes.block_q - 1])
    visible = np.arange(LENGTH)[None] <= rows[:, None]
    want, _ = brute_force(*(x.astype(jnp.float32) for x in (q[0, rows], k[0], v[0])), visible)
    error = np.abs(np.asarray(out[0, rows], np.float64) - want)
    assert error.max() < BOUND[dtype]
