"""DPO over packed rows: its optimum, its reference, and that no packing, mesh or chunk changes it."""

import math

import jax
import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from qwq_jax.checkpoint.directory import LocalDirectory
from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.objective import DpoConfig
from qwq_jax.model.lora import random_adapters
from qwq_jax.model.params import random_params, stack
from qwq_jax.rl.learner import ForwardConfig, Rows, forward, make_scorer
from qwq_jax.rl.pair_training import (
    REFERENCE_FILE,
    load_reference,
    make_dpo_loss,
    make_pair_evaluation,
    pairs_of,
    save_reference,
)
from qwq_jax.rl.preference_data import Pairs
from qwq_jax.sharding import make_mesh, train_layout
from qwq_jax.train.batch import place_batch
from qwq_jax.train.packing import Segment
from qwq_jax.train.step import accumulate_gradients
from qwq_jax.train.stream import one_pass
from qwq_jax.train.weights import stacked_shardings
from tests.rl.fitting import SMALL, fit, one_device

FORWARD = ForwardConfig("float32", 1.0, 64, remat=False)


def sequence(prompt, completion) -> Segment:
    tokens = np.array([*prompt, *completion], np.int32)
    return Segment(tokens, np.arange(len(tokens)) >= len(prompt))


def random_weights(config):
    """With an embedding and a head that make the distribution far from flat."""
    values = stack(random_params(config, jax.random.key(1)), config.num_layers)
    return {name: x * (8.0 if name in ("embed.embedding", "head.kernel") else 1.0) for name, x in values.items()}


def scorer(config):
    """``(params, segments) -> log-probabilities`` of trained tokens."""
    run = forward(config, one_device(), FORWARD)
    return make_scorer(lambda params, batch: run(params, batch)[0], Rows(64, 4, one_device()))


@pytest.fixture(scope="module")
def weights(tiny_config):
    return random_weights(tiny_config)


@pytest.fixture(scope="module")
def logprobs(tiny_config):
    return scorer(tiny_config)


def with_reference(pairs: Pairs, logprobs, params) -> Pairs:
    return pairs.with_column("ref_logp", logprobs(params, pairs.segments))


# Replies to two prompts, and how much better than others each is, as odds.
PROMPTS = ((5, 6), (7,))
REPLIES = ((10, 20), (11, 21), (11, 22))
ODDS = ((1, 3, 9), (9, 3, 1))


@pytest.mark.slow
def test_the_optimum_is_the_reference_tilted_by_the_reward():
    """Trained on preferences as Bradley-Terry has them, the policy becomes p_ref exp(r / beta) / Z.

    Each pair comes as often either way round as its odds say, so that the data are the whole distribution.
    """
    weights, logprobs = random_weights(SMALL), scorer(SMALL)
    beta, examples = 0.5, []
    for prompt, odds in zip(PROMPTS, ODDS, strict=True):
        for i in range(3):
            for j in range(i):
                share = math.gcd(odds[i], odds[j])
                better, worse = sequence(prompt, REPLIES[i]), sequence(prompt, REPLIES[j])
                examples += [(better, worse)] * (odds[i] // share) + [(worse, better)] * (odds[j] // share)
    pairs = with_reference(Pairs(examples), logprobs, weights)
    loss = make_dpo_loss(SMALL, one_device(), FORWARD, objective=DpoConfig(beta=beta))
    params, losses = fit(loss, weights, pairs.examples, steps=120, rows=(4, 64), learning_rate=3e-3)

    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    for prompt, odds in zip(PROMPTS, ODDS, strict=True):
        asked = [sequence(prompt, reply) for reply in REPLIES]
        ours, reference = (
            np.array([x.astype(np.float64).sum() for x in logprobs(p, asked)]) for p in (params, weights)
        )
        target = reference + np.log(odds) / beta
        found, expected = (np.exp(x - np.logaddexp.reduce(x)) for x in (ours, target))
        assert np.abs(expected - np.exp(reference - np.logaddexp.reduce(reference))).max() > 0.3, "far from the start"
        np.testing.assert_allclose(found, expected, atol=0.01)
        np.testing.assert_allclose((ours - ours[0]) - (target - target[0]), 0, atol=0.06)


@pytest.fixture(scope="module")
def ragged(tiny_config):
    rng = np.random.default_rng(2)
    examples = []
    for _ in range(11):
        prompt = rng.integers(0, tiny_config.vocab_size, rng.integers(1, 6))
        examples.append(tuple(sequence(prompt, rng.integers(0, 257, rng.integers(1, 9))) for _ in range(2)))
    return Pairs(examples).with_column(
        "ref_logp", [-rng.exponential(3.0, int(segment.trained.sum())) for pair in examples for segment in pair]
    )


def gradients(config, weights, pairs, objective, *, mesh=None, accumulation=1, row_length=48):
    layout = train_layout(make_mesh(mesh or MeshConfig()))
    loss = make_dpo_loss(config, layout, FORWARD, objective=objective)
    (packed,) = one_pass(pairs.examples, row_length=row_length, rows_per_batch=16)
    placed = jax.device_put(weights, stacked_shardings(config, layout))
    batch = place_batch(packed, accumulation=accumulation, layout=layout)
    step = jax.jit(lambda p, b: accumulate_gradients(loss, p, b, denominator=pairs_of(b)))
    return jax.device_get(step(placed, batch))


@pytest.mark.parametrize("objective", [DpoConfig(beta=0.3, label_smoothing=0.1), DpoConfig(loss="ipo")], ids=str)
def test_the_loss_is_the_mean_over_pairs_each_by_itself(tiny_config, weights, logprobs, ragged, objective):
    plain = [Segment(segment.tokens, segment.trained) for segment in ragged.segments]
    changes = [
        (logp.astype(np.float64) - segment.columns["ref_logp"][segment.trained]).sum()
        for logp, segment in zip(logprobs(weights, plain), ragged.segments, strict=True)
    ]
    h = torch.tensor(np.array(changes[0::2]) - np.array(changes[1::2]))
    eps, beta = objective.label_smoothing, objective.beta
    terms = -(1 - eps) * logsigmoid(beta * h) - eps * logsigmoid(-beta * h)
    if objective.loss == "ipo":
        terms = (h - 1 / (2 * beta)) ** 2
    found = gradients(tiny_config, weights, ragged, objective)
    assert float(found.value) == pytest.approx(terms.mean().item(), rel=1e-5)
    assert float(found.means["margin"]) == pytest.approx(beta * h.mean().item(), rel=1e-5)
    assert float(found.means["accuracy"]) == pytest.approx((h > 0).double().mean().item())


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("mesh", "accumulation", "row_length"),
    [
        (MeshConfig(), 4, 48),
        (MeshConfig(), 1, 64),
        (MeshConfig(data=2, fsdp=2, tensor=2), 2, 48),
    ],
    ids=["accumulated", "in longer rows", "on 8 devices"],
)
def test_neither_micro_batches_nor_rows_nor_meshes_change_a_gradient(
    tiny_config, weights, ragged, mesh, accumulation, row_length
):
    one = gradients(tiny_config, weights, ragged, DpoConfig())
    other = gradients(
        tiny_config, weights, ragged, DpoConfig(), mesh=mesh, accumulation=accumulation, row_length=row_length
    )
    assert float(other.value) == pytest.approx(float(one.value), rel=1e-5)
    for name, expected in one.params.items():
        scale = np.abs(expected).max()
        assert scale > 0, name
        np.testing.assert_allclose(other.params[name], expected, atol=2e-5 * scale + 1e-8, err_msg=name)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_under_adapters_the_model_itself_is_the_reference(tiny_config, weights, logprobs, ragged):
    """Before the first step the loss is log 2 for whatever data, and the adapters have a gradient."""
    lora = LoraConfig(rank=4)
    pairs = with_reference(ragged, logprobs, weights)
    loss = make_dpo_loss(tiny_config, one_device(), FORWARD, objective=DpoConfig(), lora=lora)
    adapters = random_adapters(tiny_config, lora, jax.random.key(0))
    (packed,) = one_pass(pairs.examples, row_length=64, rows_per_batch=8)
    batch = place_batch(packed, accumulation=1, layout=one_device())
    step = jax.jit(lambda p, f, b: accumulate_gradients(loss, p, b, denominator=pairs_of(b), frozen=f))
    found = jax.device_get(step(adapters, weights, batch))
    assert float(found.value) == pytest.approx(math.log(2), abs=1e-5)
    assert abs(float(found.means["margin"])) < 1e-5 and found.params.keys() == adapters.keys()
    assert all(np.abs(x).max() > 0 for name, x in found.params.items() if name.endswith("b"))


def test_held_out_measures_are_means_over_all_pairs(tiny_config, weights, ragged):
    loss = make_dpo_loss(tiny_config, one_device(), FORWARD, objective=DpoConfig(beta=0.3))
    batches = one_pass(ragged.examples, row_length=48, rows_per_batch=2)
    assert len(batches) > 1

    def place(packed):
        return place_batch(packed, accumulation=2, layout=one_device())

    measured = make_pair_evaluation(loss, batches, place=place, frozen=None)(weights)
    whole = gradients(tiny_config, weights, ragged, DpoConfig(beta=0.3))
    assert measured["loss"] == pytest.approx(float(whole.value), rel=1e-5)
    assert measured.keys() == {"loss", *whole.means}
    for name, value in whole.means.items():
        assert measured[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_a_reference_is_read_back_bitwise_or_not_at_all(tmp_path):
    directory = LocalDirectory(str(tmp_path))
    values = [np.array([-0.1, -2.0], np.float32), np.array([-3.3], np.float32)]
    assert load_reference(directory, [2, 1], identity="a") is None
    save_reference(directory, values, identity="a")
    found = load_reference(directory, [2, 1], identity="a")
    assert found is not None and [x.tobytes() for x in found] == [x.tobytes() for x in values]
    assert load_reference(directory, [2, 1], identity="b") is None
    with pytest.raises(ValueError, match=f"{REFERENCE_FILE} is damaged: delete it"):
        load_reference(directory, [2, 2], identity="a")
