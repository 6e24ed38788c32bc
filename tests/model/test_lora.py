"""LoRA: applied, merged and differentiated against closed forms, whatever the arrangement and the mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.config.load import build, load_toml
from qwq_jax.config.lora import MODULES, LoraConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.train import OptimizerConfig
from qwq_jax.config.weights import parse_weights
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.lora import lora_spec, merge, num_adapter_parameters, random_adapters
from qwq_jax.model.params import bind, random_params, stack, unstack
from qwq_jax.sft.loss import make_sft_loss
from qwq_jax.sharding import make_mesh, train_layout
from qwq_jax.train.batch import place_batch
from qwq_jax.train.optimizer import make_optimizer, make_schedule
from qwq_jax.train.packing import Segment, fill_rows
from qwq_jax.train.state import init_state
from qwq_jax.train.step import accumulate_gradients, make_eval_step, make_train_step, trained_tokens
from qwq_jax.train.weights import abstract_adapters, merged_weights, stacked_shardings
from tests.model.test_quantize import quantized

TOKENS = np.random.default_rng(3).integers(0, 257, (8, 24)).astype(np.int32)
LORAS = [
    LoraConfig(rank=4, alpha=10.0),
    LoraConfig(rank=4, alpha=10.0, rslora=True, target_modules=("q_proj", "v_proj", "down_proj")),
]
MESHES = [
    MeshConfig(data=2, fsdp=2, tensor=2),
    pytest.param(MeshConfig(tensor=8), marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    pytest.param(MeshConfig(fsdp=8), marks=[pytest.mark.slow, pytest.mark.exhaustive]),
]
# The same float32 operations, in another order.
REORDERED = {"rtol": 1e-4, "atol": 2e-5}


def name_of(case) -> str:
    if isinstance(case, MeshConfig):
        return f"{case.data}x{case.fsdp}x{case.tensor}"
    return f"{'rslora' if case.rslora else 'lora'}-{len(case.target_modules)}"


@pytest.fixture(scope="module")
def base(tiny_config):
    """Stacked, with kernels large enough for what an adapter adds to stay a correction."""
    made = jax.jit(lambda: stack(random_params(tiny_config, jax.random.key(0)), 2))()
    return {name: 3 * np.asarray(x) for name, x in made.items()}


def trained(config, lora):
    """Adapters whose B is not zero any more."""
    rng = np.random.default_rng(2)
    spec = lora_spec(config, lora)
    return {name: 0.05 * rng.standard_normal(array.shape, np.float32) for name, array in spec.items()}


def placed(values, config, lora, layout):
    """On the devices of a layout, in arrays of their own."""
    places = stacked_shardings(config, layout)
    places |= {name: x.sharding for name, x in abstract_adapters(config, lora or LoraConfig(), layout=layout).items()}
    return {name: jax.device_put(x, places[name]) for name, x in values.items()}


def logits(config, params, *, lora=None, layout=None, remat=False, weights=None):
    @jax.jit
    def run(params):
        model = bind(config, params, dtype=jnp.float32, remat=remat, weights=weights, lora=lora)
        positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
        return model.logits(model(TOKENS, positions, causal_attend(None, layout))[0])

    return np.asarray(run(params))


def merged_by_hand(base, adapters, alpha_over):
    """float64, from the formula: each layer's A and B as matrices."""
    out = {name: np.asarray(x, np.float64) for name, x in base.items()}
    for name in adapters:
        if name.endswith("_lora.a"):
            a, b = (np.asarray(adapters[name[:-1] + letter], np.float64) for letter in "ab")
            kernel = out[name.replace("_lora.a", "_kernel")]
            for i in range(len(kernel)):
                product = a[i].reshape(-1, a.shape[-1]) @ b[i].reshape(b.shape[1], -1)
                kernel[i] += alpha_over * product.reshape(kernel[i].shape)
    return out


def test_new_adapters_change_nothing(tiny_config, base):
    lora = LORAS[0]
    adapters = random_adapters(tiny_config, lora, jax.random.key(1))
    np.testing.assert_array_equal(logits(tiny_config, base | adapters, lora=lora), logits(tiny_config, base))


@pytest.mark.parametrize("lora", LORAS, ids=name_of)
def test_applied_is_merged_is_the_formula(tiny_config, base, lora):
    adapters = trained(tiny_config, lora)
    by_hand = merged_by_hand(base, adapters, 10 / math.sqrt(4) if lora.rslora else 10 / 4)
    merged = jax.jit(lambda base, adapters: merge(base, adapters, lora))(base, adapters)
    assert merged.keys() == base.keys()
    for name, value in merged.items():
        np.testing.assert_allclose(value, by_hand[name], atol=1e-6, rtol=1e-6, err_msg=name)
    applied = logits(tiny_config, base | adapters, lora=lora)
    np.testing.assert_allclose(applied, logits(tiny_config, merged), **REORDERED)
    assert np.abs(applied - logits(tiny_config, base)).max() > 0.1


def test_layers_one_by_one_and_recomputed_compute_the_same(tiny_config, base):
    lora = LORAS[0]
    adapters = trained(tiny_config, lora)
    applied = logits(tiny_config, base | adapters, lora=lora)
    np.testing.assert_allclose(logits(tiny_config, base | adapters, lora=lora, remat=True), applied, **REORDERED)
    flat, flat_adapters = unstack(base, 2), unstack(adapters, 2)
    np.testing.assert_allclose(logits(tiny_config, flat | flat_adapters, lora=lora), applied, **REORDERED)
    run = jax.jit(lambda base, adapters: merge(base, adapters, lora))
    merged, stacked = run(flat, flat_adapters), run(base, adapters)
    for name, value in stack(merged, 2).items():
        np.testing.assert_allclose(value, stacked[name], rtol=1e-6, atol=1e-7)


def test_adapters_lie_beside_quantised_weights(tiny_config, base):
    lora = LORAS[0]
    weights, small, wide = quantized(tiny_config, unstack(base, 2), "int8-head")
    adapters = unstack(trained(tiny_config, lora), 2)
    got = logits(tiny_config, small | adapters, lora=lora, weights=weights)
    np.testing.assert_allclose(got, logits(tiny_config, wide | adapters, lora=lora), **REORDERED)


@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
def test_the_mesh_changes_neither_values_nor_logits(tiny_config, base, mesh):
    lora, adapters = LORAS[0], trained(tiny_config, LORAS[0])
    layout = train_layout(make_mesh(mesh))
    abstract = abstract_adapters(tiny_config, lora, layout=layout)
    one, many = (random_adapters(tiny_config, lora, jax.random.key(1), where) for where in (None, layout))
    for name, value in many.items():
        np.testing.assert_array_equal(value, one[name])
        told = abstract[name]
        assert (value.shape, value.dtype, value.sharding) == (told.shape, told.dtype, told.sharding)
    spread, spread_adapters = (placed(x, tiny_config, lora, layout) for x in (base, adapters))
    expected = logits(tiny_config, base | adapters, lora=lora)
    applied = logits(tiny_config, spread | spread_adapters, lora=lora, layout=layout)
    np.testing.assert_allclose(applied, expected, **REORDERED)
    merged = merged_weights(spread, spread_adapters, lora)
    assert {name: x.sharding for name, x in merged.items()} == stacked_shardings(tiny_config, layout)
    by_hand = merged_by_hand(base, adapters, 2.5)
    for name, value in merged.items():
        np.testing.assert_allclose(value, by_hand[name], atol=1e-6, rtol=1e-6, err_msg=name)


def test_each_matrix_is_cut_as_its_side_of_the_kernel(tiny_config):
    layout = train_layout(make_mesh(MeshConfig(fsdp=2, tensor=2)))
    specs = {
        name: tuple(x.sharding.spec) for name, x in abstract_adapters(tiny_config, LORAS[0], layout=layout).items()
    }
    assert specs["layers.attention.q_lora.a"] == (None, "fsdp", None)
    assert specs["layers.attention.q_lora.b"] == (None, None, "tensor", None)
    assert specs["layers.attention.o_lora.a"] == (None, "tensor", None, None)
    assert specs["layers.attention.o_lora.b"] == (None, None, "fsdp")
    assert specs["layers.mlp.down_lora.a"] == (None, "tensor", None)
    assert specs["layers.mlp.up_lora.b"] == (None, None, "tensor")


def test_a_merge_in_bfloat16_rounds_once(tiny_config, base):
    lora, adapters = LORAS[0], trained(tiny_config, LORAS[0])
    half = {name: jnp.asarray(x, jnp.bfloat16) for name, x in base.items()}
    merged = jax.jit(lambda half, adapters: merge(half, adapters, lora))(half, adapters)
    exact = merged_by_hand(half, adapters, 2.5)
    for name, value in merged.items():
        assert value.dtype == jnp.bfloat16
        error = np.abs(np.asarray(value, np.float64) - exact[name])
        # Half a unit in the last of 8 bits, and what float32 leaves of a value just between two.
        assert (error <= 2.0**-9 * 2.0 ** np.ceil(np.log2(np.abs(exact[name]) + 1e-30)) * 1.001).all(), name


@pytest.fixture(scope="module")
def packed():
    rng = np.random.default_rng(5)
    lengths = rng.integers(5, 16, 16)
    segments = [Segment(rng.integers(0, 257, n).astype(np.int32), np.arange(n) >= 2) for n in lengths]
    return fill_rows([[segments[2 * i], segments[2 * i + 1]] for i in range(8)], row_length=32)


def gradients(config, lora, params, frozen, packed, *, mesh=None, accumulation=1, remat=False):
    layout = train_layout(make_mesh(mesh or MeshConfig()))
    loss = make_sft_loss(config, layout, compute_dtype="float32", logprob_chunk=16, remat=remat, lora=lora)
    batch = place_batch(packed, accumulation=accumulation, layout=layout)

    @jax.jit
    def run(params, frozen, batch):
        return accumulate_gradients(loss, params, batch, denominator=trained_tokens(batch), frozen=frozen)

    put = lambda values: None if values is None else placed(values, config, lora, layout)  # noqa: E731
    return jax.device_get(run(put(params), put(frozen), batch))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("lora", LORAS, ids=name_of)
def test_gradients_follow_from_those_of_the_merged_kernels(tiny_config, base, packed, lora):
    """dA = s dW B^T and dB = s A^T dW, where dW is the gradient of the merged kernel."""
    adapters = trained(tiny_config, lora)
    ours = gradients(tiny_config, lora, adapters, base, packed)
    merged = jax.jit(lambda base, adapters: merge(base, adapters, lora))(base, adapters)
    full = gradients(tiny_config, None, merged, None, packed)
    assert ours.value == pytest.approx(full.value, rel=1e-5)
    assert ours.params.keys() == adapters.keys()
    for name in adapters:
        if name.endswith(".b"):
            continue
        a, b = (np.asarray(adapters[name[:-1] + letter], np.float64) for letter in "ab")
        kernel = np.asarray(full.params[name.replace("_lora.a", "_kernel")], np.float64)
        for i in range(tiny_config.num_layers):
            A, B = a[i].reshape(-1, lora.rank), b[i].reshape(lora.rank, -1)
            W = kernel[i].reshape(len(A), -1)
            for got, want in (
                (ours.params[name][i].reshape(A.shape), lora.scale * W @ B.T),
                (ours.params[name[:-1] + "b"][i].reshape(B.shape), lora.scale * A.T @ W),
            ):
                np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=name)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", MESHES[:2], ids=name_of)
def test_micro_batches_remat_and_the_mesh_do_not_change_gradients(tiny_config, base, packed, mesh):
    lora, adapters = LORAS[0], trained(tiny_config, LORAS[0])
    one = gradients(tiny_config, lora, adapters, base, packed)
    many = gradients(tiny_config, lora, adapters, base, packed, mesh=mesh, accumulation=2, remat=True)
    for name, expected in one.params.items():
        np.testing.assert_allclose(
            many.params[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name
        )


def product_shapes(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of all matrix products, also inside scans and the like."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(tuple(equation.outvars[0].aval.shape))
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
        ):
            if isinstance(inner, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
                found |= product_shapes(inner.jaxpr if isinstance(inner, jax.extend.core.ClosedJaxpr) else inner)
    return found


@pytest.mark.parametrize("remat", [False, True])
def test_no_gradient_of_a_frozen_kernel_is_ever_computed(tiny_config, base, packed, remat):
    lora, adapters = LORAS[0], trained(tiny_config, LORAS[0])
    layout = train_layout(make_mesh(MeshConfig()))
    batch = place_batch(packed, accumulation=2, layout=layout)

    def products(lora, params, frozen):
        loss = make_sft_loss(tiny_config, layout, compute_dtype="float32", logprob_chunk=16, remat=remat, lora=lora)
        run = lambda params, frozen: accumulate_gradients(  # noqa: E731
            loss, params, batch, denominator=trained_tokens(batch), frozen=frozen
        )
        return product_shapes(jax.make_jaxpr(run)(params, frozen).jaxpr)

    kernels = {tuple(x.shape[1:]) for name, x in base.items() if "mlp" in name and name.endswith("kernel")}
    flipped = kernels | {shape[::-1] for shape in kernels}
    assert flipped & products(None, base, None), "the gradient of a kernel has its shape"
    assert not flipped & products(lora, adapters, base)


@pytest.mark.slow
def test_a_step_trains_adapters_and_leaves_the_model_alone(tiny_config, base, packed):
    lora = LORAS[0]
    layout = train_layout(make_mesh(MeshConfig(fsdp=2, tensor=2)))
    frozen = placed({name: x.astype(jnp.bfloat16) for name, x in base.items()}, tiny_config, lora, layout)
    before = {name: np.array(x) for name, x in frozen.items()}
    schedule = make_schedule(OptimizerConfig(learning_rate=1e-2), steps=8)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, weight_decay=0.01), schedule=schedule)
    state = init_state(random_adapters(tiny_config, lora, jax.random.key(1), layout), optimizer)
    loss = make_sft_loss(tiny_config, layout, compute_dtype="float32", logprob_chunk=16, remat=True, lora=lora)
    step = make_train_step(loss, optimizer, shardings=jax.tree.map(lambda x: x.sharding, state))
    batch = place_batch(packed, accumulation=2, layout=layout)
    given = jax.tree.leaves(step.lower(state, batch, frozen).args_info[0][2])
    assert len(given) == len(frozen) and not any(array.donated for array in given)
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch, frozen)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3
    for name, value in before.items():
        np.testing.assert_array_equal(frozen[name], value)
    # The model's weights have no moments: the whole state is three numbers a trained parameter, and two counters more.
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert sum(sizes) == 3 * num_adapter_parameters(tiny_config, lora) + 3
    assert {x.dtype for x in state.params.values()} == {jnp.dtype(jnp.float32)}
    value, tokens = make_eval_step(loss)(state.params, batch, frozen)
    assert float(value) / int(tokens) < losses[-1]


def test_what_is_frozen_is_not_trained_too(tiny_config, base, packed):
    with pytest.raises(AssertionError, match="trained and frozen"):
        gradients(tiny_config, None, base, {"final_norm.scale": base["final_norm.scale"]}, packed)


@pytest.mark.parametrize("name", ["layers.attention.o_lora.a", "layers.mlp.gate_lora.a", "layers.mlp.down_lora.a"])
def test_a_begins_uniform_in_one_over_the_root_of_its_inputs(tiny_config, name):
    adapters = random_adapters(tiny_config, LoraConfig(rank=64), jax.random.key(0))
    a = np.asarray(adapters[name])
    inputs = np.prod(a.shape[1:-1])
    assert np.abs(a).max() <= 1 / math.sqrt(inputs)
    assert a.var() == pytest.approx(1 / (3 * inputs), rel=0.05)  # 16,384 draws or more
    assert all(not np.any(x) for path, x in adapters.items() if path.endswith(".b"))
    assert not np.array_equal(adapters["layers.mlp.gate_lora.a"], adapters["layers.mlp.up_lora.a"])


def test_parameters_of_qwq_32b_at_rank_32():
    config = load_toml("configs/models/qwq-32b.toml", ModelConfig)
    lora = LoraConfig(rank=32)
    wide, kv, inner = 5120, 8 * 128, 27648
    sides = [(wide, wide), (wide, kv), (wide, kv), (wide, wide), (wide, inner), (wide, inner), (inner, wide)]
    assert num_adapter_parameters(config, lora) == 64 * 32 * sum(map(sum, sides)) == 268_435_456
    only = lora.model_copy(update={"target_modules": ("k_proj",)})
    assert lora_spec(config, only).keys() == {"layers.attention.k_lora.a", "layers.attention.k_lora.b"}


def test_bad_settings_are_one_sentence():
    known = f'expected "all-linear" or a list of some of {", ".join(MODULES)}, got '
    for override, sentence in [
        ("rank=0", "rank: expected greater than 0, got 0"),
        ("alpha=-1", "alpha: expected greater than 0, got -1"),
        ("dropout=0.1", "dropout: adapters are trained without dropout here; leave the key out"),
        ("lora_dropout=0.1", "lora_dropout: adapters are trained without dropout"),
        ("target_modules=q_proj", f"target_modules: {known}'q_proj'"),
        ('target_modules=["q_proj", "lm_head"]', f"target_modules: {known}('q_proj', 'lm_head')"),
        ("target_modules=[]", f"target_modules: {known}()"),
        ('target_modules=["q_proj", "q_proj"]', "a module is named twice"),
        ("alhpa=1", "alhpa: unknown key, did you mean alpha?"),
    ]:
        with pytest.raises(ValueError) as caught:
            build(LoraConfig, {}, [override], source="settings")
        assert sentence in str(caught.value)
    assert build(LoraConfig, {}, ["target_modules=all-linear"], source="settings") == LoraConfig()
    ordered = build(LoraConfig, {}, ['target_modules=["down_proj", "q_proj"]'], source="settings")
    assert ordered.target_modules == ("q_proj", "down_proj")


def test_adapters_without_settings_are_refused(tiny_config, base):
    adapters = trained(tiny_config, LORAS[1])
    with pytest.raises(ValueError, match=r"unknown to it: layers\.attention\.q_lora\.a"):
        bind(tiny_config, base | adapters, dtype=jnp.float32)
    with pytest.raises(ValueError, match="are missing from the model"):
        bind(tiny_config, base, dtype=jnp.float32, lora=LORAS[1])


def test_quantised_formats_are_not_merged(tiny_config, base):
    _, small, _ = quantized(tiny_config, unstack(base, 2), "int8-head")
    assert parse_weights("int8-head").head
    with pytest.raises(AssertionError, match="is quantised"):
        merge(small, unstack(trained(tiny_config, LORAS[0]), 2), LORAS[0])
