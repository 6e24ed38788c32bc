"""Layouts: what is cut, what is replicated on purpose, what is refused."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.topologies import get_topology_desc
from jax.sharding import PartitionSpec as P

from qwq_jax.config.mesh import MeshConfig
from qwq_jax.model.spec import model_spec
from qwq_jax.sharding import decode_layout, make_mesh, rearranged, train_layout, zigzag


def test_specs_of_a_weight():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes = ("embed", "heads", None)
    assert train_layout(mesh).spec(axes, (64, 8, 16)) == P("fsdp", "tensor", None)
    assert decode_layout(mesh).spec(axes, (64, 8, 16)) == P(None, "tensor", None)
    assert train_layout(mesh).spec(("batch", None)) == P(("data", "fsdp"), None)


def test_kv_heads_and_odd_vocabularies_are_replicated():
    layout = decode_layout(make_mesh(MeshConfig(tensor=8)))
    assert layout.spec(("embed", "kv_heads", None), (64, 2, 16)) == P(None, None, None)
    assert layout.spec(("vocab", "embed"), (257, 64)) == P(None, None)
    assert layout.spec(("vocab", "embed"), (256, 64)) == P("tensor", None)


def test_a_dimension_that_must_divide_is_refused():
    layout = decode_layout(make_mesh(MeshConfig(tensor=8)))
    with pytest.raises(ValueError, match=r"size 12 \(mlp\) cannot be split over 8 devices of the mesh axes tensor"):
        layout.spec(("embed", "mlp"), (64, 12))
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
        layout.spec(("width",))


@pytest.mark.parametrize(("N", "K", "tensor", "copies"), [(40, 8, 8, 1), (8, 2, 8, 4), (14, 2, 2, 1), (16, 2, 4, 2)])
def test_kv_copies(N, K, tensor, copies):
    assert decode_layout(make_mesh(MeshConfig(tensor=tensor))).kv_copies(N, K) == copies


def test_heads_that_cannot_be_split_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="14 query heads and 2 kv heads .* axis of 8; it must be one of 1, 2, 7, 14"):
        decode_layout(make_mesh(MeshConfig(tensor=8))).kv_copies(14, 2)


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ValueError, match="data=4 x fsdp=1 x tensor=4 needs 16 devices; 8 are present"):
        make_mesh(MeshConfig(data=4, tensor=4))


def test_a_smaller_mesh_uses_the_first_devices_and_says_so(caplog):
    with caplog.at_level("INFO", logger="qwq_jax.sharding"):
        make_mesh(MeshConfig(data=8))
        assert not caplog.messages
        assert make_mesh(MeshConfig(tensor=2)).devices.ravel().tolist() == jax.devices()[:2]
    [message] = caplog.messages
    assert "uses 2 of 8 devices" in message


def test_several_processes_must_use_every_device():
    of_two_hosts = [SimpleNamespace(process_index=index // 4) for index in range(8)]
    with pytest.raises(ValueError, match="tensor=2 leaves 6 of 8 devices out; with several processes it must use all"):
        make_mesh(MeshConfig(tensor=2), of_two_hosts)
    # Those of one process may be used in part.
    assert make_mesh(MeshConfig(tensor=2), jax.devices()).devices.size == 2


@pytest.mark.parametrize("parts", [1, 2, 4, 16])
def test_every_device_has_as_much_attention_to_do(parts):
    order = zigzag(3840, parts)
    assert sorted(order) == list(range(3840))
    visible = [int((share + 1).sum()) for share in np.split(order, parts)]
    assert max(visible) <= 1.05 * np.mean(visible), "query t sees t + 1 keys"


def test_a_row_that_cannot_be_dealt_is_refused():
    with pytest.raises(ValueError, match="a row of 12 tokens does not divide into 8 pieces, two for each of 4"):
        zigzag(12, 4)


@pytest.mark.filterwarnings("ignore")  # libtpu looks for the machine it is on, and says that there is none
def test_only_data_goes_between_slices(monkeypatch):
    pytest.importorskip("libtpu", reason="the TPU compiler runs on Linux only")
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")):
        monkeypatch.setenv(name, value)
    devices = get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    assert mesh.devices.shape == (2, 2, 1, 2)
    assert [{device.slice_index for device in half.flat} for half in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="mesh.data=1: these devices are of 2 slices, .* multiple of 2"):
        make_mesh(MeshConfig(tensor=8), devices)


def test_one_program_has_arrays_on_both_arrangements_of_its_devices():
    """A network may give the devices an order for one shape that it would not give them for the other."""
    around = [0, 1, 2, 3, 7, 6, 5, 4]
    mesh = rearranged(make_mesh(MeshConfig(fsdp=8), [jax.devices()[i] for i in around]), MeshConfig(fsdp=8))
    other = rearranged(mesh, MeshConfig(data=2, tensor=4))
    assert [device.id for device in mesh.devices.flat] == [device.id for device in other.devices.flat] == around
    x = jax.device_put(jnp.arange(64.0).reshape(8, 8), train_layout(mesh).sharding(("embed", "mlp")))
    moved = jax.jit(lambda x: 2 * x, out_shardings=decode_layout(other).sharding(("embed", "mlp")))(x)
    np.testing.assert_array_equal(moved, 2 * np.arange(64.0).reshape(8, 8))
    place = decode_layout(make_mesh(MeshConfig(data=2, tensor=4))).sharding(("embed", "mlp"))
    with pytest.raises(ValueError, match="incompatible devices"):
        jax.jit(lambda x: 2 * x, out_shardings=place)(x)


def test_every_parameter_has_a_place_on_every_mesh(tiny_config):
    for tensor in (1, 2, 4, 8):
        layout = decode_layout(make_mesh(MeshConfig(tensor=tensor)))
        for array in model_spec(tiny_config).values():
            layout.sharding(array.axes, array.shape)
