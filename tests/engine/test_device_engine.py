"""The engine on devices: the same tokens as transformers, on every mesh, in every batch, with every cache geometry."""

import gc
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.engine import runner
from qwq_jax.engine.engine import Engine
from qwq_jax.engine.request import Completion, Request
from qwq_jax.engine.runner import DeviceRunner
from qwq_jax.engine.step import Program
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import Params, bind, random_params
from qwq_jax.model.spec import model_spec
from qwq_jax.sharding import decode_layout, make_mesh

LENGTHS = (1, 2, 5, 16, 17, 33, 50, 64)
MESHES = [
    MeshConfig(),
    pytest.param(MeshConfig(data=8), marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    pytest.param(MeshConfig(tensor=8), marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    MeshConfig(data=2, fsdp=2, tensor=2),
]


@pytest.fixture(scope="module")
def params(tiny_config: ModelConfig) -> Params:
    """Random parameters with biases and scales off their neutral values, and a spread that makes tokens vary."""
    drawn = random_params(tiny_config, jax.random.key(3))
    shift = lambda i, x: x + 0.3 * jax.random.normal(jax.random.key(i), x.shape)  # noqa: E731
    return {
        path: shift(i, x) if path.endswith(("bias", "scale")) else 5 * x for i, (path, x) in enumerate(drawn.items())
    }


@pytest.fixture(scope="module")
def prompts(tiny_config: ModelConfig) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(11)
    return [tuple(rng.integers(0, tiny_config.vocab_size - 1, length).tolist()) for length in LENGTHS]


def make_engine(config: ModelConfig, params: Params, mesh: MeshConfig = MeshConfig(), **sizes: object) -> Engine:  # noqa: B008
    sizes = {
        "max_sequences": 8,
        "page_size": 32,
        "decode_window": 4,
        "max_context": 96,
        "prefill_chunk": 32,
        "compute_dtype": "float32",
        "max_prefill_sequences": 3,
    } | sizes
    layout = decode_layout(make_mesh(mesh))
    spec = model_spec(config, jnp.float32)
    placed = {path: jax.device_put(x, layout.sharding(spec[path].axes, x.shape)) for path, x in params.items()}
    return Engine(DeviceRunner(config, placed, layout, EngineConfig(**sizes)), config.vocab_size, config.eos_token_ids)


def requests_of(prompts: list[tuple[int, ...]], **params: object) -> list[Request]:
    params = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True} | params
    return [Request(f"r{i}", prompt, SamplingParams(**params)) for i, prompt in enumerate(prompts)]


def tokens_of(completions: list[Completion]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(c.request_id, c.index): c.token_ids for c in completions}


@pytest.fixture(scope="module")
def greedy(tiny_config: ModelConfig, params: Params, prompts: list[tuple[int, ...]]) -> dict:
    return tokens_of(list(make_engine(tiny_config, params).generate(requests_of(prompts))))


@pytest.fixture(scope="module")
def drawn(tiny_config: ModelConfig, params: Params, prompts: list[tuple[int, ...]]) -> dict:
    sampled = requests_of(prompts, temperature=0.9, top_p=0.9, top_k=30, min_p=0.01, n=2)
    return tokens_of(list(make_engine(tiny_config, params).generate(sampled)))


def test_on_a_cpu_the_native_kernel_decodes(tiny_config, params):
    engine = make_engine(tiny_config, params)
    assert "qwq_jax_paged_decode" in engine.runner._lowered(Program(8, 0, 3)).as_text()
    narrow = make_engine(tiny_config, params, cache_dtype="int8")
    assert "qwq_jax_paged_decode" not in narrow.runner._lowered(Program(8, 0, 3)).as_text()


def test_without_a_compiler_the_reference_decodes(tiny_config, params, prompts, greedy, monkeypatch, caplog):
    def none(directory: Path) -> None:
        raise ValueError("no C++ compiler")

    monkeypatch.setattr(runner, "load_native", none)
    assert tokens_of(list(make_engine(tiny_config, params).generate(requests_of(prompts)))) == greedy
    assert "decodes without a kernel of its own" in caplog.text and "no C++ compiler" in caplog.text


def test_greedy_equals_a_full_forward_a_token(
    tiny_config: ModelConfig, params: Params, prompts: list[tuple[int, ...]], greedy: dict
) -> None:
    @jax.jit
    def scores(tokens: jax.Array) -> jax.Array:
        model = bind(tiny_config, params, dtype=jnp.float32)
        positions = jnp.arange(tokens.shape[1])[None]
        return model.logits(model(tokens, positions, causal_attend(None))[0])

    longest = max(LENGTHS) + 12
    for index, prompt in enumerate(prompts):
        tokens = list(prompt)
        for _ in range(12):
            padded = jnp.asarray([tokens + [0] * (longest - len(tokens))])
            tokens.append(int(jnp.argmax(scores(padded)[0, len(tokens) - 1])))
        assert greedy[f"r{index}", 0] == tuple(tokens[len(prompt) :])


def test_greedy_equals_transformers(
    tiny_config: ModelConfig, params: Params, prompts: list[tuple[int, ...]], greedy: dict
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hf = tiny_config.to_huggingface("float32")
    hf.pop("architectures", None)
    model = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in hf.items() if k != "model_type"})).eval()
    model.load_state_dict(_as_torch(tiny_config, params), strict=True)
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=-1,
            )  # fmt: skip
        assert greedy[f"r{index}", 0] == tuple(out[0, len(prompt) :].tolist())


def _as_torch(config: ModelConfig, params: Params) -> dict:
    import torch

    D = config.hidden_size
    tensor = lambda path, *shape: torch.tensor(np.asarray(params[path]).reshape(*shape))  # noqa: E731
    state = {
        "model.embed_tokens.weight": tensor("embed.embedding", -1, D),
        "model.norm.weight": tensor("final_norm.scale", D),
        "lm_head.weight": tensor("head.kernel", -1, D),
    }
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        state[theirs + "input_layernorm.weight"] = tensor(ours + "attention_norm.scale", D)
        state[theirs + "post_attention_layernorm.weight"] = tensor(ours + "mlp_norm.scale", D)
        for name in "qkv":
            state[f"{theirs}self_attn.{name}_proj.weight"] = tensor(f"{ours}attention.{name}_kernel", D, -1).T
            state[f"{theirs}self_attn.{name}_proj.bias"] = tensor(f"{ours}attention.{name}_bias", -1)
        state[theirs + "self_attn.o_proj.weight"] = tensor(ours + "attention.o_kernel", -1, D).T
        state[theirs + "mlp.gate_proj.weight"] = tensor(ours + "mlp.gate_kernel", D, -1).T
        state[theirs + "mlp.up_proj.weight"] = tensor(ours + "mlp.up_kernel", D, -1).T
        state[theirs + "mlp.down_proj.weight"] = tensor(ours + "mlp.down_kernel", -1, D).T
    return state


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh.data}x{mesh.fsdp}x{mesh.tensor}")
def test_every_mesh_gives_the_same_tokens(
    mesh: MeshConfig,
    tiny_config: ModelConfig,
    params: Params,
    prompts: list[tuple[int, ...]],
    greedy: dict,
    drawn: dict,
) -> None:
    engine = make_engine(tiny_config, params, mesh)
    assert tokens_of(list(engine.generate(requests_of(prompts)))) == greedy
    sampled = requests_of(prompts, temperature=0.9, top_p=0.9, top_k=30, min_p=0.01, n=2)
    assert tokens_of(list(engine.generate(sampled))) == drawn


@pytest.mark.parametrize(
    "sizes",
    [
        *(
            pytest.param(sizes, marks=[pytest.mark.slow, pytest.mark.exhaustive])
            for sizes in ({"max_sequences": 1, "max_prefill_sequences": 1}, {"page_size": 4, "prefill_chunk": 7})
        ),
        {"num_pages": 24, "page_size": 4, "prefix_cache": False},
    ],
    ids=str,
)
def test_batch_pages_chunks_and_preemption_do_not_change_tokens(
    sizes: dict, tiny_config: ModelConfig, params: Params, prompts: list[tuple[int, ...]], greedy: dict, drawn: dict
) -> None:
    engine = make_engine(tiny_config, params, **sizes)
    sampled = requests_of(prompts, temperature=0.9, top_p=0.9, top_k=30, min_p=0.01, n=2)
    mixed = [Request(f"s{r.request_id}", r.prompt_token_ids, r.params) for r in requests_of(prompts)]
    got = tokens_of(list(engine.generate([*reversed(sampled), *mixed])))
    assert {key: tokens for key, tokens in got.items() if key in drawn} == drawn
    assert {(name[1:], index): tokens for (name, index), tokens in got.items() if name[0] == "s"} == greedy
    assert bool(engine.scheduler.preemptions) == ("num_pages" in sizes)


def test_logprobs_are_those_of_a_full_forward(
    tiny_config: ModelConfig, params: Params, prompts: list[tuple[int, ...]]
) -> None:
    request = requests_of(prompts[4:5], logprobs=True, top_logprobs=5, temperature=0.7)[0]
    (completion,) = make_engine(tiny_config, params).generate([request])
    model = bind(tiny_config, params, dtype=jnp.float32)
    tokens = jnp.asarray([request.prompt_token_ids + completion.token_ids])
    hidden, _ = model(tokens, jnp.arange(tokens.shape[1])[None], causal_attend(None))
    scores = jax.nn.log_softmax(model.logits(hidden)[0], axis=-1)
    for step, entry in enumerate(completion.logprobs or ()):
        row = scores[len(request.prompt_token_ids) + step - 1]
        # float32 rounding of two orders of summation
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        values, ids = jax.lax.top_k(row, 5)
        assert [token for token, _ in entry.top] == ids.tolist()
        np.testing.assert_allclose([value for _, value in entry.top], values, atol=1e-4)
    assert len(completion.logprobs or ()) == len(completion.token_ids) == 12


def test_each_shape_is_compiled_once(tiny_config: ModelConfig, params: Params, prompts: list[tuple[int, ...]]) -> None:
    engine = make_engine(tiny_config, params)
    list(engine.generate(requests_of(prompts)))
    compiled = engine.runner.compiles
    assert compiled <= 2 * 3
    list(engine.generate(requests_of(prompts)))
    assert engine.runner.compiles == compiled


def test_a_context_beyond_the_model_is_refused(tiny_config: ModelConfig, params: Params) -> None:
    with pytest.raises(ValueError, match="max_context 1024 is beyond the 512 positions"):
        make_engine(tiny_config, params, max_context=1024)


def test_a_cache_that_cannot_hold_one_context_is_refused(tiny_config: ModelConfig, params: Params) -> None:
    with pytest.raises(
        ValueError, match="num_pages holds 64 tokens of cache, fewer .* context of 96: set .*=64 or less"
    ):
        make_engine(tiny_config, params, num_pages=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [MeshConfig(tensor=8), pytest.param(MeshConfig(data=2, tensor=4), marks=pytest.mark.exhaustive)]
)
@pytest.mark.exhaustive
def test_a_vocabulary_that_the_mesh_divides_is_sharded_and_changes_nothing(
    tiny_config: ModelConfig, prompts: list[tuple[int, ...]], mesh: MeshConfig
) -> None:
    even = tiny_config.model_copy(update={"vocab_size": 256, "eos_token_ids": (255,), "tie_word_embeddings": True})
    params = {path: 5 * x for path, x in random_params(even, jax.random.key(4)).items()}
    runs = [make_engine(even, params, each) for each in (MeshConfig(), mesh)]
    spec = runs[1].runner._params["embed.embedding"].sharding.spec
    assert spec[0] == "tensor"
    one, many = (tokens_of(list(engine.generate(requests_of(prompts)))) for engine in runs)
    assert one == many


@pytest.mark.slow
@pytest.mark.exhaustive
def test_log_probabilities_move_with_the_rounding_of_the_cache(
    tiny_config: ModelConfig, params: Params, prompts: list[tuple[int, ...]]
) -> None:
    """int8 keeps a part in 254 of the largest number, float8 a part in 16 or 8 of each: the coarser, the further."""
    requests = requests_of(prompts, max_tokens=1, logprobs=True)

    def first(dtype: str | None) -> dict[str, float]:
        engine = make_engine(tiny_config, params, cache_dtype=dtype)
        return {c.request_id: c.logprobs[0].logprob for c in engine.generate(requests) if c.logprobs}

    exact = first(None)
    moved = [
        np.mean([abs(exact[name] - logprob) for name, logprob in first(dtype).items()])
        for dtype in ("int8", "float8_e4m3fn", "float8_e5m2")
    ]
    assert 0 < moved[0] < moved[1] < moved[2]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.exhaustive)])
@pytest.mark.exhaustive
def test_an_8_bit_cache_answers_alike_whatever_its_pages(
    tiny_config: ModelConfig, params: Params, prompts: list[tuple[int, ...]], dtype: str
) -> None:
    runs = [{"page_size": 16}, {"page_size": 32, "max_sequences": 3}, {"page_size": 96, "prefill_chunk": 64}]
    answers = [
        tokens_of(list(make_engine(tiny_config, params, cache_dtype=dtype, **run).generate(requests_of(prompts))))
        for run in runs
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.slow
def test_tokens_drawn_at_guesses_follow_the_exact_distribution(tiny_config: ModelConfig, params: Params) -> None:
    """Chi-square of the token after a guess, accepted or not, at temperature 1."""
    stats = pytest.importorskip("scipy.stats")
    prompt = (11, 12, 13) * 5
    sizes = {"max_sequences": 32, "num_pages": 64, "prefill_chunk": 512, "max_prefill_sequences": 32}
    engine = make_engine(tiny_config, params, draft_tokens=3, **sizes)
    # The bias makes the first token continue the pattern, so that the second is guessed: 12, after 13, 11.
    settings = {"max_tokens": 3, "temperature": 1.0, "n": 128, "ignore_eos": True}
    requests = [
        Request(f"r{i}", prompt, SamplingParams(**settings, logit_bias={11: 8.0, 12: 2.0}, seed=i)) for i in range(5)
    ]
    seconds = [c.token_ids[1] for c in engine.generate(requests) if c.token_ids[0] == 11]
    assert engine.stats.drafted_tokens > 300 and len(seconds) > 300
    model = bind(tiny_config, params, dtype=jnp.float32)
    tokens = jnp.asarray([(*prompt, 11)])
    hidden, _ = model(tokens, jnp.arange(tokens.shape[1])[None], causal_attend(None))
    scores = np.asarray(model.logits(hidden)[0, -1], np.float64)
    scores[11] += 8.0
    scores[12] += 2.0
    exact = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    order = np.argsort(-exact)
    frequent = order[: int(np.sum(exact * len(seconds) >= 8))]
    counts = np.asarray([seconds.count(int(token)) for token in frequent])
    expected = exact[frequent] * len(seconds)
    counts, expected = (np.append(x, len(seconds) - x.sum()) for x in (counts, expected))
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_replaced_weights_answer_as_an_engine_that_began_with_them(tiny_config, params, prompts, greedy) -> None:
    """Also where the cache holds the beginning of the prompt, as the old weights computed it."""
    other = {path: (1.5 if path.endswith("down_kernel") else 1.0) * x for path, x in params.items()}
    engine = make_engine(tiny_config, params)
    assert tokens_of(list(engine.generate(requests_of(prompts)))) == greedy
    layout, spec = engine.runner._layout, model_spec(tiny_config, jnp.float32)  # pyright: ignore
    placed = {path: jax.device_put(x, layout.sharding(spec[path].axes, x.shape)) for path, x in other.items()}
    engine.replace_weights(placed)
    expected = tokens_of(list(make_engine(tiny_config, other).generate(requests_of(prompts))))
    assert tokens_of(list(engine.generate(requests_of(prompts)))) == expected != greedy
    engine.add(requests_of(prompts)[0])
    with pytest.raises(ValueError, match="being answered"):
        engine.replace_weights(placed)


def test_a_released_engine_holds_no_memory_until_it_has_weights_again(tiny_config, params, prompts, greedy) -> None:
    engine = make_engine(tiny_config, params)
    layout, spec = engine.runner._layout, model_spec(tiny_config, jnp.float32)  # pyright: ignore
    list(engine.generate(requests_of(prompts)))
    held = [weakref.ref(array) for array in jax.tree.leaves((engine.runner._params, engine.runner._cache))]  # pyright: ignore
    compiled = engine.runner.compiles
    engine.release()
    gc.collect()
    assert len(held) > tiny_config.num_layers and not any(array() is not None for array in held)
    engine.replace_weights(
        {path: jax.device_put(x, layout.sharding(spec[path].axes, x.shape)) for path, x in params.items()}
    )
    assert tokens_of(list(engine.generate(requests_of(prompts)))) == greedy and engine.runner.compiles == compiled


@pytest.mark.slow
def test_rows_that_close_ranks_keep_their_tokens(
    tiny_config: ModelConfig, params: Params, prompts: list[tuple[int, ...]]
) -> None:
    """The last of twelve answer longest, and move to lower rows with tokens that only the devices know."""
    requests = [
        Request(f"r{i}", prompt, SamplingParams(max_tokens=12 + 2 * i, temperature=0.0, ignore_eos=True))
        for i, prompt in enumerate([*prompts[:6], *prompts[:6]])
    ]
    few = tokens_of(list(make_engine(tiny_config, params).generate(requests)))
    engine = make_engine(tiny_config, params, max_sequences=12, max_prefill_sequences=12, prefill_chunk=128)
    assert tokens_of(list(engine.generate(requests))) == few
    assert isinstance(engine.runner, DeviceRunner)
    assert {program.decode_rows for program in engine.runner._programs} == {8, 12}
