"""Gradients and log-probabilities of training rows, however these are cut up, padded and packed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwq_jax.config.lora import LoraConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.objective import ObjectiveConfig
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.lora import random_adapters
from qwq_jax.model.params import bind, random_params, stack
from qwq_jax.model.spec import model_spec
from qwq_jax.rl.experience import gather, segments_of
from qwq_jax.rl.learner import (
    ForwardConfig,
    Rows,
    forward,
    make_policy_loss,
    make_scorer,
    make_sync,
    make_updater,
    means,
)
from qwq_jax.rl.loss import LossTerms
from qwq_jax.sharding import decode_layout, make_mesh, train_layout
from qwq_jax.train.packing import Segment
from qwq_jax.train.state import TrainState, abstract_state, init_state
from qwq_jax.train.weights import abstract_params, stacked_shardings
from tests.rl.scripted import random_groups
from tests.rl.tiny_run import MODEL

FORWARD = ForwardConfig("float32", temperature=0.6, logprob_chunk=16, remat=False)
OBJECTIVE = ObjectiveConfig(name="dapo", uninformative_groups="keep", entropy_coefficient=0.01)
ROW = 32
# Largest difference of a gradient beside the largest gradient: sums in another order. Measured 1e-6.
ORDER = 1e-5


@pytest.fixture(scope="module")
def params():
    drawn = random_params(MODEL, jax.random.key(1))
    scaled = {path: x if path.endswith(("bias", "scale")) else 4 * x for path, x in drawn.items()}
    return {path: np.asarray(x) for path, x in stack(scaled, MODEL.num_layers).items()}


@pytest.fixture(scope="module")
def segments():
    """Ragged completions, more than half of their tokens in the first two of eight rows."""
    groups = random_groups(3, groups=7, vocabulary=MODEL.vocab_size, longest=24)
    experience = gather(groups, OBJECTIVE)
    rng = np.random.default_rng(0)
    columns = {
        "advantages": [rng.standard_normal() * np.ones(n) for n in experience.lengths],
        "old_logp": [-5 + 0.1 * rng.standard_normal(n) for n in experience.lengths],
    }
    return segments_of(experience, range(len(experience.samples)), columns=columns, objective=OBJECTIVE, longest=24)


def rows_of(mesh=None, *, row_length=ROW, rows=8):
    return Rows(row_length, rows, train_layout(make_mesh(mesh or MeshConfig())))


def place(params, layout):
    shardings = stacked_shardings(MODEL, layout)
    return {path: jax.device_put(x, shardings[path]) for path, x in params.items()}


def updated(params, segments, *, mesh=None, rows=8, optimizer=None, objective=OBJECTIVE):
    """Parameters after one step down the gradient, and the record of it."""
    arranged = rows_of(mesh, rows=rows)
    optimizer = optimizer or optax.sgd(1.0)
    state = init_state(place(params, arranged.layout), optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(state.params, optimizer))
    loss = make_policy_loss(MODEL, arranged.layout, FORWARD, objective=objective)
    updater = make_updater(loss, optimizer, shardings=shardings)
    batches = list(arranged.micro_batches(segments))
    state, record = updater.update(state, batches)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    return {path: np.asarray(x) for path, x in state.params.items()}, record, len(batches)


@pytest.fixture(scope="module")
def whole(params, segments):
    after, record, count = updated(params, segments, rows=16)
    assert count == 1
    return {path: params[path] - after[path] for path in params}, record


def check(whole, params, after, record):
    gradients, expected = whole
    largest = max(np.abs(x).max() for x in gradients.values())
    assert largest > 1e-3
    for path, gradient in gradients.items():
        np.testing.assert_allclose(params[path] - after[path], gradient, rtol=0, atol=ORDER * largest, err_msg=path)
    assert record["tokens"] == expected["tokens"]
    assert record == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in expected.items()}


def test_micro_batches_add_up_to_the_whole(whole, params, segments):
    after, record, count = updated(params, segments, rows=2)
    assert count > 4
    check(whole, params, after, record)


def test_devices_add_up_to_the_whole(whole, params, segments):
    after, record, count = updated(params, segments, mesh=MeshConfig(data=2, fsdp=2, tensor=2), rows=8)
    assert count == 2
    check(whole, params, after, record)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("mesh", "rows"),
    [
        *((MeshConfig(), rows) for rows in (1, 4, 8)),
        *((MeshConfig(data=count), 8) for count in (2, 4, 8)),
        (MeshConfig(fsdp=8), 16),
        (MeshConfig(tensor=4), 2),
    ],
    ids=str,
)
def test_any_cut_is_the_whole(whole, params, segments, mesh, rows):
    after, record, _ = updated(params, segments, mesh=mesh, rows=rows)
    check(whole, params, after, record)


def test_adding_up_skips_no_row_and_counts_none_twice(whole, segments):
    record = whole[1]
    assert record["tokens"] == sum(part.trained.sum() for part in segments)
    assert record["entropy"] < np.log(MODEL.vocab_size)
    assert record["max_log_ratio"] >= abs(np.log(record["ratio"]))


def test_the_gradient_is_clipped_once_and_reported_before(whole, params, segments):
    gradients, record = whole
    norm = np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in gradients.values()))
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)
    clipped = optax.chain(optax.clip_by_global_norm(norm / 4), optax.sgd(1.0))
    after, again, _ = updated(params, segments, rows=2, optimizer=clipped)
    assert again["grad_norm"] == pytest.approx(norm, rel=1e-4)
    path = max(gradients, key=lambda path: np.abs(gradients[path]).max())
    np.testing.assert_allclose(params[path] - after[path], gradients[path] / 4, rtol=1e-2, atol=1e-6)


def simple_updater(value):
    """An updater of one number, whose loss is `value(parameter, batch)`."""

    def loss(params, batch):
        number = value(params["x"], batch)
        return LossTerms(number, {"count": jnp.float32(1), "seen": batch}, {"largest": batch})

    optimizer = optax.sgd(1.0)
    state = TrainState({"x": jnp.float32(2.0)}, optimizer.init({"x": jnp.float32(2.0)}), jnp.int32(0))
    return make_updater(loss, optimizer, shardings=jax.tree.map(lambda x: x.sharding, state)), state


def test_sums_are_added_and_peaks_are_not():
    updater, state = simple_updater(lambda x, batch: x * batch)
    state, record = updater.update(state, [jnp.float32(x) for x in (1.0, 5.0, 3.0)])
    assert float(state.params["x"]) == 2.0 - 9.0 and int(state.step) == 1
    assert record == {"loss": 18.0, "grad_norm": 9.0, "tokens": 3.0, "seen": 3.0, "max_largest": 5.0}


@pytest.mark.parametrize(
    "value", [lambda x, batch: x * jnp.log(-batch), lambda x, batch: jnp.sqrt(x - 2.0) * batch], ids=["loss", "grad"]
)
def test_what_is_no_number_ends_the_run(value):
    updater, state = simple_updater(value)
    with pytest.raises(ValueError, match=r"^the loss is .*, its gradient (nan|inf); try a lower optimizer.learning_"):
        updater.update(state, [jnp.float32(1.0)])


def test_an_update_of_nothing_is_a_bug():
    updater, state = simple_updater(lambda x, batch: x)
    with pytest.raises(AssertionError, match="an update of nothing"):
        updater.update(state, [])


def scored(params, segments, *, row_length=ROW, rows=4, config=FORWARD, mesh=None):
    arranged = rows_of(mesh, row_length=row_length, rows=rows)
    run = forward(MODEL, arranged.layout, config)
    score = make_scorer(lambda params, batch: run(params, batch)[0], arranged)
    return score(place(params, arranged.layout), segments)


def test_log_probabilities_do_not_depend_on_rows_padding_neighbours_or_chunks(params, segments):
    packed = scored(params, segments)
    cases = {
        "alone in a row, with more padding": {"row_length": 40, "rows": 1, "segments": segments[:3]},
        "in one chunk": {"config": replace(FORWARD, logprob_chunk=512)},
    }
    for name, case in cases.items():
        chosen = case.pop("segments", segments)
        for left, right in zip(scored(params, chosen, **case), packed, strict=False):
            assert left.dtype == np.float32 and left.shape == right.shape
            np.testing.assert_allclose(left, right, rtol=0, atol=2e-5, err_msg=name)


def test_a_neighbour_changes_nothing_at_all(params, segments):
    """Not by a rounding: the same program on the same row, whose other half says something else."""
    own, other = segments[0], segments[1]
    strange = Segment((other.tokens * 7 + 3) % MODEL.vocab_size, other.trained, other.columns)
    results = [scored(params, [own, beside], row_length=64, rows=1) for beside in (other, strange)]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert np.abs(results[0][1] - results[1][1]).max() > 0.1


def test_what_stands_in_the_padding_changes_nothing_at_all(params, segments):
    arranged = rows_of(rows=4)
    packed = next(iter(arranged.plan(segments[:3]).micro_batches(segments[:3])))
    padding = packed.segment_ids == 0
    assert 0.2 < padding.mean() < 0.9
    strange = replace(packed, tokens=np.where(padding, 77, packed.tokens), targets=np.where(padding, 5, packed.targets))
    run, placed = jax.jit(forward(MODEL, arranged.layout, FORWARD)), place(params, arranged.layout)
    plain, other = (np.asarray(run(placed, arranged.place(each))[0]) for each in (packed, strange))
    np.testing.assert_array_equal(plain[~padding], other[~padding])
    assert (plain[padding] != other[padding]).any()


@pytest.mark.slow
def test_completions_with_advantage_zero_have_no_gradient(params, segments):
    """Which is why they need not be computed where nothing else teaches."""
    silent = [
        replace(each, columns={**each.columns, "advantages": 0 * each.columns["advantages"]}) if i % 3 else each
        for i, each in enumerate(segments)
    ]
    advantages_alone = OBJECTIVE.model_copy(update={"entropy_coefficient": 0.0})
    assert advantages_alone.learns_by_advantage_alone and not OBJECTIVE.learns_by_advantage_alone
    for objective, same in ((advantages_alone, True), (OBJECTIVE, False)):
        every, some = (updated(params, each, objective=objective)[0] for each in (silent, silent[::3]))
        gap, largest = (max(np.abs(every[path] - x[path]).max() for path in params) for x in (some, params))
        assert (gap < ORDER * largest) == same, (gap, largest)


def test_log_probabilities_are_those_of_float64(params, segments):
    """Of the softmax at the temperature, from the hidden states: the closed form, in numpy."""
    arranged = rows_of(rows=4)
    batch = next(iter(arranged.micro_batches(segments)))
    placed = place(params, arranged.layout)
    run = forward(MODEL, arranged.layout, FORWARD)
    logp, entropy = jax.jit(run)(placed, batch)
    cold = jax.jit(forward(MODEL, arranged.layout, replace(FORWARD, temperature=1e-6)))(placed, batch)
    assert logp.dtype == entropy.dtype == jnp.float32
    assert float(jnp.max(cold[1])) < 1e-3, "no entropy is left near 0"
    from_hidden = closed_form(placed, batch, arranged.layout)
    np.testing.assert_allclose(logp, from_hidden[0], atol=5e-6)
    np.testing.assert_allclose(entropy, from_hidden[1], atol=5e-6)


def closed_form(params, batch, layout):
    bound = bind(MODEL, params, dtype="float32")
    hidden, _ = jax.jit(lambda b: bound(b.tokens, b.positions, causal_attend(b.segment_ids, layout)))(batch)
    logits = np.asarray(hidden, np.float64) @ np.asarray(params["head.kernel"], np.float64).T / FORWARD.temperature
    logits -= logits.max(axis=-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(logp, np.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    return chosen, -(np.exp(logp) * logp).sum(axis=-1)


def test_bfloat16_is_near_enough_and_its_log_probabilities_are_float32(params, segments):
    """The head's sums are float32: what is lost is the rounding of activations and weights."""
    exact = np.concatenate(scored(params, segments[:8]))
    rounded = scored(params, segments[:8], config=replace(FORWARD, compute_dtype="bfloat16"))
    assert all(each.dtype == np.float32 for each in rounded)
    gap = np.abs(np.concatenate(rounded) - exact)
    print(f"bfloat16 and float32 differ by {gap.mean():.4f} on average, {gap.max():.4f} at most")
    assert 0 < gap.mean() < 0.05 and gap.max() < 0.3
    # Were they rounded themselves, most would be a multiple of 2^-8 or more at this size.
    assert np.mean(np.concatenate(rounded) * 256 % 1 == 0) < 0.1


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, tensor=2)], ids=str)
def test_an_engine_gets_one_array_a_layer_with_adapters_merged(params, mesh):
    layout, decode = train_layout(make_mesh(mesh)), decode_layout(make_mesh(mesh))
    lora = LoraConfig(rank=4, alpha=12.0, target_modules=("q_proj", "down_proj"))
    adapters = random_adapters(MODEL, lora, jax.random.key(2), layout)
    rng = np.random.default_rng(0)
    adapters = {p: x + jax.device_put(rng.standard_normal(x.shape).astype(np.float32)) for p, x in adapters.items()}
    frozen = place(params, layout)
    found = make_sync(MODEL, decode, dtype="float32", lora=lora)(adapters, frozen)
    spec = model_spec(MODEL, "float32")
    assert found.keys() == spec.keys()
    for path, array in found.items():
        assert array.shape == spec[path].shape and array.sharding == decode.sharding(spec[path].axes, array.shape)
        layer = path.split(".")[1] if path.startswith("layers.") else None
        stacked = path if layer is None else path.replace(f"layers.{layer}.", "layers.")
        expected = params[stacked] if layer is None else params[stacked][int(layer)]
        a = stacked.replace("_kernel", "_lora.a")
        if a in adapters:
            pair = [np.asarray(adapters[x][int(layer)], np.float64) for x in (a, a.replace("lora.a", "lora.b"))]
            expected = expected + 3.0 * np.tensordot(*pair, axes=1)
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5, err_msg=path)
    assert sum("_lora.a" in path for path in adapters) == 2


def test_an_engine_of_all_weights_is_a_copy(params):
    """The state is donated to the next update: an engine that shared its arrays would be left with none."""
    layout = train_layout(make_mesh(MeshConfig()))
    frozen = place(params, layout)
    found = make_sync(MODEL, decode_layout(make_mesh(MeshConfig())), dtype="float32")(frozen, None)
    jax.tree.map(lambda x: x.delete(), frozen)
    np.testing.assert_array_equal(found["embed.embedding"], params["embed.embedding"])
    np.testing.assert_array_equal(found["layers.1.mlp.up_kernel"], params["layers.mlp.up_kernel"][1])


def test_weights_move_in_as_many_exchanges_as_there_are_parameters():
    """However many layers: each exchange is a program of its own to a TPU's compiler."""

    def gathers(layers: int) -> int:
        model = MODEL.model_copy(update={"num_layers": layers})
        there = abstract_params(model, dtype="float32", layout=train_layout(make_mesh(MeshConfig(fsdp=4, tensor=2))))
        decode = decode_layout(make_mesh(MeshConfig(data=4, tensor=2)))
        text = make_sync(model, decode, dtype="float32").lower(there, None).compile().as_text()
        return text.count(" all-gather(") + text.count(" all-gather-start(")

    assert 0 < gathers(2) == gathers(5)


def test_records_of_updates_become_one():
    records = [{"loss": 1.0, "max_gap": 3.0, "tokens": 5.0}, {"loss": 2.0, "max_gap": 1.0, "tokens": 7.0}]
    assert means(records) == {"loss": 1.5, "max_gap": 3.0, "tokens": 12.0}
