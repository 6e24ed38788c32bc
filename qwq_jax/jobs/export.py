"""`qwq-jax export`: a checkpoint becomes a Hugging Face directory, in bounded memory, resumably, verified by hash.

The files grow in a directory beside the destination, which takes its name when the last one is durable. A bucket's
directory cannot be renamed: there they grow in place, and config.json, without which nothing loads, comes last.
"""

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.filesize import decimal
from rich.progress import Progress, TaskID

from qwq_jax.checkpoint.buffers import BufferPool
from qwq_jax.checkpoint.directory import TEMPORARY, Directory, LocalDirectory, explained, open_directory, sole_writer
from qwq_jax.checkpoint.huggingface import INDEX, TensorPlan, header_bytes, index_json, plan_shards, write_bytes
from qwq_jax.checkpoint.names import NamePair, name_table
from qwq_jax.checkpoint.quantized import digest, quantized_row
from qwq_jax.checkpoint.store import Checkpoint, open_checkpoint, read_param
from qwq_jax.interrupt import Interrupted, StopRequested
from qwq_jax.jobs.convert import progress_bar
from qwq_jax.model.quantize import SCALE

MAX_SHARD_BYTES = 5_000_000_000
_CLAIM = "exporting.json"
_PIECE = 8 << 20


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        files: Weight files of the result.
        tensors: Tensors in them.
        verified: Tensors that this run wrote, or found finished, and whose bytes have the hash of their source.
        nbytes: Bytes of weights that this run wrote.
        seconds: Wall time.
    """

    files: int
    tensors: int
    verified: int
    nbytes: int
    seconds: float

    @property
    def sentence(self) -> str:
        """For the terminal."""
        if not self.nbytes and self.verified:
            return f"nothing to do: all {self.tensors} tensors were already there, verified by sha256"
        rate = self.nbytes / max(self.seconds, 1e-9)
        return (
            f"{self.tensors} tensors in {self.files} files, {self.verified} verified by sha256: "
            f"{decimal(self.nbytes)} in {self.seconds:.1f} s ({decimal(int(rate))}/s)"
        )


def export(
    checkpoint: str, dest: str, *, max_shard_bytes: int = MAX_SHARD_BYTES, dequantize: bool = False
) -> ExportReport:
    """Writes the checkpoint as a Hugging Face directory; the same call goes on where a killed one stopped.

    Args:
        checkpoint: Local directory or ``gs://`` address.
        dest: Local directory or ``gs://`` address, new or empty.
        max_shard_bytes: Largest weight file; a larger tensor gets a file of its own.
        dequantize: Of a quantised checkpoint, write q * scale in the dtype of its embedding; it is refused otherwise.

    Raises:
        ValueError: Bad input, a failing disk, or a tensor that does not have the bytes it once had.
        Interrupted: A signal asked to stop; finished files are saved.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes {max_shard_bytes} should be positive")
    with sole_writer(dest), StopRequested() as stop:
        report = _export(checkpoint, dest, max_shard_bytes, dequantize, stop)
    print(f"{dest}: {report.sentence}")
    return report


def _export(checkpoint: str, dest: str, max_shard_bytes: int, dequantize: bool, stop: StopRequested) -> ExportReport:
    started = time.monotonic()
    opened = open_checkpoint(checkpoint)
    if opened.manifest.weights is not None and not dequantize:
        raise ValueError(
            f"{checkpoint} holds {opened.manifest.weights.name} weights, of which Hugging Face's files know nothing: "
            "export the checkpoint that it was made from, or give --dequantize"
        )
    rows = {row.source: row for row in name_table(opened.config)}
    plans = [TensorPlan(row.source, _exported_dtype(opened, row.path), row.source_shape) for row in rows.values()]
    shards = plan_shards(plans, max_shard_bytes)
    if _is_there(opened, rows, shards, open_directory(dest)):
        return ExportReport(len(shards), len(plans), len(plans), 0, time.monotonic() - started)
    with explained(f"cannot write {dest}"):
        directory = _claim(opened, dest, max_shard_bytes)
        todo = {name: shard for name, shard in shards.items() if name not in directory.sizes()}
        nbytes = sum(tensor.nbytes for shard in todo.values() for tensor in shard)
        try:
            _check_space(directory, nbytes)
            verified = _write_shards(opened, rows, directory, todo, stop)
            _finish(opened, directory, shards, dest)
        except (ValueError, OSError):
            if not any(name in shards for name in directory.children()):
                directory.delete(_CLAIM)
                directory.remove_if_empty()
            raise
    return ExportReport(len(shards), len(plans), verified, nbytes, time.monotonic() - started)


def _is_there(
    checkpoint: Checkpoint, rows: Mapping[str, NamePair], shards: Mapping[str, list[TensorPlan]], final: Directory
) -> bool:
    """Whether the destination holds this very export, every byte of every tensor."""
    with explained(f"cannot read {final.path}"):
        sizes = final.sizes()
        whole = {name: len(header_bytes(shard)) + sum(t.nbytes for t in shard) for name, shard in shards.items()}
        if _CLAIM in sizes or any(sizes.get(name) != size for name, size in whole.items()):
            return False
        expected = _companions(checkpoint, shards)
        if any(name not in sizes or final.read(name) != data for name, data in expected.items()):
            return False
        heads = {name: header_bytes(shard) for name, shard in shards.items()}
        if any(_read(final, name, 0, len(head)) != head for name, head in heads.items()):
            return False
        return all(
            _sha256(final, name, start, start + tensor.nbytes) == _expected_sha256(checkpoint, rows[tensor.name])
            for name, shard in shards.items()
            for tensor, start in zip(shard, _starts(shard), strict=True)
        )


def _exported_dtype(checkpoint: Checkpoint, path: str) -> np.dtype:
    return checkpoint.dtype if path + SCALE in checkpoint.spec else np.dtype(checkpoint.spec[path].dtype)


def _expected_sha256(checkpoint: Checkpoint, row: NamePair) -> str:
    """Hash of an exported tensor's bytes; a quantised one has to be read for it."""
    if row.path + SCALE in checkpoint.spec:
        return digest(_dequantized(checkpoint, row))
    return next(record.stored_sha256 for record in checkpoint.manifest.tensors if record.path == row.path)


def _dequantized(checkpoint: Checkpoint, row: NamePair) -> np.ndarray:
    """The Hugging Face matrix of a quantised parameter, in the dtype of the embedding.

    Raises:
        ValueError: What is stored does not have the bytes that were written.
    """
    quantized = quantized_row(row, checkpoint.spec)
    assert quantized is not None
    digests = {record.path: record.stored_sha256 for record in checkpoint.manifest.tensors}
    parts = []
    for part in (quantized.kernel, quantized.scale):
        parts.append(read_param(checkpoint, part.path, order=part.inverse).reshape(part.source_shape))
        if digest(parts[-1]) != digests[part.path]:
            raise ValueError(f"{checkpoint.path}: {part.path} is damaged: its bytes are not those that were written")
    return quantized.dequantize(*parts).astype(checkpoint.dtype)


def _starts(shard: list[TensorPlan]) -> list[int]:
    """Where each tensor begins in its file."""
    sizes = [tensor.nbytes for tensor in shard]
    return list(itertools.accumulate(sizes[:-1], initial=len(header_bytes(shard))))


def _sha256(directory: Directory, name: str, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    for begin in range(start, stop, _PIECE):
        digest.update(_read(directory, name, begin, min(begin + _PIECE, stop)))
    return digest.hexdigest()


def _read(directory: Directory, name: str, start: int, stop: int) -> bytearray:
    piece = bytearray(stop - start)
    directory.read_into(name, start, memoryview(piece))
    return piece


def _companions(checkpoint: Checkpoint, shards: Mapping[str, list[TensorPlan]]) -> dict[str, bytes]:
    """Every file beside the weights, config.json last: nothing loads without it."""
    files = {name: checkpoint.directory.read(name) for name in checkpoint.manifest.files}
    if len(shards) > 1:
        files[INDEX] = index_json(shards)
    config = _config_json(checkpoint, files.pop("config.json", None))
    return {**files, "config.json": config}


def _write_shards(
    checkpoint: Checkpoint,
    rows: Mapping[str, NamePair],
    directory: Directory,
    todo: Mapping[str, list[TensorPlan]],
    stop: StopRequested,
) -> int:
    """Writes the missing weight files; returns how many tensors were verified."""
    total = sum(tensor.nbytes for shard in todo.values() for tensor in shard)
    with progress_bar() as progress, ThreadPoolExecutor(1) as reader:
        job = _Writer(checkpoint, rows, reader, progress, progress.add_task("exporting", total=total))
        for done, (name, shard) in enumerate(todo.items()):
            with directory.create(name) as file:
                if not job.write_shard(file, shard, stop):
                    raise Interrupted(
                        f"{done} of {len(todo)} missing files are in {directory.path}; the same command goes on"
                    )
    return job.verified


def _claim(checkpoint: Checkpoint, dest: str, max_shard_bytes: int) -> Directory:
    """Opens the directory in which files grow, empty or left by the same export."""
    final = open_directory(dest)
    local = isinstance(final, LocalDirectory)
    manifest = hashlib.sha256(checkpoint.manifest.to_json()).hexdigest()
    claim = json.dumps({"manifest": manifest, "max_shard_bytes": max_shard_bytes}).encode()
    occupied = final.children()
    if _CLAIM in occupied and final.read(_CLAIM) == claim:
        return final
    if occupied:
        raise ValueError(f"{dest} holds something else; give an empty or new directory")
    growing = open_directory(dest.rstrip("/") + ".exporting") if local else final
    present = growing.children()
    mine = _CLAIM in present and growing.read(_CLAIM) == claim
    if mine:
        return growing
    if local:
        if present and _CLAIM not in present and present - {_CLAIM + TEMPORARY}:
            raise ValueError(f"{growing.path} is needed for the export and holds something else; move it away")
        growing.delete(".")
    growing.write(_CLAIM, claim)
    return growing


def _check_space(directory: Directory, needed: int) -> None:
    free = directory.free_bytes()
    if free is not None and free < needed:
        raise ValueError(
            f"cannot write {directory.path}: {needed} bytes are needed and only {free} are free on the device"
        )


def _finish(checkpoint: Checkpoint, directory: Directory, shards: Mapping[str, list[TensorPlan]], dest: str) -> None:
    for name, data in _companions(checkpoint, shards).items():
        directory.write(name, data)
    if directory.path.rstrip("/") != dest.rstrip("/"):
        os.rename(directory.path, dest)
        LocalDirectory(str(Path(dest).absolute().parent)).sync(".")
    open_directory(dest).delete(_CLAIM)


def _config_json(checkpoint: Checkpoint, original: bytes | None) -> bytes:
    """The config.json of the source, verbatim unless the dtype is another one now."""
    dtype = checkpoint.dtype.name
    if original is None:
        return json.dumps(checkpoint.config.to_huggingface(dtype), indent=2).encode() + b"\n"
    if checkpoint.manifest.tensors[0].source_dtype == dtype:
        return original
    config = json.loads(original)
    key = "dtype" if "dtype" in config else "torch_dtype"
    return json.dumps({**config, key: dtype}, indent=2).encode() + b"\n"


class _Writer:
    """Reads one tensor ahead of the one being hashed and written."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        rows: Mapping[str, NamePair],
        reader: ThreadPoolExecutor,
        progress: Progress,
        task: TaskID,
    ):
        self._checkpoint = checkpoint
        self._rows = rows
        self._reader = reader
        self._advance = lambda count: progress.advance(task, count)
        self._records = {record.path: record for record in checkpoint.manifest.tensors}
        sizes = (math.prod(row.shape) * _exported_dtype(checkpoint, row.path).itemsize for row in rows.values())
        largest = max(sizes)
        self._buffers = BufferPool(2 * largest)
        self.verified = 0

    def write_shard(self, file: BinaryIO, shard: list[TensorPlan], stop: Callable[[], bool]) -> bool:
        """Writes one safetensors file; false if `stop`, asked before each tensor, kept it from being whole."""
        file.write(header_bytes(shard))
        ahead = self._reader.submit(self._read, shard[0])
        for index, plan in enumerate(shard):
            buffer = ahead.result()
            if stop():
                return False
            if index + 1 < len(shard):
                ahead = self._reader.submit(self._read, shard[index + 1])
            self._write(file, plan, buffer)
            self._buffers.give_back(buffer)
        return True

    def _read(self, plan: TensorPlan) -> np.ndarray:
        row = self._rows[plan.name]
        buffer = self._buffers.borrow(plan.nbytes)
        assert buffer is not None
        if row.path + SCALE in self._checkpoint.spec:
            buffer[:] = _dequantized(self._checkpoint, row).reshape(-1).view(np.uint8)
        else:
            read_param(self._checkpoint, row.path, order=row.inverse, out=buffer)
        return buffer

    def _write(self, file: BinaryIO, plan: TensorPlan, buffer: np.ndarray) -> None:
        record = self._records[self._rows[plan.name].path]
        if record.path + SCALE in self._checkpoint.spec:  # verified when it was read
            write_bytes(file, buffer)
            self.verified += 1
            self._advance(plan.nbytes)
            return
        with ThreadPoolExecutor(1) as hasher:
            digest = hasher.submit(lambda: hashlib.sha256(buffer.data).hexdigest())
            write_bytes(file, buffer)
            if digest.result() != record.stored_sha256:
                raise ValueError(
                    f"{self._checkpoint.path}: {record.path} is damaged: its bytes are not those of {plan.name}"
                )
            self.verified += 1
        self._advance(plan.nbytes)
