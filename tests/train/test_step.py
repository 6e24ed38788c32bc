"""Loss and gradients: packed, accumulated and sharded they are those of each sequence by itself."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.checkpoint.names import name_table
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.train import OptimizerConfig
from qwq_jax.model.params import random_params, unstack
from qwq_jax.sft.loss import make_sft_loss
from qwq_jax.sharding import make_mesh, train_layout
from qwq_jax.train.batch import place_batch
from qwq_jax.train.optimizer import make_optimizer, make_schedule
from qwq_jax.train.packing import PackedRows, Segment, fill_rows, plan_rows
from qwq_jax.train.state import init_state
from qwq_jax.train.step import accumulate_gradients, make_train_step, trained_tokens
from qwq_jax.train.weights import stacked_shardings

ROW = 48
ROWS = 16


@pytest.fixture(scope="module")
def params(tiny_config):
    """Random, per layer; biases too, which start at zero in training."""
    values = random_params(tiny_config, jax.random.key(1))
    noise = {name: 0.05 * jax.random.normal(jax.random.key(i), x.shape) for i, (name, x) in enumerate(values.items())}
    return {name: x + noise[name] for name, x in values.items()}


@pytest.fixture(scope="module")
def segments(tiny_config):
    """Ragged sequences, each with a prompt and at times a hole in its mask."""
    rng = np.random.default_rng(3)
    made = []
    for length in rng.integers(3, ROW, 26):
        trained = np.arange(length) >= rng.integers(1, length)
        trained[rng.integers(1, length)] = False
        made.append(Segment(rng.integers(0, tiny_config.vocab_size, length).astype(np.int32), trained))
    return made


def pack(segments) -> PackedRows:
    rows = plan_rows([s.slots for s in segments], row_length=ROW)
    assert len(rows) <= ROWS and any(len(row) > 1 for row in rows)
    rows += [[]] * (ROWS - len(rows))
    return fill_rows([[segments[i] for i in row] for row in rows], row_length=ROW)


def gradients(config, params, packed, *, mesh=None, accumulation=1, chunk=64, remat=False):
    """Loss, and gradients by the names of the unstacked parameters, as the train step computes them."""
    layout = train_layout(make_mesh(mesh or MeshConfig()))
    loss = make_sft_loss(config, layout, compute_dtype="float32", logprob_chunk=chunk, remat=remat)
    names = {f"layers.{name.split('.', 2)[2]}" if name.startswith("layers.") else name for name in params}
    shardings = stacked_shardings(config, layout)
    assert names == shardings.keys()
    stacked = {}
    for name, sharding in shardings.items():
        if name.startswith("layers."):
            rest = name.removeprefix("layers.")
            value = np.stack([params[f"layers.{i}.{rest}"] for i in range(config.num_layers)])
        else:
            value = np.asarray(params[name])
        stacked[name] = jax.device_put(value, sharding)
    batch = place_batch(packed, accumulation=accumulation, layout=layout)

    @jax.jit
    def run(params, batch):
        return accumulate_gradients(loss, params, batch, denominator=trained_tokens(batch))

    result = run(stacked, batch)
    return float(result.value), jax.tree.map(np.asarray, unstack(jax.device_get(result.params), config.num_layers))


def assert_same(left, right, tolerance):
    assert left[0] == pytest.approx(right[0], rel=tolerance)
    assert left[1].keys() == right[1].keys()
    for name, expected in right[1].items():
        scale = max(np.abs(expected).max(), 1e-6)
        assert np.abs(left[1][name] - expected).max() <= tolerance * scale, name


@pytest.fixture(scope="module")
def single(tiny_config, params, segments):
    return gradients(tiny_config, params, pack(segments))


def test_packed_loss_and_gradients_equal_transformers_one_sequence_at_a_time(tiny_config, params, segments, single):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**tiny_config.to_huggingface("float32"))).double()
    model.model.embed_tokens.padding_idx = None  # torch would leave that row's gradient out
    weights = dict(model.named_parameters())
    table = name_table(tiny_config)
    with torch.no_grad():
        for row in table:
            value = np.asarray(params[row.path], np.float64).transpose(row.inverse).reshape(row.source_shape)
            weights[row.source].copy_(torch.from_numpy(value.copy()))
    total = torch.zeros((), dtype=torch.float64)
    for segment in segments:
        tokens = torch.from_numpy(segment.tokens.astype(np.int64))
        logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, tokens[1:, None])[:, 0]
        total = total - chosen[torch.from_numpy(segment.trained[1:])].sum()
    loss = total / sum(int(s.trained[1:].sum()) for s in segments)
    loss.backward()
    grads = {row.path: row.to_parameter(weights[row.source].grad.numpy()) for row in table}
    # Ours is float32: 24 bits, sums over some 700 tokens and two layers.
    assert_same(single, (float(loss.detach()), grads), 2e-5)


# Sums of the same float32 terms in another order: a few units in the last place of the largest.
REORDERED = 5e-6


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_gradients(tiny_config, params, segments, single, accumulation):
    assert_same(gradients(tiny_config, params, pack(segments), accumulation=accumulation), single, REORDERED)


MESHES = [
    *(
        pytest.param(MeshConfig(**axes), marks=[pytest.mark.slow, pytest.mark.exhaustive])
        for axes in ({"data": 2}, {"data": 8}, {"context": 8}, {"data": 2, "fsdp": 2, "tensor": 2})
    ),
    pytest.param(MeshConfig(fsdp=8), marks=pytest.mark.slow),
    MeshConfig(tensor=8),
    MeshConfig(fsdp=2, context=2, tensor=2),
]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m.data}x{m.fsdp}x{m.context}x{m.tensor}")
def test_the_mesh_does_not_change_gradients(tiny_config, params, segments, single, mesh):
    assert_same(gradients(tiny_config, params, pack(segments), mesh=mesh, accumulation=2), single, REORDERED)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(tensor=8), marks=[pytest.mark.slow, pytest.mark.exhaustive]),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
    ids=["8", "2x2x2"],
)
def test_a_vocabulary_that_the_tensor_axis_cuts_does_not_change_gradients(tiny_config, params, segments, mesh):
    """257 words, one of which nobody says, are whole on every device; 256 are cut."""
    config = tiny_config.model_copy(update={"vocab_size": 256, "eos_token_ids": (255,)})
    cut = {name: x[tuple(slice(256 if n == 257 else n) for n in x.shape)] for name, x in params.items()}
    shortened = [Segment(segment.tokens % 256, segment.trained) for segment in segments]
    for name in ("embed.embedding", "head.kernel"):
        assert stacked_shardings(config, train_layout(make_mesh(mesh)))[name].spec[0] == "tensor"
    assert_same(
        gradients(config, cut, pack(shortened), mesh=mesh, accumulation=2),
        gradients(config, cut, pack(shortened)),
        REORDERED,
    )


def test_chunks_of_logits_and_remat_do_not_change_gradients(tiny_config, params, segments, single):
    assert_same(gradients(tiny_config, params, pack(segments), chunk=16, remat=True), single, REORDERED)


def test_a_neighbour_in_the_row_and_the_padding_change_nothing(tiny_config, params, segments):
    kept = Segment(segments[0].tokens[:12], np.arange(12) > 4)

    def beside(seed, pad):
        other = np.random.default_rng(seed).integers(0, tiny_config.vocab_size, 16).astype(np.int32)
        silent = Segment(other, np.zeros(16, np.bool_))
        rows = [[silent, kept, silent]] + [[]] * (ROWS - 1)
        return gradients(tiny_config, params, fill_rows(rows, row_length=ROW, pad=pad))

    left, right = beside(1, pad=0), beside(2, pad=7)
    assert left[0] == right[0]
    assert_same(left, right, REORDERED)  # zero terms, but a sum's partial order may follow the segments
    alone = gradients(tiny_config, params, fill_rows([[kept]] + [[]] * (ROWS - 1), row_length=ROW))
    assert_same(left, alone, REORDERED)


def test_steps_are_normalised_by_all_trained_tokens(tiny_config, params, segments):
    """A mean over micro-batches of their means would differ: here one holds most of the tokens."""
    packed = pack(segments)
    counts = packed.loss_mask.reshape(2, -1).sum(axis=1)
    assert counts[0] > 1.5 * counts[1]
    part = np.arange(ROWS)[:, None] // (ROWS // 2)
    masked = [replace(packed, loss_mask=packed.loss_mask & (part == i)) for i in (0, 1)]
    halves = [gradients(tiny_config, params, rows)[0] for rows in masked]
    whole = gradients(tiny_config, params, packed, accumulation=2)[0]
    assert whole == pytest.approx(np.average(halves, weights=counts), rel=1e-6)
    assert abs(whole - np.mean(halves)) > 1e-4


def test_a_state_keeps_its_layout_and_its_type(tiny_config, segments):
    layout = train_layout(make_mesh(MeshConfig(fsdp=2, tensor=2)))
    shardings = stacked_shardings(tiny_config, layout)
    params = jax.jit(
        lambda: {
            name: jnp.ones((tiny_config.num_layers, 64, 128) if "up" in name else (64,))
            for name in ("layers.mlp.up_kernel", "final_norm.scale")
        },
        out_shardings={name: shardings[name] for name in ("layers.mlp.up_kernel", "final_norm.scale")},
    )()
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), schedule=optax_constant(0.1))
    state = init_state(params, optimizer)
    before = jax.tree.map(lambda x: (x.sharding, x.dtype), state)
    moments = state.opt_state[1].mu["layers.mlp.up_kernel"]
    assert moments.sharding.spec == shardings["layers.mlp.up_kernel"].spec and not moments.sharding.is_fully_replicated

    def loss(params, batch):
        zero = sum(jnp.sum(value) for value in params.values()) * 0.0
        return zero + jnp.sum(batch.loss_mask), {}

    step = make_train_step(loss, optimizer, shardings=jax.tree.map(lambda x: x.sharding, state))
    state, metrics = step(state, place_batch(pack(segments), accumulation=2, layout=layout))
    assert jax.tree.map(lambda x: (x.sharding, x.dtype), state) == before
    assert int(state.step) == 1 and float(metrics["loss"]) == 1.0
    # The gradient is zero, so only the decay moves anything, and it spares norms.
    np.testing.assert_allclose(state.params["layers.mlp.up_kernel"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(state.params["final_norm.scale"], 1.0)


def optax_constant(value):
    return lambda step: value


def test_rows_that_do_not_divide_into_micro_batches_are_refused(segments):
    layout = train_layout(make_mesh(MeshConfig()))
    with pytest.raises(ValueError, match="16 rows a step cannot be divided into 3 micro-batches"):
        place_batch(pack(segments), accumulation=3, layout=layout)


def test_the_schedule_warms_up_and_falls_by_a_cosine():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, final_lr_ratio=0.1)
    schedule = make_schedule(config, steps=110)
    assert [round(float(schedule(i)), 6) for i in (0, 5, 10, 60, 110)] == [0.0, 1.0, 2.0, 1.1, 0.2]
    assert float(make_schedule(OptimizerConfig(learning_rate=2.0), steps=10)(0)) == 2.0


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimizerConfig(clip_norm=1.0, b1=0.0, b2=0.0, eps=1.0)
    params = {"a_kernel": jnp.zeros(2), "b_kernel": jnp.zeros(2)}
    optimizer = make_optimizer(config, schedule=optax_constant(1.0))
    grads = {"a_kernel": jnp.array([3.0, 0.0]), "b_kernel": jnp.array([0.0, 4.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # Clipped to [0.6, 0, 0, 0.8]; Adam with these settings gives g / (|g| + 1).
    np.testing.assert_allclose(updates["a_kernel"], [-0.6 / 1.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(updates["b_kernel"], [0.0, -0.8 / 1.8], rtol=1e-6)
