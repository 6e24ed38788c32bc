"""What is compiled ahead is all that requests of any length need."""

import logging

import pytest

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Request
from qwq_jax.jobs.warm_up import compile_programs, warm_up
from tests.jobs.tiny_checkpoint import make_checkpoint

ENGINE = EngineConfig(page_size=32, max_context=128, prefill_chunk=32, compute_dtype="float32", max_sequences=9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("warm-up"))


@pytest.mark.slow
def test_nothing_is_compiled_when_requests_come(checkpoint: str) -> None:
    engine = Engine.from_checkpoint(checkpoint, mesh=MeshConfig(), config=ENGINE)
    said: list[tuple[int, int]] = []
    count = engine.warm_up(lambda done, total: said.append((done, total)))
    assert said == [(done, count) for done in range(count + 1)] and engine.runner.compiles == count == 3
    params = SamplingParams(max_tokens=30, top_p=0.9, top_k=7, min_p=0.01, logprobs=True)
    for together in (1, 12):  # one row alone, and more than there are
        requests = [Request(f"{i}", tuple(range(1, 2 + 9 * i)), params) for i in range(together)]
        assert len(list(engine.generate(requests))) == together
    assert engine.runner.compiles == count


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_job_says_how_many_how_long_and_where(checkpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qwq_jax"):
        warm_up(checkpoint, engine=ENGINE, mesh=MeshConfig())
    assert caplog.messages[-1].startswith("3 programs ready in ")
    assert "s; compile cache: " in caplog.messages[-1]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_is_ready_is_counted_once(checkpoint: str) -> None:
    engine = Engine.from_checkpoint(checkpoint, mesh=MeshConfig(), config=ENGINE)
    compile_programs(engine)
    before = engine.runner.compiles
    compile_programs(engine)
    assert engine.runner.compiles == before
