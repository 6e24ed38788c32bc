"""The closed forms of the search, against the arrays of the model itself."""

from typing import get_args

import jax.numpy as jnp
import pytest

from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.load import load_toml
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.plan import Calibration, ChipName, Measured, Workload
from qwq_jax.config.weights import parse_weights
from qwq_jax.jobs.plan_worker import described_devices
from qwq_jax.model.cache import cache_spec
from qwq_jax.model.spec import model_spec
from qwq_jax.plan.chips import CHIPS, GB, parse_topology
from qwq_jax.plan.search import (
    Trained,
    TrainWay,
    all_train_choices,
    engine_choices,
    tensor_sizes,
    token_bytes,
    train_choice,
    train_choices,
    weight_bytes,
)
from qwq_jax.sharding import decode_layout, make_mesh

QWQ = load_toml("configs/models/qwq-32b.toml", ModelConfig)


def test_tensor_sizes_are_those_that_a_layout_accepts() -> None:
    assert tensor_sizes(QWQ, 64) == [1, 2, 4, 8]
    for size in tensor_sizes(QWQ, 8):
        decode_layout(make_mesh(MeshConfig(tensor=size))).kv_copies(QWQ.num_heads, QWQ.num_kv_heads)


@pytest.mark.parametrize("weights", [None, "int8", "int4", "int8-head"])
@pytest.mark.parametrize("tensor", [1, 8])
def test_bytes_of_weights_are_those_of_the_model(weights: str | None, tensor: int) -> None:
    """But for norms, biases and the scales of 8 bits, which are less than a part in two hundred."""
    layout = decode_layout(make_mesh(MeshConfig(tensor=tensor)))
    spec = model_spec(QWQ, jnp.bfloat16, weights=None if weights is None else parse_weights(weights))
    total = 0.0
    for array in spec.values():
        bits = 4 if array.dtype == jnp.int4 else 8 * jnp.dtype(array.dtype).itemsize
        extents = layout.sharding(array.axes, array.shape).shard_shape(array.shape)
        size = 1
        for extent in extents:
            size *= extent
        total += size * bits / 8
    assert weight_bytes(QWQ, weights, tensor) == pytest.approx(total, rel=5e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e5m2"])
@pytest.mark.parametrize("tensor", [1, 4, 8])
def test_bytes_of_a_token_are_those_of_the_cache(dtype: str, tensor: int) -> None:
    layout = decode_layout(make_mesh(MeshConfig(tensor=tensor)))
    spec = cache_spec(QWQ, layout, replicas=1, pages=4, page_size=128, dtype=dtype)
    assert token_bytes(QWQ, dtype, tensor) == pytest.approx(spec.nbytes / (4 * 128) / tensor)


def test_choices_fit_and_the_fastest_comes_first() -> None:
    usable = int(33.5 * GB)
    workload = Workload(prompt_tokens=1024, completion_tokens=4096)
    found = engine_choices(
        QWQ, parse_topology("v6e:2x4"), workload, usable=usable, engine=EngineConfig(max_context=16384)
    )
    speeds = [choice.tokens_per_second for choice in found]
    assert speeds == sorted(speeds, reverse=True)
    for choice in found:
        cache = choice.rows * 5120 * token_bytes(QWQ, choice.cache_dtype, choice.mesh.tensor)
        assert weight_bytes(QWQ, choice.weights, choice.mesh.tensor) + cache < usable
    best = found[0]
    assert best.cache_dtype == "int8" and best.weights is not None, "8 bits read half as much"


def test_what_fits_nowhere_gives_no_choice() -> None:
    assert not engine_choices(
        QWQ, parse_topology("v5e:2x2"), Workload(), usable=int(1 * GB), engine=EngineConfig(max_context=16384)
    )
    assert not train_choices(Trained(QWQ, 4096), parse_topology("v5e:4x4"), usable=int(16.9 * GB))


def test_training_meshes_hold_the_state() -> None:
    for choice in train_choices(Trained(QWQ, 16384), parse_topology("v5p:4x4x4"), usable=int(102 * GB)):
        assert choice.way.mesh.size == 64
        assert choice.bytes_needed > 16 * QWQ.num_parameters / 64


def test_memory_that_is_left_is_spent_on_activations_and_rows() -> None:
    """What is kept need not be computed again, and gathering the weights is shared by the rows of a micro-batch."""
    trained, slices = Trained(QWQ, 4096), parse_topology("v5p:4x4x4")
    usable = int(102 * GB)
    [plain, *_], [best, *_] = (
        train_choices(trained, slices, usable=usable),
        all_train_choices(trained, slices, usable=usable),
    )
    assert plain.way.remat and plain.way.rows == 1
    assert best.row_seconds < 0.9 * plain.row_seconds and (not best.way.remat or best.way.rows > 1)
    assert plain.bytes_needed < best.bytes_needed < usable
    mesh = MeshConfig(fsdp=64)
    again, kept = (train_choice(trained, slices, TrainWay(mesh, remat)) for remat in (True, False))
    # Eight operations a weight and token become six.
    assert kept.seconds == pytest.approx(6 / 8 * again.seconds, rel=0.03)
    short, mesh = Trained(QWQ, 512), MeshConfig(fsdp=256)
    one, four = (train_choice(short, parse_topology("v5e:16x16"), TrainWay(mesh, rows=n)) for n in (1, 4))
    assert four.row_seconds < 0.8 * one.row_seconds, "gathering the weights takes longer than computing so short a row"


def test_a_micro_batch_keeps_its_rows_where_they_divide() -> None:
    way = TrainWay(MeshConfig(data=2, fsdp=4))
    assert (way.with_total(32).rows, way.with_total(32).total_rows) == (4, 32)
    assert way.with_total(12) == way


@pytest.mark.parametrize("weights", ["int4-g64", "int8-head"])
@pytest.mark.parametrize("cache", ["float32", "float8_e5m2"])
def test_what_the_user_chose_is_among_the_choices(weights: str, cache: str) -> None:
    engine = EngineConfig(max_context=16384, weights=weights, cache_dtype=cache)  # pyright: ignore[reportArgumentType]
    slices, usable = parse_topology("v5e:4x4"), int(16.9 * GB)
    found = engine_choices(QWQ, slices, Workload(), usable=usable, engine=engine)
    assert (weights, cache) in {(choice.weights, choice.cache_dtype) for choice in found}
    eight = engine.model_copy(update={"weights": "int8", "activations": "int8"})
    found = engine_choices(QWQ, slices, Workload(), usable=usable, engine=eight)
    assert {choice.weights for choice in found} == {"int8"}, "8-bit products need them"


def test_a_group_of_an_exchange_lies_in_no_more_slices_than_it_has_members() -> None:
    mesh = MeshConfig(fsdp=2, context=4, tensor=8)  # of another slice than this one
    assert train_choice(Trained(QWQ, 4096), parse_topology("4*v5e:2x4"), TrainWay(mesh)).seconds > 0


def test_long_rows_are_shared_where_heads_are_not_enough() -> None:
    long = train_choices(Trained(QWQ, 131_072), parse_topology("v5e:16x16"), usable=int(16.9 * GB))
    assert long and all(choice.way.mesh.context > 1 and choice.way.mesh.size == 256 for choice in long)
    # A device has two pieces of a row at least.
    odd = train_choices(Trained(QWQ, 4_099), parse_topology("v5e:16x16"), usable=int(16.9 * GB))
    assert odd and all(choice.way.mesh.context == 1 for choice in odd)


def test_slices_share_out_data_alone() -> None:
    one, two = (
        train_choices(Trained(QWQ, 16_384), parse_topology(name), usable=int(16.9 * GB))
        for name in ("v5e:16x16", "2*v5e:16x16")
    )
    assert [choice.way.mesh.model_copy(update={"data": 2}) for choice in one] == [choice.way.mesh for choice in two]
    assert all(pair[1].way.total_rows == 2 * pair[0].way.total_rows for pair in zip(one, two, strict=True))


def test_prices_and_calibrations_name_the_chips_that_there_are() -> None:
    assert set(get_args(ChipName)) == set(CHIPS)


@pytest.mark.parametrize("topology", ["v5e:16x16", "2*v5e:16x16"])
def test_devices_lie_in_the_meshes_that_are_found(topology: str) -> None:
    """Also where an axis is no product of the torus' own sides."""
    slices = parse_topology(topology)
    devices = tuple(described_devices(slices))
    for choice in train_choices(Trained(QWQ, 131_072), slices, usable=int(16.9 * GB)):
        found = make_mesh(choice.way.mesh, devices).devices
        assert found.size == slices.devices == len(set(found.flat))
        first = {getattr(device, "slice_index", 0) for device in found[0].flat}
        assert len(first) == 1, "one slice"


def test_a_calibration_is_the_mean_of_its_measurements() -> None:
    pair = [Measured(chip="v6e", program="decode", seconds=s, predicted=1.0) for s in (1.0, 4.0)]
    calibration = Calibration(measured=tuple(pair))
    assert calibration.factor("v6e", "decode") == pytest.approx(2.0)
    assert calibration.factor("v5e", "decode") == calibration.factor("v6e", "gradient") == 1.0
