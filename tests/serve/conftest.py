"""The embedded model behind a server; the engine is loaded once."""

from collections.abc import Iterator

import pytest

from qwq_jax.chat import ChatTokenizer
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.embedded import TINY_REASONER
from qwq_jax.engine.engine import Engine
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.serve import TokenizerCodec
from tests.serve.live import Live, running

ENGINE = EngineConfig(
    decode_window=4,
    max_sequences=8,
    page_size=128,
    max_context=256,
    prefill_chunk=32,
    max_prefill_sequences=4,
    compute_dtype="float32",
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("serve") / "tiny-reasoner"
    convert(str(TINY_REASONER), str(path))
    return str(path)


@pytest.fixture(scope="session")
def tokenizer(checkpoint: str) -> ChatTokenizer:
    return ChatTokenizer.from_directory(checkpoint)


@pytest.fixture(scope="session")
def codec(tokenizer: ChatTokenizer) -> TokenizerCodec:
    return TokenizerCodec(tokenizer, SamplingParams())


@pytest.fixture(scope="session")
def engine(checkpoint: str) -> Engine:
    return Engine.from_checkpoint(checkpoint, mesh=MeshConfig(), config=ENGINE)


@pytest.fixture
def live(engine: Engine, codec: TokenizerCodec) -> Iterator[Live]:
    """A server with room for all; each test leaves every page free."""
    free = engine.scheduler.free_pages
    with running(engine, codec) as server:
        yield server
    assert not engine.busy
    assert engine.scheduler.free_pages == free
