import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.errors import JaxRuntimeError
from jax.sharding import NamedSharding, PartitionSpec

from qwq_jax.checkpoint import train_store
from qwq_jax.checkpoint.train_store import MARKER, TrainStore
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.runtime import hide_abandoned_reads
from qwq_jax.sharding import make_mesh
from qwq_jax.train.state import TrainState


def state(value, mesh=None, spec=None):
    sharding = NamedSharding(make_mesh(mesh or MeshConfig()), spec or PartitionSpec())
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    kernel = jax.device_put(jnp.arange(32.0).reshape(8, 4) + value, sharding)
    count = jax.device_put(jnp.int32(value), replicated)
    return TrainState({"layers.mlp.up_kernel": kernel}, ({"count": count}, kernel * 2), count)


def described(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def test_what_was_saved_comes_back_on_any_mesh(tmp_path):
    store = TrainStore(epath.Path(tmp_path / "checkpoints"))
    store.save(3, state(1), {"stream": {"next_index": 3}}, metric=0.5)
    target = state(0, MeshConfig(fsdp=8), PartitionSpec("fsdp"))
    restored = store.restore(3, described(target))
    assert same(restored, state(1))
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)
    assert store.record(3) == {"stream": {"next_index": 3}} and store.metric(3) == 0.5


def test_the_newest_and_the_best_are_kept(tmp_path):
    store = TrainStore(epath.Path(tmp_path), keep=2)
    for step, metric in [(1, 0.9), (2, 0.4), (3, 0.7), (4, None), (5, 0.6)]:
        store.save(step, state(step), {}, metric=metric)
    assert store.steps() == [2, 4, 5] and store.best_step() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000004", "step_00000005"]


def test_nobody_goes_on_before_the_old_checkpoints_are_gone(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(train_store, "barrier", lambda name: seen.update({name: sorted(os.listdir(tmp_path))}))
    store = TrainStore(epath.Path(tmp_path), keep=1)
    for step in (1, 2):
        store.save(step, state(step), {})
    assert seen[list(seen)[-1]] == ["step_00000002"]


def test_record_and_marker_are_durable(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino) or fsync(file))
    TrainStore(epath.Path(tmp_path)).save(1, state(1), {})
    for name in ("record.json", MARKER, "."):
        assert (tmp_path / "step_00000001" / name).stat().st_ino in synced, name


def test_a_checkpoint_without_its_marker_is_none_and_is_removed(tmp_path):
    store = TrainStore(epath.Path(tmp_path))
    store.save(1, state(1), {})
    store.save(2, state(2), {})
    (tmp_path / "step_00000002" / MARKER).unlink()
    assert store.steps() == [1]
    store.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_save_that_fails_half_way_leaves_the_older_checkpoint_and_can_be_repeated(tmp_path, monkeypatch):
    store = TrainStore(epath.Path(tmp_path))
    store.save(1, state(1), {})
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="cannot write .*step_00000002: no room"):
        patch.setattr(ocp.Checkpointer, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("no room")))
        store.save(2, state(2), {})
    assert store.steps() == [1]
    store.save(2, state(2), {})
    assert same(store.restore(2, described(state(0))), state(2))


def test_other_arrays_are_refused(tmp_path):
    store = TrainStore(epath.Path(tmp_path))
    saved = state(1)
    store.save(1, saved, {})
    other = TrainState({"final_norm.scale": jnp.ones(3)}, saved.opt_state, saved.step)
    with pytest.raises(ValueError, match=r"holds no params\|final_norm.scale"):
        store.restore(1, described(other))
    wider = TrainState({"layers.mlp.up_kernel": jnp.ones((8, 5))}, saved.opt_state, saved.step)
    with pytest.raises(ValueError, match=r"up_kernel has shape \(8, 4\), this configuration needs \(8, 5\)"):
        store.restore(1, described(wider))


def lose(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [lose, empty, flip_a_bit])
@pytest.mark.parametrize(
    "name",
    ["record.json", "arrays/_METADATA", "arrays/array_metadatas/process_0", "arrays/manifest.ocdbt", "arrays/d/*"],
)
def test_damage_is_one_sentence(tmp_path, name, harm):
    if harm is lose and "array_metadatas" in name:
        return  # Orbax does without
    store = TrainStore(epath.Path(tmp_path))
    store.save(1, state(1), {"stream": {}}, metric=0.5)
    for path in (tmp_path / "step_00000001").glob(name):
        harm(path)
    hide_abandoned_reads()
    with pytest.raises(ValueError, match="step_00000001.* is damaged or incomplete") as caught:
        store.record(1)
        store.restore(1, described(state(0)))
    assert "\n" not in str(caught.value)


def test_a_record_of_something_else_is_damage(tmp_path):
    store = TrainStore(epath.Path(tmp_path))
    store.save(1, state(1), {})
    (tmp_path / "step_00000001" / "record.json").write_text("[1]")
    with pytest.raises(ValueError, match="record.json is damaged or incomplete: it holds no record of a step"):
        store.metric(1)


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    def restore(self, *args, **kwargs):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    store = TrainStore(epath.Path(tmp_path))
    store.save(1, state(1), {})
    monkeypatch.setattr(ocp.Checkpointer, "restore", restore)
    with pytest.raises(ValueError, match="step_00000001: its arrays do not fit the memory of the devices"):
        store.restore(1, described(state(0)))
