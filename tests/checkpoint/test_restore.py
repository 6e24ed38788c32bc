"""A checkpoint restores onto meshes, and without any of our code by plain Orbax."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qwq_jax.checkpoint import open_checkpoint, read_param, restore_params
from qwq_jax.checkpoint.store import chunk_grid
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.jobs.convert import convert
from qwq_jax.model.spec import ArraySpec
from qwq_jax.sharding import decode_layout, make_mesh, train_layout
from tests.checkpoint.sources import make_source


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("restore")
    convert(str(make_source(root / "hf", dtype="bfloat16")), str(root / "ours"))
    return str(root / "ours")


def assert_equals_stored(path: str, params: dict[str, jax.Array], dtype=None) -> None:
    checkpoint = open_checkpoint(path)
    assert params.keys() == checkpoint.spec.keys()
    for name, array in params.items():
        want = read_param(checkpoint, name)
        want = want if dtype is None else want.astype(dtype)
        assert array.dtype == want.dtype and np.asarray(array).tobytes() == want.tobytes(), name


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (1, 8, 1), (4, 1, 2)])
def test_onto_a_mesh(path: str, train: bool, mesh: tuple[int, int, int]) -> None:
    devices = make_mesh(MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]))
    layout = train_layout(devices) if train else decode_layout(devices)
    checkpoint = open_checkpoint(path)
    params = restore_params(checkpoint, layout)
    for name, spec in checkpoint.spec.items():
        assert params[name].sharding == layout.sharding(spec.axes, spec.shape), name
    assert_equals_stored(path, params)


def test_converted_to_float32_on_the_way(path: str) -> None:
    layout = train_layout(make_mesh(MeshConfig(fsdp=4, tensor=2)))
    assert_equals_stored(path, restore_params(open_checkpoint(path), layout, jnp.float32), np.float32)


def test_onto_one_device(path: str) -> None:
    assert_equals_stored(path, restore_params(open_checkpoint(path), None))


def abstract(path: str) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = open_checkpoint(path).spec
    return {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for name, s in spec.items()}


def test_plain_orbax_restores_it(path: str) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        assert_equals_stored(path, checkpointer.restore(f"{path}/params", abstract(path)))
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(f"{path}/params").item_metadata
        assert metadata["layers.1.mlp.up_kernel"].shape == (40, 56)


def test_orbax_v1_restores_it(path: str) -> None:
    from orbax.checkpoint import v1

    assert_equals_stored(path, v1.load(f"{path}/params", abstract(path)))


def test_chunks_follow_the_axes_that_meshes_cut() -> None:
    gate = ArraySpec((5120, 27648), jnp.bfloat16, ("embed", "mlp"))
    assert chunk_grid(gate) == ((640, 27648), (320, 1728))
    embedding = ArraySpec((152064, 5120), jnp.bfloat16, ("vocab", "embed"))
    assert chunk_grid(embedding)[1] == (9504, 320)
    query = ArraySpec((5120, 40, 128), jnp.bfloat16, ("embed", "heads", None))
    assert chunk_grid(query)[1] == (320, 5, 128)
    for spec in (gate, embedding, query, ArraySpec((7, 3), jnp.float32, ("vocab", "embed"))):
        shard, chunk = chunk_grid(spec)
        assert all(whole % s == 0 and s % c == 0 for whole, s, c in zip(spec.shape, shard, chunk, strict=True))
        assert np.prod(shard) * np.dtype(spec.dtype).itemsize <= 100 << 20


def test_a_directory_without_its_marker_is_no_checkpoint(path: str, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    open_checkpoint(str(copy))
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text().replace("q_kernel", "k_kernel", 1))
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        open_checkpoint(str(copy))
    (copy / "COMMITTED").unlink()
    with pytest.raises(ValueError, match="is not a checkpoint: its conversion never finished"):
        open_checkpoint(str(copy))
    with pytest.raises(ValueError, match="is not a checkpoint: it has no COMMITTED"):
        open_checkpoint(str(tmp_path))
