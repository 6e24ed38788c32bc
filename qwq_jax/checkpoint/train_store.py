"""Checkpoints of a running training job: everything needed to go on as if it had never stopped.

One directory a step::

    checkpoints/
      step_00000200/
        arrays/        parameters, optimizer state: one Orbax tree, each array written by the processes that hold it
        record.json    whatever else the job must remember: data position, metric, fingerprint of its data
        COMMITTED      written last, removed first

Only a directory with its marker is a checkpoint. A crash at any point, also while an old checkpoint is being deleted
and also on an object store without atomic renames, leaves at worst a directory without a marker, which the next start
removes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from qwq_jax.checkpoint.damage import restoring
from qwq_jax.checkpoint.directory import open_directory

MARKER = "COMMITTED"


@dataclass(frozen=True)
class TrainStore:
    """The checkpoints of one run, newest `keep` of them and the one with the least `metric`.

    Attributes:
        directory: Where they are, local or ``gs://``.
        keep: How many of the newest stay.
    """

    directory: epath.Path
    keep: int = 2

    def __post_init__(self) -> None:
        # Orbax takes absolute paths only; users write relative ones, and a bucket's is absolute as it is.
        if "://" not in str(self.directory):
            object.__setattr__(self, "directory", self.directory.absolute())

    def steps(self) -> list[int]:
        """Steps that can be restored, oldest first."""
        if not self.directory.exists():
            return []
        return sorted(step for step, path in self._directories() if (path / MARKER).exists())

    def best_step(self) -> int | None:
        """The step of the least metric, the earliest of equals, or ``None`` if none has a metric."""
        scored = [(metric, step) for step in self.steps() if (metric := self.metric(step)) is not None]
        return min(scored)[1] if scored else None

    def metric(self, step: int) -> float | None:
        """What the checkpoint was saved with."""
        return self._read_record(step)["metric"]

    def record(self, step: int) -> dict[str, Any]:
        """The record the checkpoint was saved with."""
        return self._read_record(step)["record"]

    def save(self, step: int, arrays: Any, record: Mapping[str, Any], *, metric: float | None = None) -> None:
        """Writes and commits a checkpoint, then deletes the ones that are no longer kept. Every process calls it.

        Saving a step that is there already does nothing.
        """
        if step in self.steps():
            return
        path = self._path(step)
        if jax.process_index() == 0:
            if path.exists():
                path.rmtree()
            path.mkdir(parents=True)
        barrier(f"train_store_open_{step}")
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            try:
                checkpointer.save(path / "arrays", args=ocp.args.PyTreeSave(flatten(arrays)))
            except Exception as error:  # Orbax raises nothing narrower for what its storage meets
                full = re.search(r"RESOURCE_EXHAUSTED|No space left|os_error_code='28'", str(error))
                reason = (
                    "no space is left on the device"
                    if full
                    else (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                )
                raise ValueError(f"cannot write {path}: {reason}") from error
        if jax.process_index() == 0:
            directory = open_directory(str(path))
            directory.sync("arrays")
            directory.write("record.json", json.dumps({"metric": metric, "record": dict(record)}, indent=2).encode())
            directory.write(MARKER, b"committed\n")
            self._prune()
        # Nobody looks at the directory while it changes.
        barrier(f"train_store_commit_{step}")

    def restore(self, step: int, target: Any) -> Any:
        """Reads a checkpoint into the structure of `target`, a tree of ``ShapeDtypeStruct`` with shardings.

        Raises:
            ValueError: The checkpoint holds other arrays, or other shapes, than `target`, or is damaged, or does not
                fit the memory of the devices.
        """
        wanted = flatten(target)
        path = self._path(step)
        places = {
            key: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape)
            for key, leaf in wanted.items()
        }
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            check_same_arrays(self._shapes(step, checkpointer), wanted, where=str(path))
            with restoring(str(path), wanted):
                restored = checkpointer.restore(
                    path / "arrays", args=ocp.args.PyTreeRestore(item=wanted, restore_args=places)
                )
        return jax.tree.unflatten(jax.tree.structure(target), [restored[key] for key in wanted])

    def clean(self) -> None:
        """Removes what a crash left half-written or half-deleted. Called once, at the start of a job."""
        if jax.process_index() == 0 and self.directory.exists():
            for _, path in self._directories():
                if not (path / MARKER).exists():
                    path.rmtree()
        barrier("train_store_clean")

    def _shapes(self, step: int, checkpointer: ocp.Checkpointer) -> dict[str, tuple[int, ...]]:
        path = self._path(step) / "arrays"
        try:
            found = checkpointer.metadata(path).item_metadata
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged or incomplete: what it holds cannot be told") from error
        if found is None:
            raise ValueError(f"{path} is damaged or incomplete: what it holds cannot be told")
        return {key: tuple(array.shape) for key, array in found.tree.items()}

    def _read_record(self, step: int) -> dict[str, Any]:
        path = self._path(step) / "record.json"
        try:
            found = json.loads(path.read_text())
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{path} is damaged or incomplete: {error}") from error
        if not isinstance(found, dict) or "metric" not in found or not isinstance(found.get("record"), dict):
            raise ValueError(f"{path} is damaged or incomplete: it holds no record of a step")
        return found

    def _prune(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best_step()}
        for step in self.steps():
            if step not in kept:
                path = self._path(step)
                (path / MARKER).unlink()
                path.rmtree()

    def _path(self, step: int) -> epath.Path:
        return self.directory / f"step_{step:08d}"

    def _directories(self) -> list[tuple[int, epath.Path]]:
        found = [path for path in self.directory.iterdir() if path.name.startswith("step_")]
        return [(int(path.name.removeprefix("step_")), path) for path in found]


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of `tree`, under the name of its place: ``params|layers.mlp.up_kernel``, ``opt_state|1|count``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="|"): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves share a name"
    return flat


def check_same_arrays(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Any], *, where: str) -> None:
    """Raises a ValueError at the first array that is missing, unexpected or of another shape."""
    for key in sorted(stored.keys() | wanted.keys()):
        if key not in stored:
            raise ValueError(f"{where}: holds no {key}, which this configuration trains")
        if key not in wanted:
            raise ValueError(f"{where}: holds {key}, which this configuration does not have")
        if stored[key] != tuple(wanted[key].shape):
            raise ValueError(f"{where}: {key} has shape {stored[key]}, this configuration needs {wanted[key].shape}")


def barrier(name: str) -> None:
    """Waits for the other processes, if there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
