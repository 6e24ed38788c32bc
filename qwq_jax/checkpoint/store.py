"""Checkpoints on disk: one Orbax array a layer parameter, written one by one, resumable, committed last.

::

    CHECKPOINT/
      config.json ...      companions of the weights, verbatim
      manifest.json        shape, dtype and source hash of each tensor
      params/              a plain Orbax checkpoint (zarr3); Orbax alone can restore it
        layers.0.attention.q_kernel/ ...
      partial/             only while unfinished: identity.json, a record of each finished tensor, what else to remember
      COMMITTED            hash of the manifest; without it this is no checkpoint

A tensor is finished when its record exists, and its record is written when its bytes are durable. Orbax itself saves a
tree at once under a temporary name and starts over after a crash; writing its (documented, stable) files array by array
through tensorstore is what makes a conversion resumable and its memory independent of the number of layers.

Each array lies in shards (files, objects) of at most about 64 MiB, which hold chunks that a device of a mesh with up to
16 parts an axis can read by byte range, without its neighbours' bytes. Chunks carry a checksum and are not compressed:
bf16 weights hardly shrink.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import jax
import ml_dtypes  # noqa: F401 (lets numpy know "bfloat16")
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from qwq_jax.checkpoint.damage import restoring
from qwq_jax.checkpoint.directory import Directory, LocalDirectory, explained, open_directory, os_errors
from qwq_jax.checkpoint.manifest import FORMAT_VERSION, QUANTIZED_VERSION, Manifest, TensorRecord, read_manifest
from qwq_jax.checkpoint.quantized import stored_spec
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.weights import WeightFormat
from qwq_jax.model.quantize import SCALE, held_dtype, kernel_format, quantize, unpack
from qwq_jax.model.spec import ArraySpec, model_spec
from qwq_jax.sharding import Layout

MARKER = "COMMITTED"
MANIFEST = "manifest.json"
PARAMS = "params"
PARTIAL = "partial"
_IDENTITY = f"{PARTIAL}/identity.json"
_SHARD_BYTES = 64 << 20
_CHUNK_BYTES = 256 << 10
_PARTS = (16, 8, 4, 2)


def chunk_grid(spec: ArraySpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a shard (one file) and of the chunks in it.

    Example:
        A bf16 gate kernel [5120, 27648] with axes (embed, mlp) has chunks of [320, 1728] in shards of [640, 27648].
    """
    itemsize = np.dtype(spec.dtype).itemsize
    chunk = list(spec.shape)
    named = [i for i, axis in enumerate(spec.axes) if axis is not None]
    for i in sorted(named, key=lambda i: spec.axes[i] == "embed"):
        size = math.prod(chunk) * itemsize
        chunk[i] //= next((p for p in _PARTS if chunk[i] % p == 0 and size // p >= _CHUNK_BYTES), 1)
    shard = list(spec.shape)
    for i, whole in enumerate(spec.shape):
        size, pieces = math.prod(shard) * itemsize, whole // max(chunk[i], 1)
        fitting = (k for k in range(1, pieces + 1) if pieces % k == 0 and size <= k * _SHARD_BYTES)
        shard[i] //= next(fitting, max(pieces, 1))
    return tuple(shard), tuple(chunk)


class CheckpointWriter:
    """Writes a checkpoint tensor by tensor; a second one with the same identity goes on where the first was killed.

    `write` may be called from several threads, for different tensors.

    Args:
        dest: Local directory or ``gs://`` address: absent, empty, or left unfinished by the same job.
        spec: Every parameter.
        identity: Hash of all that decides the contents.
        origin: Where the weights come from, for people.

    Raises:
        ValueError: `dest` holds something else, or cannot be written to.
    """

    def __init__(self, dest: str, spec: Mapping[str, ArraySpec], *, identity: str, origin: str):
        self.spec = dict(spec)
        self.identity = identity
        self.origin = origin
        self.directory = open_directory(dest)
        self.is_committed = False
        self.finished: dict[str, TensorRecord] = {}
        with explained(f"cannot write {dest}"):
            self._claim()

    def _claim(self) -> None:
        children = self.directory.children()
        if not children - {PARTIAL} and not self._read_optional(_IDENTITY):
            claim = {"identity": self.identity, "origin": self.origin}
            self.directory.write(_IDENTITY, json.dumps(claim).encode())
            return
        dest = self.directory.path
        manifest = self._read_optional(MANIFEST) if MARKER in children or PARAMS in children else None
        if manifest is not None:
            found = read_manifest(manifest, f"{dest}/{MANIFEST}")
            identity, origin, records = found.identity, found.origin, found.tensors
        elif claim := self._read_optional(_IDENTITY):
            found = json.loads(claim)
            identity, origin, records = found["identity"], found["origin"], self._partial_records()
        else:
            raise ValueError(f"{dest} holds something else; give an empty or new directory")
        if identity != self.identity:
            state = "a checkpoint" if MARKER in children else "an unfinished checkpoint"
            raise ValueError(
                f"{dest} holds {state} of {origin} with other files or settings; delete it or give another directory"
            )
        self.is_committed = MARKER in children
        self.finished = {record.path: record for record in records}

    def _read_optional(self, name: str) -> bytes | None:
        try:
            return self.directory.read(name)
        except FileNotFoundError:
            return None

    def _partial_records(self) -> list[TensorRecord]:
        folder = open_directory(f"{self.directory.path}/{PARTIAL}")
        names = [name for name in folder.sizes() if name.endswith(".json") and f"{PARTIAL}/{name}" != _IDENTITY]
        return [TensorRecord.model_validate_json(folder.read(name)) for name in sorted(names)]

    def look_again(self) -> None:
        """Takes note of the tensors that other processes have finished; of an unfinished checkpoint."""
        assert not self.is_committed
        with explained(f"cannot read {self.directory.path}"):
            self.finished |= {record.path: record for record in self._partial_records()}

    def remember(self, name: str, value: bytes) -> bytes:
        """Returns what the first run of this job gave here; kept until the checkpoint is committed."""
        known = self._read_optional(f"{PARTIAL}/{name}")
        if known is None:
            with explained(f"cannot write {self.directory.path}"):
                self.directory.write(f"{PARTIAL}/{name}", value)
        return value if known is None else known

    @property
    def missing_bytes(self) -> int:
        """Bytes of the tensors that are still to be written."""
        todo = (s for name, s in self.spec.items() if name not in self.finished)
        return sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in todo)

    def write(self, array: np.ndarray, record: TensorRecord) -> None:
        """Writes one parameter durably, converting to the dtype of its spec; then it is finished.

        Args:
            array: Any numpy array or view of the parameter's shape.
            record: What the manifest will say of it.

        Raises:
            ValueError: The disk is full or fails; whatever was written of this tensor is removed.
        """
        spec = self.spec[record.path]
        assert array.shape == spec.shape, (record.path, array.shape, spec.shape)
        folder = f"{PARAMS}/{record.path}"
        with explained(f"cannot write {self.directory.path}/{folder}"):
            self.directory.delete(folder)
            try:
                with os_errors():
                    _write_array(f"{self.directory.path}/{folder}", spec, array)
                self.directory.sync(folder)
                self.directory.write(f"{PARTIAL}/{record.path}.json", record.model_dump_json().encode())
            except BaseException:
                self.directory.delete(folder)
                raise
        self.finished[record.path] = record

    def abandon(self) -> None:
        """Removes everything of an unfinished checkpoint."""
        assert not self.is_committed
        with explained(f"cannot delete {self.directory.path}"):
            for name in (PARAMS, PARTIAL):
                self.directory.delete(name)
            self.directory.remove_if_empty()

    def commit(self, config: ModelConfig, files: Mapping[str, bytes], weights: WeightFormat | None = None) -> Manifest:
        """Writes companions, manifest and Orbax's metadata, then the marker.

        Args:
            config: The architecture.
            files: Companions by name.
            weights: How the projections are quantised, if they are.
        """
        missing = self.spec.keys() - self.finished.keys()
        assert not missing, sorted(missing)[:3]
        records = tuple(self.finished[name] for name in self.spec)
        manifest = Manifest(
            format_version=FORMAT_VERSION if weights is None else QUANTIZED_VERSION,
            identity=self.identity,
            origin=self.origin,
            config=config,
            files=tuple(files),
            tensors=records,
            weights=weights,
        )
        contents = manifest.to_json()
        with explained(f"cannot write {self.directory.path}"):
            for name, data in {**files, **_orbax_metadata(self.spec), MANIFEST: contents}.items():
                self.directory.write(name, data)
            self.directory.delete(PARTIAL)
            self.directory.write(MARKER, hashlib.sha256(contents).hexdigest().encode())
        self.is_committed = True
        return manifest


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint.

    Attributes:
        path: Where it is.
        manifest: What it holds.
        directory: For its small files.
    """

    path: str
    manifest: Manifest
    directory: Directory

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.manifest.config

    @property
    def dtype(self) -> np.dtype:
        """What the embedding, and commonly everything, is stored in."""
        return np.dtype(self.manifest.tensors[0].dtype)

    @cached_property
    def spec(self) -> dict[str, ArraySpec]:
        """Every parameter with the dtype it is stored in; 4-bit ones are packed, see `quantized`."""
        stored = {record.path: np.dtype(record.dtype) for record in self.manifest.tensors}
        model = stored_spec(model_spec(self.config, weights=self.manifest.weights))
        return {name: ArraySpec(spec.shape, stored[name], spec.axes) for name, spec in model.items()}

    @cached_property
    def tokenizer_dir(self) -> str:
        """A local directory with the companion files: the checkpoint itself, or a temporary copy of a bucket's."""
        if isinstance(self.directory, LocalDirectory):
            return self.path
        copy = LocalDirectory(tempfile.mkdtemp(prefix="qwq-jax-"))
        for name in self.manifest.files:
            copy.write(name, self.directory.read(name))
        return copy.path


def open_checkpoint(path: str) -> Checkpoint:
    """Opens a finished checkpoint, local or ``gs://``.

    Raises:
        ValueError: There is none, or it was never finished, or it is damaged.
    """
    directory = open_directory(path)
    with explained(f"cannot read {path}"):
        children = directory.children()
        if MARKER not in children:
            if PARTIAL in children or MANIFEST in children:
                cause = "its conversion never finished; run the same command again"
            elif not children:
                cause = "there is no such directory"
            elif "config.json" in children:
                cause = f"it has no {MARKER}; turn a Hugging Face directory into one with qwq-jax convert"
            else:
                cause = f"it has no {MARKER}"
            raise ValueError(f"{path} is not a checkpoint: {cause}")
        contents = directory.read(MANIFEST)
        if hashlib.sha256(contents).hexdigest().encode() != directory.read(MARKER).strip():
            raise ValueError(f"{path}/{MANIFEST} is damaged: it is not the one that was committed")
        return Checkpoint(path, read_manifest(contents, f"{path}/{MANIFEST}"), directory)


def restore_params(
    checkpoint: Checkpoint, layout: Layout | None, dtype: Any = None, weights: WeightFormat | None = None
) -> dict[str, jax.Array]:
    """Restores every parameter straight onto its shards; a process reads only the chunks its devices hold.

    Weights to be quantised are so a layer at a time, on the devices: beside the result there is never more than one
    layer in the precision of the checkpoint.

    Args:
        checkpoint: From `open_checkpoint`.
        layout: Mesh and table; ``None`` puts all on the first device.
        dtype: Convert to this what is not quantised; ``None`` keeps what is stored.
        weights: How the projections are to be quantised; what the checkpoint holds if it is quantised itself.

    Raises:
        ValueError: A parameter is damaged, cannot be read, or does not fit the memory of the devices; or the checkpoint
            is quantised otherwise.
    """
    stored = checkpoint.manifest.weights
    if stored is not None and (weights is None or weights.stored != stored):
        wanted = "weights of full precision" if weights is None else f"{weights.name} weights"
        raise ValueError(
            f"{checkpoint.path} holds {stored.name} weights, where {wanted} are needed: use the checkpoint that it was "
            "made from"
        )
    spec = checkpoint.spec
    dtypes = {
        name: array.dtype if dtype is None or _is_quantized(spec, name) else np.dtype(dtype)
        for name, array in spec.items()
    }
    if weights is None:
        return _restore(checkpoint, layout, dtypes)
    if stored is None:
        return _quantized_on_devices(checkpoint, layout, dtypes, weights)
    return _unpacked_on_devices(checkpoint, layout, _restore(checkpoint, layout, dtypes))


def _unpacked_on_devices(
    checkpoint: Checkpoint, layout: Layout | None, params: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    programs: dict[str, Any] = {}  # those of one layer serve all
    dtype = held_dtype(4, _platform(layout))
    for name, spec in model_spec(checkpoint.config, weights=checkpoint.manifest.weights).items():
        if spec.dtype == "int4":
            kind = name.split(".")[-1]
            if kind not in programs:
                programs[kind] = jax.jit(partial(unpack, dtype=dtype), out_shardings=_sharding(layout, spec))
            params[name] = jax.block_until_ready(programs[kind](params.pop(name)))
    return params


def _quantized_on_devices(
    checkpoint: Checkpoint, layout: Layout | None, dtypes: Mapping[str, Any], weights: WeightFormat
) -> dict[str, jax.Array]:
    spec, target = checkpoint.spec, model_spec(checkpoint.config, weights=weights)
    params: dict[str, jax.Array] = {}
    programs: dict[str, Any] = {}
    for names in _by_layer(spec):
        own = {name: spec[name].dtype if name + SCALE in target else dtypes[name] for name in names}
        for name, array in _restore(checkpoint, layout, own).items():
            if name + SCALE not in target:
                params[name] = array
                continue
            kind = name.split(".")[-1]
            if kind not in programs:
                places = tuple(_sharding(layout, target[path]) for path in (name, name + SCALE))
                format = kernel_format(weights, spec[name].shape, spec[name].axes)
                dtype = held_dtype(format.bits, _platform(layout))
                programs[kind] = jax.jit(partial(quantize, format=format, dtype=dtype), out_shardings=places)
            params[name], params[name + SCALE] = jax.block_until_ready(programs[kind](array))
    return params


def _restore(checkpoint: Checkpoint, layout: Layout | None, dtypes: Mapping[str, Any]) -> dict[str, jax.Array]:
    """These parameters in these dtypes."""
    spec = checkpoint.spec
    abstract = {
        name: jax.ShapeDtypeStruct(spec[name].shape, np.dtype(dtype), sharding=_sharding(layout, spec[name]))
        for name, dtype in dtypes.items()
    }
    largest = max(math.prod(s.shape) * s.dtype.itemsize for s in abstract.values())
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=4 + 2 * largest // 10**9)
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=len(abstract) < len(spec),
    )
    options = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1 and layout is not None and not layout.mesh.is_multi_process:
        # A mesh of this process alone: the others may restore at another time, or not at all.
        index = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
        )
    checkpointing = ocp.Checkpointer(handler, multiprocessing_options=options)
    with checkpointing as checkpointer, explained(f"cannot read {checkpoint.path}"):
        with restoring(checkpoint.path, abstract), os_errors():
            return checkpointer.restore(_place(checkpoint.path), args=arguments)


def _is_quantized(spec: Mapping[str, ArraySpec], name: str) -> bool:
    return name + SCALE in spec or name.endswith("kernel" + SCALE)


def _platform(layout: Layout | None) -> str:
    return (jax.local_devices()[0] if layout is None else layout.mesh.devices.flat[0]).platform


def _sharding(layout: Layout | None, spec: ArraySpec) -> jax.sharding.Sharding:
    if layout is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return layout.sharding(spec.axes, spec.shape)


def _by_layer(names: Iterable[str]) -> list[list[str]]:
    """Names whose arrays are restored together: those of a layer, or one that belongs to none."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        groups.setdefault(".".join(parts[:2]) if parts[0] == "layers" else name, []).append(name)
    return list(groups.values())


def read_param(
    checkpoint: Checkpoint, name: str, order: Sequence[int] | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Reads one parameter into host memory.

    Args:
        checkpoint: From `open_checkpoint`.
        name: Dotted path.
        order: Permute the dimensions so on the way, which is faster than afterwards.
        out: Bytes to read into, as many as the parameter has; new memory otherwise.

    Returns:
        The C-contiguous parameter, a view of `out` if given.
    """
    spec = checkpoint.spec[name]
    shape = spec.shape if order is None else tuple(spec.shape[axis] for axis in order)
    values = np.empty(shape, spec.dtype) if out is None else out.view(spec.dtype).reshape(shape)
    folder = f"{checkpoint.path}/{PARAMS}/{name}"
    with explained(f"cannot read {folder}"), os_errors():
        described = {"driver": "zarr3", "kvstore": _kvstore(folder), "fill_missing_data_reads": False}
        store = ts.open(described, open=True).result()
        ts.array(values).write(store if order is None else store.transpose(list(order))).result()
    return values


def _place(path: str) -> str:
    """Where Orbax finds the parameters; it takes absolute paths only."""
    return f"{path.rstrip('/')}/{PARAMS}" if "://" in path else os.path.abspath(f"{path}/{PARAMS}")


def _kvstore(path: str) -> dict[str, Any]:
    if path.startswith("gs://"):
        bucket, _, prefix = path.removeprefix("gs://").partition("/")
        prefix = prefix.replace("//", "/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{prefix}/"}
    return {"driver": "file", "path": f"{os.path.abspath(path)}/"}


def _write_array(path: str, spec: ArraySpec, array: np.ndarray) -> None:
    shard, chunk = chunk_grid(spec)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    checked = [little, {"name": "crc32c"}]
    sharding = {"chunk_shape": chunk, "codecs": checked, "index_codecs": checked}
    metadata = {
        "shape": spec.shape,
        "data_type": np.dtype(spec.dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": 0.0,
    }
    described = {"driver": "zarr3", "kvstore": _kvstore(path), "metadata": metadata}
    store = ts.open(described | {"store_data_equal_to_fill_value": True}, create=True).result()
    for box in _boxes(spec.shape, shard):  # one shard at a time: a writer holds no more than one in memory
        store[box].write(np.asarray(array[box], dtype=spec.dtype)).result()


def _boxes(shape: Sequence[int], shard: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    starts = (range(0, whole, part) for whole, part in zip(shape, shard, strict=True))
    for corner in product(*starts):
        yield tuple(slice(a, a + part) for a, part in zip(corner, shard, strict=True))


def _orbax_metadata(spec: Mapping[str, ArraySpec]) -> dict[str, bytes]:
    """The files with which `params/` is a checkpoint of a flat dict to Orbax."""
    tree, arrays = {}, []
    for name, array in spec.items():
        value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(array.shape)}
        tree[str((name,))] = {"key_metadata": [{"key": name, "key_type": 2}], "value_metadata": value}
        shapes = {"write_shape": list(array.shape), "chunk_shape": list(chunk_grid(array)[0])}
        arrays.append({"array_metadata": {"param_name": name, **shapes, "ext_metadata": None}})
    handler = f"{ocp.PyTreeCheckpointHandler.__module__}.{ocp.PyTreeCheckpointHandler.__qualname__}"
    formats = {"use_ocdbt": False, "use_zarr3": True, "store_array_data_equal_to_fill_value": True}
    files = {
        "array_metadatas/process_0": {"array_metadatas": arrays},
        "_CHECKPOINT_METADATA": {"item_handlers": handler, "metrics": {}, "custom_metadata": {}},
        "_METADATA": {"tree_metadata": tree, **formats, "custom_metadata": None},
    }
    encoded = {f"{PARAMS}/{name}": json.dumps(value).encode() for name, value in files.items()}
    # Orbax's own marker, which it asks for in buckets. Ours covers more, and is the one that counts.
    return encoded | {f"{PARAMS}/commit_success.txt": b"Checkpoint commit was successful\n"}
