"""Reward models: parity with transformers both ways, scores that no packing or mesh changes, and a reward recovered."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen2ForSequenceClassification

from qwq_jax.__main__ import main
from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint.store import open_checkpoint, read_param
from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.preference import BradleyTerryConfig
from qwq_jax.config.rewards import RewardModelConfig
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.export import export
from qwq_jax.model.lora import random_adapters
from qwq_jax.model.params import random_params, stack
from qwq_jax.rl.learner import Rows, make_scorer
from qwq_jax.rl.pair_training import pairs_of
from qwq_jax.rl.preference_data import PairOfSegments, scored_segment
from qwq_jax.rl.reward_model import (
    HEAD,
    RewardModelScorer,
    make_reward_loss,
    make_values,
    reading_file,
    reward_weights,
    with_scalar_head,
)
from qwq_jax.sharding import make_mesh, train_layout
from qwq_jax.train.batch import place_batch
from qwq_jax.train.packing import Segment
from qwq_jax.train.step import accumulate_gradients
from qwq_jax.train.stream import one_pass
from qwq_jax.train.weights import companion_files, stacked_shardings, write_checkpoint
from tests.rl.fitting import SMALL, fit, one_device
from tests.sft.chat_directory import PLAIN, THINKING, VOCABULARY, write_tokenizer

MODEL = SMALL.model_copy(update={"vocab_size": VOCABULARY, "num_layers": 2, "pad_token_id": 0, "eos_token_ids": (258,)})
EIGHT = MeshConfig(data=2, fsdp=2, tensor=2)


def random_reward_model(config: ModelConfig, seed: int = 1) -> dict[str, jax.Array]:
    """Stacked, with biases and scores that are far from zero."""
    values = stack(random_params(with_scalar_head(config), jax.random.key(seed)), config.num_layers)
    noise = {name: 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, (name, x) in enumerate(values.items())}
    return {name: x + noise[name] * (10 if name == HEAD else 1) for name, x in values.items()}


def write(directory: Path, config: ModelConfig, params, *, template=PLAIN, files=None) -> str:
    tokenizer = write_tokenizer(directory / "tokenizer", template)
    path = str(directory / "checkpoint")
    companions = {**companion_files(str(tokenizer)), **(files or {})}
    write_checkpoint(path, params, config, dtype="float32", files=companions, identity="1", origin="a test")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward-model")
    files = reading_file(BradleyTerryConfig(thoughts=False))
    return write(directory, with_scalar_head(MODEL), random_reward_model(MODEL), files=files)


@pytest.fixture(scope="module")
def exported(checkpoint):
    path = Path(checkpoint).parent / "exported"
    export(checkpoint, str(path))
    return path


@pytest.fixture(scope="module")
def conversations():
    """Prompts and replies of ragged lengths; no token is the one that fills up rows."""
    rng = np.random.default_rng(4)
    return [tuple(rng.integers(1, VOCABULARY, n).tolist() for n in rng.integers(1, 16, 2)) for _ in range(13)]


def huggingface_scores(model, conversations) -> np.ndarray:
    width = max(len(prompt) + len(reply) for prompt, reply in conversations)
    padded = torch.tensor([[*p, *r] + [0] * (width - len(p) - len(r)) for p, r in conversations])
    with torch.no_grad():
        return model(padded, attention_mask=(padded != 0).long()).logits[:, 0].numpy()


def opened(path, *, mesh=None, row_length=64, policy=None, **config) -> RewardModelScorer:
    layout = train_layout(make_mesh(mesh or MeshConfig()))
    policy = policy or ChatTokenizer.from_directory(Path(path).parent / "tokenizer")
    rows = Rows(row_length, 4, layout)
    config = RewardModelConfig(checkpoint=str(path), **config)
    return RewardModelScorer.open(config, rows, policy=policy, compute_dtype="float32")


@pytest.mark.slow
def test_the_export_is_a_reward_model_to_transformers_and_scores_the_same(checkpoint, exported, conversations):
    model = AutoModelForSequenceClassification.from_pretrained(exported, dtype=torch.float32).eval()
    assert isinstance(model, Qwen2ForSequenceClassification) and model.config.num_labels == 1
    theirs = huggingface_scores(model, conversations)
    assert theirs.std() > 0.5
    scorer = opened(checkpoint, row_length=32)
    ours = scorer.scores(conversations)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # Four rows of 32 slots do not take 13 conversations: there are several micro-batches, and none knows of another.
    backwards = scorer.scores(conversations[::-1])
    np.testing.assert_allclose(backwards[::-1], ours, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([scorer.scores([each]) for each in conversations]), ours, atol=1e-6)
    assert scorer.scores([]).shape == (0,)


def test_a_reward_model_of_transformers_converts_and_keeps_every_bit(checkpoint, exported, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(exported, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    first, second = open_checkpoint(checkpoint), open_checkpoint(str(tmp_path / "ours"))
    assert second.config == first.config and second.config.scalar_head
    for record in first.manifest.tensors:
        assert read_param(first, record.path).tobytes() == read_param(second, record.path).tobytes(), record.path
    assert any(record.source == "score.weight" for record in second.manifest.tensors)


def test_what_it_reads_travels_with_an_export(exported, tmp_path):
    assert json.loads((exported / "reward_model.json").read_text()) == {"thoughts": False}
    convert(str(exported), str(tmp_path / "again"))
    assert "reward_model.json" in open_checkpoint(str(tmp_path / "again")).manifest.files


def test_a_reward_model_cannot_generate(checkpoint, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "2+2?"}\n')
    files = ["--input", f"{tmp_path}/in.jsonl", "--output", f"{tmp_path}/out.jsonl"]
    assert main(["generate", checkpoint, *files, "--set", "engine.max_context=64"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: this is a reward model: it scores texts")


def test_scores_are_those_of_any_mesh(checkpoint, conversations):
    one, eight = opened(checkpoint), opened(checkpoint, mesh=EIGHT)
    assert not eight.params["layers.mlp.up_kernel"].sharding.is_fully_replicated
    np.testing.assert_allclose(eight.scores(conversations), one.scores(conversations), atol=1e-5)


def test_one_program_scores_whatever_comes(conversations):
    layout, config, traced = one_device(), with_scalar_head(MODEL), []
    values = make_values(config, layout, compute_dtype="float32")

    def watched(params, batch):
        traced.append(batch.tokens.shape)
        return values(params, batch)

    scorer = RewardModelScorer(random_reward_model(MODEL), make_scorer(watched, Rows(64, 4, layout)), longest=64)
    for some in (conversations[:2], conversations, [((1,), (2, 3))]):
        assert len(scorer.scores(some)) == len(some)
    assert traced == [(4, 64)]


def test_a_reply_that_does_not_fit_is_read_as_far_as_it_does(checkpoint):
    scorer = opened(checkpoint, row_length=32)
    prompt, reply = list(range(1, 11)), list(range(20, 60))
    np.testing.assert_array_equal(scorer.scores([(prompt, reply)]), scorer.scores([(prompt, [*reply[:21], 59])]))
    with pytest.raises(ValueError, match="a prompt of 31 tokens does not fit the 32 of a row"):
        scorer.scores([([1] * 31, [2])])


def test_models_that_cannot_score_this_policy_are_refused(checkpoint, tmp_path):
    def refused(path, sentence, **options):
        with pytest.raises(ValueError, match=sentence):
            opened(path, **options)

    language_model = stack(random_params(MODEL, jax.random.key(0)), MODEL.num_layers)
    refused(write(tmp_path / "lm", MODEL, language_model), "is a language model, not a reward model: train one with")
    other = ChatTokenizer.from_directory(write_tokenizer(tmp_path / "other", THINKING))
    odd = write(
        tmp_path / "odd", with_scalar_head(MODEL), random_reward_model(MODEL), files={"reward_model.json": b"{}"}
    )
    refused(odd, "odd/checkpoint/reward_model.json: thoughts: missing")
    refused(checkpoint, "has another chat template than the policy in .*/other", policy=other)
    content = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    content["model"]["merges"] = [["a", "b"]]
    content["model"]["vocab"]["ab"] = 256 + 5
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "other" / "chat_template.jinja").write_text(PLAIN)
    merged = ChatTokenizer.from_directory(tmp_path / "other")
    refused(checkpoint, "has another tokenizer than the policy in .*/other", policy=merged)
    refused(checkpoint, "was trained on replies without their thoughts: set thoughts = false", thoughts=True)
    refused(checkpoint, "has 128 positions, and conversations may take 256", row_length=256)
    refused(tmp_path / "absent", "is not a checkpoint: there is no such directory", policy=merged)


def test_a_language_model_becomes_one_with_a_head_of_zeros(tmp_path):
    language_model = stack(random_params(MODEL, jax.random.key(0)), MODEL.num_layers)
    path = write(tmp_path, MODEL, language_model)
    params = reward_weights(open_checkpoint(path), dtype="float32", layout=train_layout(make_mesh(EIGHT)))
    assert params.keys() == stacked_shardings(with_scalar_head(MODEL), one_device()).keys()
    assert not np.any(params[HEAD]) and not params[HEAD].sharding.is_fully_replicated
    np.testing.assert_array_equal(params["layers.mlp.up_kernel"], language_model["layers.mlp.up_kernel"])


def test_a_reward_model_goes_on_from_its_own_head(checkpoint):
    params = reward_weights(open_checkpoint(checkpoint), dtype="float32", layout=one_device())
    np.testing.assert_array_equal(params[HEAD], random_reward_model(MODEL)[HEAD])


def scored(prompt, reply, margin: float = 0.0) -> Segment:
    segment = scored_segment(prompt, reply)
    return Segment(segment.tokens, segment.trained, {"margin": np.where(segment.trained, margin, 0).astype(np.float32)})


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("mesh", "lora"),
    [(None, None), (EIGHT, None), (EIGHT, LoraConfig(rank=4))],
    ids=["one device", "8 devices", "adapters on 8 devices"],
)
def test_the_gradient_is_that_of_each_pair_by_itself(checkpoint, exported, conversations, mesh, lora):
    """Packed and in micro-batches, against float64 torch through transformers' own model."""
    rng = np.random.default_rng(0)
    pairs: list[PairOfSegments] = [
        (scored(*conversations[2 * i], margin=m), scored(*conversations[2 * i + 1]))
        for i, m in enumerate(rng.uniform(0, 2, 6))
    ]
    model = AutoModelForSequenceClassification.from_pretrained(exported, dtype=torch.float64).eval()
    total = torch.zeros((), dtype=torch.float64)
    for i, (chosen, _) in enumerate(pairs):
        r = [model(torch.tensor([[*p, *x]])).logits[0, 0] for p, x in conversations[2 * i : 2 * i + 2]]
        margin = float(chosen.columns["margin"].max())
        total = total - torch.nn.functional.logsigmoid(r[0] - r[1] - margin) + 0.05 * (r[0] + r[1]) ** 2
    (total / len(pairs)).backward()

    layout, config = train_layout(make_mesh(mesh or MeshConfig())), with_scalar_head(MODEL)
    values = make_values(config, layout, compute_dtype="float32", remat=True, lora=lora)
    loss = make_reward_loss(values, BradleyTerryConfig(centring=0.05))
    (packed,) = one_pass(pairs, row_length=64, rows_per_batch=8)
    batch = place_batch(packed, accumulation=2, layout=layout)
    weights = jax.device_put(random_reward_model(MODEL), stacked_shardings(config, layout))
    trained, frozen = weights, None
    if lora is not None:
        frozen = {name: x for name, x in weights.items() if name != HEAD}
        trained = {HEAD: weights[HEAD], **random_adapters(config, lora, jax.random.key(0), layout)}
    step = jax.jit(lambda p, f, b: accumulate_gradients(loss, p, b, denominator=pairs_of(b), frozen=f))
    found = jax.device_get(step(trained, frozen, batch))
    assert float(found.value) == pytest.approx(total.item() / len(pairs), rel=1e-5)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    head = theirs["score.weight"]
    assert head is not None
    np.testing.assert_allclose(found.params[HEAD], head[0].numpy(), atol=1e-5 * head.abs().max().item())
    if lora is not None:
        return
    gate = theirs["model.layers.1.mlp.gate_proj.weight"]
    assert gate is not None
    ours = found.params["layers.mlp.gate_kernel"][1]
    np.testing.assert_allclose(ours, gate.numpy().T, atol=2e-5 * gate.abs().max().item())


LETTERS, REPLY = 10, 6


@pytest.mark.slow
def test_a_linear_reward_is_recovered_from_noisy_preferences():
    """Each token of a reply is worth something, and the better reply is preferred as often as Bradley-Terry says.

    No judge can foresee the noise: the best, who knows the rewards, is right as often as sigmoid(|difference|).
    """
    rng = np.random.default_rng(7)
    worth = rng.permutation(np.linspace(-1.2, 1.2, LETTERS))

    def draw(count):
        replies = rng.integers(0, LETTERS, (count, 2, REPLY))
        difference = np.subtract(*worth[replies].sum(-1).T)
        first = rng.random(count) < 1 / (1 + np.exp(-difference))
        ordered = np.where(first[:, None, None], replies, replies[:, ::-1])
        return [
            (scored([1, 2], chosen + 10), scored([1, 2], rejected + 10)) for chosen, rejected in ordered
        ], difference

    pairs, _ = draw(1024)
    layout, config = one_device(), with_scalar_head(SMALL)
    values = make_values(config, layout, compute_dtype="float32")
    start = stack(random_params(config, jax.random.key(0)), SMALL.num_layers) | {HEAD: jnp.zeros(SMALL.hidden_size)}
    loss = make_reward_loss(values, BradleyTerryConfig(centring=0.0))
    params, losses = fit(loss, start, pairs, steps=96, rows=(16, 128), learning_rate=1e-2)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[-1] < 0.5

    held_out, difference = draw(512)
    score = make_scorer(values, Rows(128, 16, layout))
    found = np.concatenate(score(params, [s for pair in held_out for s in pair])).reshape(-1, 2)
    truth = np.array([[worth[s.tokens[2:-1] - 10].sum() for s in pair] for pair in held_out])
    right, best = (np.where(np.subtract(*x.T) > 0, 1.0, -1.0) for x in (found, truth))
    gaps = np.subtract(*truth.T)
    chances = {name: float(np.mean(1 / (1 + np.exp(-side * gaps)))) for name, side in (("ours", right), ("best", best))}
    assert chances["best"] > 0.8 and chances["ours"] > chances["best"] - 0.02
    assert np.mean(right == best) > 0.9
    slope = float(np.polyfit(gaps, np.subtract(*found.T), 1)[0])
    assert slope == pytest.approx(1.0, abs=0.25), "differences of rewards are log-odds"
    assert np.abs(difference).mean() > 1.0
