"""One property: how the engine works changes no token. On devices, drawn at random, against one plain engine.

Requests of every kind (greedy, drawn, penalised, biased, bounded, masked) are answered by one engine that draws a token
a step for one sequence at a time and shares nothing. Then by others, of other meshes, pages, chunks, windows, guesses
and orders, with and without the prefix cache, whose caches are too small for what they are asked.
"""

import jax
import numpy as np
import pytest

from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine.request import Hooks, Request
from qwq_jax.engine.thoughts import ThinkingTokens
from qwq_jax.model.params import Params, random_params
from tests.engine.test_device_engine import make_engine, tokens_of

VOCAB = 257
MARKS = ThinkingTokens(close=200, closing=(201, 202, 200), continuation=(203, 204))
KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "n": 2},
    {"temperature": 1.0},
    {"temperature": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    {"temperature": 1.2, "top_p": 0.7, "logit_bias": {"7": 4.0, "9": -100.0}, "min_tokens": 6},
    {"temperature": 0.0, "max_thinking_tokens": 5},
    {"temperature": 1.0, "min_thinking_tokens": 9, "logprobs": True, "top_logprobs": 2},
)


class MultiplesOfThree:
    """A mask over the tiny vocabulary."""

    active = True

    def fill(self, bits: np.ndarray) -> None:
        allowed = np.zeros(len(bits) * 32, np.uint8)
        allowed[:VOCAB:3] = 1
        bits[:] = np.packbits(allowed, bitorder="little").view(np.uint32)

    def push(self, token_id: int) -> None:
        assert token_id % 3 == 0


def hooks(request: Request) -> Hooks:
    return Hooks(mask=MultiplesOfThree()) if request.request_id.startswith("masked") else Hooks()


@pytest.fixture(scope="module")
def params(tiny_config: ModelConfig) -> Params:
    drawn = random_params(tiny_config, jax.random.key(5))
    return {path: 5 * x if path.endswith(("kernel", "embedding")) else x for path, x in drawn.items()}


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = np.random.default_rng(3)
    common = rng.integers(0, 250, 40).tolist()
    made = []
    for index in range(16):
        kind = KINDS[index % len(KINDS)]
        prompt = [*common[: int(rng.integers(0, 40))], *rng.integers(0, 250, int(rng.integers(1, 20))).tolist()]
        if index % 3 == 0:
            prompt = (prompt * 3)[:60]  # something to look up
        body = {"max_tokens": int(rng.integers(10, 24)), **kind}
        marks = MARKS if {"max_thinking_tokens", "min_thinking_tokens"} & kind.keys() else None
        name = f"masked{index}" if index in (2, 9) else f"r{index}"
        made.append(Request(name, tuple(prompt), SamplingParams.from_openai(body), thinking=marks))
    return made


@pytest.fixture(scope="module")
def plain(tiny_config: ModelConfig, params: Params, requests: list[Request]) -> dict:
    sizes = {"max_sequences": 1, "max_prefill_sequences": 1, "prefix_cache": False, "decode_window": 1}
    return tokens_of(list(make_engine(tiny_config, params, **sizes, prefill_chunk=64).generate(requests, hooks)))


def check(seed: int, tiny_config: ModelConfig, params: Params, requests: list[Request], plain: dict) -> None:
    rng = np.random.default_rng(seed)
    meshes = [MeshConfig(), MeshConfig(data=2, tensor=2), MeshConfig(tensor=8), MeshConfig(data=4)]
    page = int(rng.choice([4, 8, 16]))
    sizes = {
        "page_size": page,
        "num_pages": int(rng.choice([104, 160, 400])) // page,
        "prefill_chunk": int(rng.choice([7, 32])),
        "decode_window": int(rng.choice([2, 5, 16])),
        "draft_tokens": int(rng.choice([0, 3])),
        "prefix_cache": bool(rng.integers(2)),
        "max_sequences": int(rng.choice([3, 8])),
    }
    engine = make_engine(tiny_config, params, meshes[int(rng.integers(len(meshes)))], **sizes)
    order = [requests[index] for index in rng.permutation(len(requests))]
    assert tokens_of(list(engine.generate(order, hooks))) == plain
    assert engine.scheduler.free_pages == (engine.runner.shape.num_pages,) * engine.runner.shape.replicas
    assert engine.stats.accepted_tokens > 0 or not sizes["draft_tokens"]
    assert engine.stats.shared_tokens > 0 or not sizes["prefix_cache"]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [24, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (6, 14, 20))])
def test_no_way_of_working_changes_a_token(
    seed: int, tiny_config: ModelConfig, params: Params, requests: list[Request], plain: dict
) -> None:
    check(seed, tiny_config, params, requests, plain)
