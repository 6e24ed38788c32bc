"""The engine's view of its cache, traced for chips that are only described."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.jobs.plan_worker import described_devices
from qwq_jax.model.attention import PagedBatch, paged_attend
from qwq_jax.model.cache import abstract_layer, cache_spec
from qwq_jax.plan.chips import parse_topology
from qwq_jax.sharding import decode_layout, make_mesh

pytest.importorskip("libtpu", reason="tracing for TPU needs libtpu, which is for Linux on x86-64 only")
DECODED, CHUNKS, TOKENS, PAGES = 4, 2, 36, 16


@pytest.mark.filterwarnings("ignore")  # libtpu looks for the machine it is on, and says that there is none
@pytest.mark.parametrize(("tensor", "dtype"), [(2, "bfloat16"), (4, "int8")], ids=["", "kv heads shared, 8 bits"])
def test_what_layers_have_in_common_is_done_once_a_step(monkeypatch, tiny_config, tensor, dtype):
    """A compiler need not see that all layers do the same: libtpu does not for tpu7x."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    one, three = (Counter(primitives(trace_layers(tiny_config, count, tensor, dtype))) for count in (1, 3))
    bookkeeping = ("cumsum", "cummin", "scan", "while", "argmax", "scatter", "rem")
    assert {name: three[name] for name in bookkeeping} == {name: one[name] for name in bookkeeping}
    assert all(one[name] for name in ("cumsum", "cummin", "scatter", "rem"))
    assert (one["pallas_call"], three["pallas_call"]) == (3, 9)


def trace_layers(model: ModelConfig, count: int, tensor: int, dtype: str) -> Any:
    """A step with chunks of prompts that sees the cache of one layer `count` times."""
    devices = described_devices(parse_topology("tpu7x:2x2x1"))[: 2 * tensor]
    layout = decode_layout(make_mesh(MeshConfig(data=2, tensor=tensor), devices))
    N, K, H, rows = model.num_heads, model.num_kv_heads, model.head_dim, DECODED + CHUNKS
    spec = cache_spec(model, layout, replicas=2, pages=PAGES, page_size=128, dtype=dtype)

    def step(batch: PagedBatch, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> Any:
        attend = paged_attend(layout, batch, decode_rows=DECODED, max_query=32, heads=N, layer=cache)
        for _ in range(count):
            q, cache = attend(q, k, v, cache)
        return q, cache

    numbers = ((2, rows, PAGES), (2, rows), (2, rows + 1), (2, TOKENS))
    described: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in numbers]
    batch = PagedBatch(*described)
    q, k, v = (jax.ShapeDtypeStruct((2, TOKENS, heads, H), jnp.bfloat16) for heads in (N, K, K))
    return jax.make_jaxpr(step)(batch, q, k, v, abstract_layer(spec, layout)).jaxpr


def primitives(jaxpr: Any) -> Iterator[str]:
    """Names of all operations, those within others too, but not those of a kernel."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if equation.primitive.name != "pallas_call":
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)  # closed or not
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)
