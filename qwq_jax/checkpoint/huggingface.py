"""Hugging Face checkpoints: open one wherever it lies, read its tensors in bounded memory, write one.

The safetensors format is read here by itself rather than through the library, because tensors must come in pieces, from
buckets too, and because each damage deserves its own sentence. A file is 8 bytes of header length, a JSON header
(name -> dtype, shape, byte range), and the tensors without a gap.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from qwq_jax.checkpoint.directory import Directory, LocalDirectory, open_directory
from qwq_jax.checkpoint.hub import HubDirectory, is_hub_id

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
# Files that travel with the weights, verbatim: configuration, tokenizer, chat template, what a reward model reads,
# licence.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "reward_model.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Example:
        `TensorInfo("lm_head.weight", "model.safetensors", np.dtype("float32"), (512, 64), 8200, 139272)`.
    """

    name: str
    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: headers read and checked, no tensor read yet.

    Attributes:
        directory: Where its files lie.
        tensors: Every tensor by name, in the order of the files and of the bytes in them.
        config: Parsed config.json.
        generation_config: Parsed generation_config.json, if there is one.
        companions: Names of the files to carry along.
    """

    directory: Directory
    tensors: Mapping[str, TensorInfo]
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    companions: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Hash that changes when any weight file or companion is replaced."""
        files = sorted({t.file for t in self.tensors.values()} | set(self.companions))
        stamps = [(name, self.directory.stamp(name)) for name in files]
        where = [(t.name, t.file, str(t.dtype), t.shape, t.start) for t in self.tensors.values()]
        return hashlib.sha256(json.dumps([stamps, where]).encode()).hexdigest()

    def locate(self, name: str) -> str:
        """File and tensor, for errors."""
        return f"{self.directory.path}/{self.tensors[name].file}: {name}"


def open_source(location: str, *, low_disk: bool = False) -> Source:
    """Opens a local directory, a ``gs://`` address or a hub id (``owner/name`` or ``owner/name@revision``).

    Args:
        location: Where the checkpoint is.
        low_disk: Of a hub id, delete each file that was downloaded for this once its last tensor is used.

    Raises:
        ValueError: There is no such checkpoint, or a file of it is missing or damaged.
    """
    directory: Directory = open_directory(location)
    sizes = directory.sizes()
    if not sizes and isinstance(directory, LocalDirectory) and not directory.children() and is_hub_id(location):
        directory = HubDirectory(location, delete_used=low_disk)
        sizes = directory.sizes()
    elif low_disk:
        raise ValueError(f"--low-disk deletes downloaded files after use, and {location} is not downloaded")
    if not sizes:
        raise ValueError(f"{location}: there is no such directory, or it holds no files")
    config = _read_json(directory, "config.json", sizes)
    generation = _read_json(directory, "generation_config.json", sizes) if "generation_config.json" in sizes else None
    companions = tuple(name for name in COMPANIONS if name in sizes)
    return Source(directory, _read_tensors(directory, sizes), config, generation, companions)


def _read_json(directory: Directory, name: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    where = f"{directory.path}/{name}"
    if name not in sizes:
        raise ValueError(f"{where} is missing")
    return _parse_object(directory.read(name), where)


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]} occurs twice")
        return dict(pairs)

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} should hold a JSON object")
    return value


def _read_tensors(directory: Directory, sizes: Mapping[str, int]) -> dict[str, TensorInfo]:
    index = _read_index(directory, sizes)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(index.values())) if index is not None else [SINGLE]:
        where = f"{directory.path}/{file}"
        if file not in sizes:
            raise ValueError(f"{where} is missing, though {INDEX} names it")
        for tensor in read_header(directory, file, sizes[file]):
            if index is not None and index.get(tensor.name) != file:
                raise ValueError(f"{where}: {INDEX} does not list tensor {tensor.name} as being in this file")
            tensors[tensor.name] = tensor
    for name, file in (index or {}).items():
        if name not in tensors:
            raise ValueError(f"{directory.path}/{INDEX} names tensor {name}, which {file} does not hold")
    return tensors


def _read_index(directory: Directory, sizes: Mapping[str, int]) -> dict[str, str] | None:
    """The weight map, or None for a checkpoint of one file, which as in transformers goes before an index."""
    if SINGLE in sizes:
        return None
    if INDEX not in sizes:
        raise ValueError(f"{directory.path} holds neither {SINGLE} nor {INDEX}")
    where = f"{directory.path}/{INDEX}"
    weight_map = _read_json(directory, INDEX, sizes).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{where}: weight_map should be an object of tensor names and file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{where}: weight_map gives {name} {file!r}, which is no .safetensors file beside it")
    return weight_map


def read_header(directory: Directory, file: str, size: int) -> list[TensorInfo]:
    """Reads and checks the header of one safetensors file of `size` bytes.

    Raises:
        ValueError: The file is truncated or damaged, or a dtype is not a float that this model may have.
    """
    where = f"{directory.path}/{file}"
    if size < 8:
        raise ValueError(f"{where} is truncated: {size} bytes cannot hold a header")
    length = int.from_bytes(_read_range(directory, file, 0, 8), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"{where} is not a safetensors file: it claims a header of {length} bytes")
    if 8 + length > size:
        raise ValueError(f"{where} is truncated: its header needs {8 + length} bytes and the file has {size}")
    header = _parse_object(_read_range(directory, file, 8, length), f"{where}: the header")
    header.pop("__metadata__", None)
    tensors = sorted(
        (_parse_entry(name, entry, file, 8 + length, where) for name, entry in header.items()),
        key=lambda tensor: (tensor.start, tensor.stop),
    )
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            problem = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise ValueError(f"{where}: {tensor.name} {problem} (starts at byte {tensor.start}, expected {end})")
        end = tensor.stop
    if end > size:
        raise ValueError(f"{where} is truncated: its tensors need {end} bytes and the file has {size}")
    if end < size:
        raise ValueError(f"{where} is damaged: {size - end} bytes at its end belong to no tensor")
    return tensors


def _read_range(directory: Directory, file: str, start: int, length: int) -> bytes:
    data = bytearray(length)
    directory.read_into(file, start, memoryview(data))
    return bytes(data)


def _parse_entry(name: str, entry: Any, file: str, base: int, where: str) -> TensorInfo:
    try:
        tag, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{where}: the header entry of {name} lacks dtype, shape or data_offsets") from None
    if tag not in DTYPES:
        raise ValueError(f"{where}: {name} has dtype {tag}; {', '.join(DTYPES)} can be converted")
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{where}: the header entry of {name} has a shape or offsets that are not whole numbers")
    dtype = DTYPES[tag]
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{where}: {name} of shape {shape} and dtype {tag} needs {math.prod(shape) * dtype.itemsize} bytes, "
            f"but its offsets span {stop - start}"
        )
    return TensorInfo(name, file, dtype, tuple(shape), base + start, base + stop)


def has_nonfinite(values: np.ndarray) -> bool:
    """Whether a float array holds NaN or an infinity. Looks at exponents only, in pieces that stay in cache."""
    bits = {2: (np.uint16, 0x7C00), 4: (np.uint32, 0x7F800000)}
    integer, exponent = bits[values.dtype.itemsize]
    if values.dtype == DTYPES["BF16"]:
        exponent = 0x7F80
    flat = values.reshape(-1).view(integer)
    step = 1 << 18
    return any(np.any((flat[i : i + step] & exponent) == exponent) for i in range(0, flat.size, step))


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Iterable[TensorPlan], max_bytes: int) -> dict[str, list[TensorPlan]]:
    """Deals the tensors in order into files of at most `max_bytes` each (or of one tensor), named as on the hub."""
    shards: list[list[TensorPlan]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    for shard in shards:  # wide dtypes first, so that every tensor is aligned
        shard.sort(key=lambda tensor: -tensor.dtype.itemsize)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def index_json(shards: Mapping[str, list[TensorPlan]]) -> bytes:
    """The contents of ``model.safetensors.index.json``."""
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def header_bytes(shard: Iterable[TensorPlan]) -> bytes:
    """The head of a safetensors file whose tensors follow in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": _TAGS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_bytes(file: BinaryIO, values: np.ndarray) -> None:
    """Appends the bytes of a C-contiguous array, in pieces that a bucket's client can hold."""
    data = values.reshape(-1).view(np.uint8).data
    step = 64 << 20
    for start in range(0, len(data), step):
        file.write(data[start : start + step])
