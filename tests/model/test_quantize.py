"""Quantised projections against closed forms, and against the same model with its weights turned back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.weights import WeightFormat, choose_weights, parse_weights
from qwq_jax.kernels.attention import Target
from qwq_jax.model.attention import causal_attend
from qwq_jax.model.params import bind, random_params
from qwq_jax.model.quantize import (
    check_activations,
    dequantize_host,
    grouped_product,
    kernel_format,
    pack,
    quantize,
    quantize_host,
    quantize_rows,
    unpack,
    unpack_host,
    widened_product,
)
from qwq_jax.model.spec import model_spec
from qwq_jax.sharding import decode_layout, make_mesh

FORMATS = ["int8-head", "int4-g16"]
TOKENS = np.random.default_rng(3).integers(0, 257, (2, 24))


def quantized(config, params, name):
    """Quantised parameters, and float32 ones of the same values, made with numpy."""
    weights = parse_weights(name)
    spec, target = model_spec(config, jnp.float32), model_spec(config, jnp.float32, weights)
    formats = {
        path: kernel_format(weights, spec[path].shape, spec[path].axes) for path in spec if f"{path}_scale" in target
    }
    pairs = jax.jit(lambda params: {path: quantize(params[path], format) for path, format in formats.items()})(params)
    small, wide = dict(params), dict(params)
    for path, (q, scale) in pairs.items():
        small[path], small[f"{path}_scale"] = q, scale
        spread = np.expand_dims(np.asarray(scale), formats[path].summed)
        wide[path] = jnp.asarray((np.asarray(q).astype(np.float32) * spread).reshape(params[path].shape))
    return weights, small, wide


def logits(config, params, weights, layout=None):
    @jax.jit
    def run(params):
        model = bind(config, params, dtype=jnp.float32, weights=weights)
        hidden, _ = model(TOKENS, jnp.tile(jnp.arange(24), (2, 1)), causal_attend(None, layout))
        return model.logits(hidden), model.head_matrix()

    return jax.device_get(run(params))


@pytest.mark.parametrize("name", FORMATS)
def test_the_model_computes_with_the_values_that_are_stored(tiny_config, name):
    params = random_params(tiny_config, jax.random.key(0))
    weights, small, wide = quantized(tiny_config, params, name)
    spec = model_spec(tiny_config, jnp.float32, weights)
    assert {path: (a.shape, a.dtype) for path, a in small.items()} == {p: (s.shape, s.dtype) for p, s in spec.items()}
    (got, head), (want, wide_head) = logits(tiny_config, small, weights), logits(tiny_config, wide, None)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    np.testing.assert_allclose(head, wide_head, rtol=1e-6)


def test_8_bits_change_logits_little_and_8_bit_activations_a_little_more(tiny_config):
    params = random_params(tiny_config, jax.random.key(0))
    exact = logits(tiny_config, params, None)[0]
    weights, small, _ = quantized(tiny_config, params, "int8")
    alone, both = (
        np.abs(logits(tiny_config, small, weights.model_copy(update={"activations": bits}))[0] - exact).mean()
        for bits in (16, 8)
    )
    assert 0 < alone < both < 0.05 * exact.std()


@pytest.mark.parametrize("name", ["int8", "int4-g16"])
def test_shards_compute_what_one_device_does(tiny_config, name):
    """With o and down cut along their contraction, and scales of all shards alike."""
    config = tiny_config.model_copy(update={"vocab_size": 256, "eos_token_ids": (255,)})
    params = random_params(config, jax.random.key(0))
    weights, small, _ = quantized(config, params, name)
    layout = decode_layout(make_mesh(MeshConfig(tensor=8)))
    spec = model_spec(config, jnp.float32, weights)
    placed = {p: jax.device_put(a, layout.sharding(spec[p].axes, a.shape)) for p, a in small.items()}
    got, want = logits(config, placed, weights, layout)[0], logits(config, small, weights)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize(("bits", "group", "largest"), [(8, None, 127), (4, 32, 7)])
def test_host_and_device_give_the_same_bits(rng, bits, group, largest):
    matrix = rng.standard_normal((48, 128)).astype("bfloat16")
    matrix[3] = 0
    q, scale = quantize_host(matrix, bits, group)
    wide = matrix.astype(np.float32).reshape(48, -1, group or 128)
    biggest = np.abs(wide).max(-1)
    np.testing.assert_allclose(scale, np.where(biggest == 0, 1, biggest / largest), rtol=2e-7)  # an ulp
    assert np.abs(q).max() == largest
    back = dequantize_host(q, scale).reshape(wide.shape)
    assert (np.abs(back - wide) <= 0.5001 * scale[..., None]).all(), "not rounded to the nearest"
    weights = WeightFormat(bits=bits, group=group)
    format = kernel_format(weights, (128, 48), ("embed", "mlp"))
    on_device = jax.jit(lambda w: quantize(w, format))(matrix.T)
    np.testing.assert_array_equal(np.asarray(on_device[0]).astype(np.int8).reshape(128, 48), q.T)
    np.testing.assert_array_equal(np.asarray(on_device[1]).reshape(-1, 48), scale.T)


@pytest.mark.parametrize(
    ("equation", "shape", "axes"),
    [
        ("btd,dnh->btnh", (64, 4, 8), ("embed", "heads", None)),
        ("btnh,nhd->btd", (4, 32, 24), ("heads", None, "embed")),
        ("btf,fd->btd", (256, 24), ("mlp", "embed")),
    ],
)
def test_both_products_with_4_bit_weights_are_the_same(rng, equation, shape, axes):
    """One is what TPUs compute, one what others do; against float64."""
    format = kernel_format(parse_weights("int4-g16"), shape, axes)
    q, scale = quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), format)
    x = rng.standard_normal((2, 3, *(shape[:2] if axes[0] == "heads" else shape[:1]))).astype(np.float32)
    wide = np.asarray(q).astype(np.float64) * np.expand_dims(np.asarray(scale, np.float64), format.summed)
    want = np.einsum(equation, x.astype(np.float64), wide.reshape(shape))
    for product in (grouped_product, widened_product):
        np.testing.assert_allclose(product(equation, x, q, scale), want, atol=1e-4)  # float32 sums of 256


def test_ties_go_to_even():
    matrix = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)
    assert quantize_host(matrix, 8, None)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_rows_of_activations_have_a_scale_each(rng):
    x = rng.standard_normal((3, 5, 64)).astype(np.float32) * np.array([1e-3, 1, 1e3])[:, None, None]
    q, scale = quantize_rows(jnp.asarray(x))
    assert q.dtype == jnp.int8 and (np.abs(np.asarray(q)).max(-1) == 127).all()
    assert (np.abs(np.asarray(q * scale) - x) <= 0.501 * np.asarray(scale)).all()


def test_packing_keeps_every_4_bit_value():
    q = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    assert pack(q).shape == (2, 4) and pack(q).dtype == np.uint8
    np.testing.assert_array_equal(unpack_host(pack(q)), q)
    np.testing.assert_array_equal(np.asarray(unpack(pack(q).T)).astype(np.int8), q.T)


@pytest.mark.parametrize(
    ("shape", "axes", "group"),
    [
        ((27648, 5120), ("mlp", "embed"), 128),  # 32B: 3,456 a shard
        ((18944, 3584), ("mlp", "embed"), 64),  # 7B: 2,368 a shard
        ((40, 128, 5120), ("heads", None, "embed"), 128),
        ((14, 64, 896), ("heads", None, "embed"), 64),
        ((5120, 40, 128), ("embed", "heads", None), 128),
    ],
)
def test_groups_lie_within_shards(shape, axes, group):
    format = kernel_format(parse_weights("int4"), shape, axes)
    assert format.group == group
    (scale, scale_axes), (kernel, kernel_axes) = format.scale(shape, axes), format.kernel(shape, axes)
    assert np.prod(kernel) == np.prod(shape) == np.prod(scale) * group
    for sizes, names in ((scale, scale_axes), (kernel, kernel_axes)):
        assert all(
            size % 8 == 0 for size, name in zip(sizes, names, strict=True) if name in ("mlp", "heads") and size > 14
        )


def test_what_cannot_be_quantised_is_refused(tiny_config):
    with pytest.raises(ValueError, match="4-bit weights need groups of 16 or more .* 88 x 64 does not have; use int8"):
        kernel_format(parse_weights("int4"), (88, 64), ("mlp", "embed"))
    tied = tiny_config.model_copy(update={"tie_word_embeddings": True})
    with pytest.raises(ValueError, match="int8-head: this model's head is its embedding"):
        model_spec(tied, weights=parse_weights("int8-head"))


@pytest.mark.parametrize("name", ["int3", "int4-g", "int4-g48", "int4-g8", "int8-g64", "INT8", "int8-a8"])
def test_names_of_formats_are_checked(name):
    with pytest.raises(ValueError, match=f"weights '{name}'"):
        EngineConfig(weights=name)


def test_names_of_formats_return():
    for name in ("int8", "int8-head", "int4", "int4-g32", "int4-g64-head"):
        assert parse_weights(name).name == name == EngineConfig(weights=name).weights


def test_the_format_that_runs_is_the_checkpoints_unless_it_has_none():
    int8 = parse_weights("int8")
    assert choose_weights(None, None, None) is None
    assert choose_weights(int8, None, None) == choose_weights(None, "int8", None) == int8
    assert choose_weights(int8, "int8", "int8").activations == 8
    with pytest.raises(ValueError, match=r"engine.weights=int4, but the checkpoint holds int8 weights"):
        choose_weights(int8, "int4", None)
    with pytest.raises(ValueError, match="engine.activations=int8 multiplies 8-bit weights, but these are int4"):
        choose_weights(None, "int4", "int8")
    with pytest.raises(ValueError, match="not quantised: set engine.weights=int8"):
        choose_weights(None, None, "int8")


def test_8_bit_activations_need_a_chip_that_multiplies_them():
    both = choose_weights(None, "int8", "int8")
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        check_activations(both, Target("tpu", kind))
    check_activations(both, Target("cpu", "cpu"))
    check_activations(parse_weights("int8"), Target("tpu", "TPU v4"))
    with pytest.raises(ValueError, match="engine.activations=int8 needs a TPU that multiplies int8 .* not TPU v4"):
        check_activations(both, Target("tpu", "TPU v4"))
