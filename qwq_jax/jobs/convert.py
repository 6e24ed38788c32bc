"""`qwq-jax convert`: a Hugging Face checkpoint becomes an Orbax checkpoint, in bounded memory, resumably.

One thread reads tensors in the order of the source's files, another hashes them, a few write. A pool of buffers keeps
what is in flight below twice the largest tensor, however many layers there are.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from qwq_jax.chat import ChatTokenizer
from qwq_jax.checkpoint.buffers import BufferPool
from qwq_jax.checkpoint.directory import Directory, LocalDirectory, explained, sole_writer
from qwq_jax.checkpoint.hub import HubDirectory
from qwq_jax.checkpoint.huggingface import Source, TensorInfo, has_nonfinite, open_source
from qwq_jax.checkpoint.manifest import TensorRecord
from qwq_jax.checkpoint.names import EMBEDDING, TIED_HEAD, NamePair, check_leaves, match_tensors
from qwq_jax.checkpoint.quantized import digest as digest_of
from qwq_jax.checkpoint.quantized import quantized_row, stored_spec
from qwq_jax.checkpoint.store import CheckpointWriter
from qwq_jax.config.model import ModelConfig
from qwq_jax.config.weights import WeightFormat, parse_weights
from qwq_jax.interrupt import Interrupted, StopRequested
from qwq_jax.jobs.conversion_team import ConversionTeam
from qwq_jax.model.quantize import SCALE
from qwq_jax.model.spec import ArraySpec, model_spec
from qwq_jax.processes import PeerFailed, Peers

LOG = logging.getLogger(__name__)

WRITERS = 3
_PIECE = 8 << 20
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        tensors: Parameters of the checkpoint.
        written: Parameters that this run wrote; fewer when it resumed.
        nbytes: Bytes this run read.
        seconds: Wall time.
    """

    tensors: int
    written: int
    nbytes: int
    seconds: float

    @property
    def sentence(self) -> str:
        """For the terminal."""
        if not self.written:
            return f"nothing to do: all {self.tensors} tensors were already there"
        resumed = f", {self.tensors - self.written} were already there" if self.written < self.tensors else ""
        rate = self.nbytes / max(self.seconds, 1e-9)
        return (
            f"{self.written} of {self.tensors} tensors written{resumed}: {decimal(self.nbytes)} in "
            f"{self.seconds:.1f} s ({decimal(int(rate))}/s)"
        )


@dataclass(frozen=True)
class ConvertOptions:
    """What is asked of a conversion besides its source.

    Attributes:
        dtype: Store as this; ``None`` keeps each tensor's own.
        allow_nan: Accept weights with NaN or infinity.
        weights: Quantise the projections so.
    """

    dtype: str | None
    allow_nan: bool
    weights: WeightFormat | None

    def identity(self, fingerprint: str) -> str:
        """Hash of all that decides the checkpoint."""
        quantized = f" {self.weights.name}" if self.weights else ""
        return hashlib.sha256(f"{fingerprint} {self.dtype} {self.allow_nan}{quantized}".encode()).hexdigest()


def convert(
    source: str,
    dest: str,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    allow_nan: bool = False,
    low_disk: bool = False,
    together: bool = False,
) -> ConvertReport:
    """Converts a Hugging Face checkpoint; the same call goes on where a killed one stopped.

    Args:
        source: Local directory, ``gs://`` address or hub id.
        dest: Local directory or ``gs://`` address: new, empty, or left unfinished by the same call.
        dtype: Store as ``"float32"`` or ``"bfloat16"``; ``None`` keeps each tensor's own, bit for bit.
        quantize: Store the projections as ``"int8"``, ``"int4"``, ... (see `config.weights`); ``None``: as `dtype`.
        allow_nan: Accept weights with NaN or infinity.
        low_disk: Of a hub id, delete each downloaded file after use.
        together: All processes that `jax.distributed` knows call this, each converts a part, and all must see `dest`.

    Raises:
        ValueError: Bad input or a failing disk, in one sentence.
        Interrupted: A signal asked to stop; finished tensors are saved.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} should be one of {', '.join(_DTYPES)}")
    if quantize is not None and allow_nan:
        raise ValueError("weights that are NaN or infinite cannot be quantised: leave --allow-nan or --quantize out")
    options = ConvertOptions(dtype, allow_nan, parse_weights(quantize) if quantize is not None else None)
    with StopRequested() as stop, Peers.meet(stop, starts_devices=False) if together else Peers(stop) as peers:
        if low_disk and peers.count > 1:
            raise ValueError("--low-disk would delete files that other processes still read: leave it out")
        with sole_writer(dest) if peers.index == 0 else nullcontext():
            report = _convert(source, dest, options, low_disk=low_disk, peers=peers)
    if peers.index == 0:
        print(f"{dest}: {report.sentence}")
    return report


def _convert(source: str, dest: str, options: ConvertOptions, *, low_disk: bool, peers: Peers) -> ConvertReport:
    started = time.monotonic()
    with explained(f"cannot read {source}"):
        opened = open_source(source, low_disk=low_disk)
        identity = options.identity(opened.fingerprint)
    peers.require_same({"source": identity, "destination": dest})
    config = _read_config(opened)
    shapes = {tensor.name: tensor.shape for tensor in opened.tensors.values()}
    table = match_tensors(config, shapes, opened.directory.path)
    spec = _destination_spec(config, table, opened.tensors, options)
    team = ConversionTeam(peers, dest)
    writer = team.open(lambda: CheckpointWriter(dest, spec, identity=identity, origin=source))
    if writer.is_committed:
        team.begin(writer)
        return ConvertReport(len(spec), 0, 0, time.monotonic() - started)
    missing = _in_file_order(table, opened.tensors, writer)
    todo = team.share_of(missing)
    try:
        if team.leads:
            _check_space(writer)
        _prepare_downloads(opened, writer)
        # Finished tensors were written after this.
        if team.leads and config.tie_word_embeddings and TIED_HEAD in opened.tensors and not writer.finished:
            _check_tied_head(opened)
        _release(opened, but={info.file for _, info in todo})
        team.begin(writer)
        with progress_bar(shown=team.leads) as progress:
            task = progress.add_task("converting", total=sum(info.nbytes for _, info in todo))
            pipeline = _Pipeline(opened, writer, allow_nan=options.allow_nan, progress=progress, task=task)
            pipeline.run(todo, peers.stopping)
        team.gather(writer)
        if team.leads:
            _commit(opened, writer, config, options.weights, team)
    except PeerFailed:
        raise  # its sentence says all
    except NonFiniteError as error:
        if not team.may_abandon:
            raise ValueError(f"{error}; delete {dest}, of which nothing can be used") from None
        writer.abandon()  # no part of it can be used: the same weights are refused again
        raise
    except ValueError as error:
        if not writer.finished or not team.leads:
            if team.may_abandon:
                writer.abandon()
            raise
        raise ValueError(
            f"{error}; {len(writer.finished)} tensors are kept, the same command goes on from there"
        ) from error
    finally:
        _release(opened)
    nbytes = sum(info.nbytes for _, info in missing)
    return ConvertReport(len(spec), len(missing), nbytes, time.monotonic() - started)


def _commit(
    source: Source, writer: CheckpointWriter, config: ModelConfig, weights: WeightFormat | None, team: ConversionTeam
) -> None:
    """What makes a checkpoint of the tensors, if all of them are there."""
    dest, found, wanted = writer.directory.path, len(writer.finished), len(writer.spec)
    if found < wanted:
        stopped = f"{found} of {wanted} tensors are in {dest}; the same command goes on"
        team.conclude(stopped)
        raise Interrupted(stopped)
    with explained(f"cannot read {source.directory.path}"):
        files = {name: source.directory.read(name) for name in source.companions}
    writer.commit(config, files, weights)
    team.conclude()
    _warn_of_tokenizer(writer.directory)


def _warn_of_tokenizer(directory: Directory) -> None:
    """The weights are fine without one, but a user should not learn of it on a TPU."""
    try:
        if isinstance(directory, LocalDirectory) and ChatTokenizer.from_directory(directory.path).template is None:
            raise ValueError(f"{directory.path}: this tokenizer has no chat template")
    except ValueError as error:
        LOG.warning("generate and chat will refuse this checkpoint or its messages: %s", error)


def _read_config(source: Source) -> ModelConfig:
    try:
        return ModelConfig.from_huggingface(source.config, source.generation_config)
    except ValueError as error:
        place = source.directory.path
        where = (
            f"{place}/"
            if str(error).startswith(("config.json", "generation_config.json"))
            else f"{place}/config.json: "
        )
        raise ValueError(f"{where}{error}") from None


def _destination_spec(
    config: ModelConfig, table: tuple[NamePair, ...], tensors: Mapping[str, TensorInfo], options: ConvertOptions
) -> dict[str, ArraySpec]:
    """What will be stored, in Hugging Face's order, scales behind what they scale."""
    check_leaves(table, {path: spec.shape for path, spec in model_spec(config).items()})
    model = stored_spec(model_spec(config, weights=options.weights))
    spec = {}
    for row in table:
        array = model[row.path]
        if row.path + SCALE in model:
            spec[row.path], spec[row.path + SCALE] = array, model[row.path + SCALE]
        else:
            spec[row.path] = ArraySpec(row.shape, np.dtype(options.dtype or tensors[row.source].dtype), array.axes)
    return spec


def _check_tied_head(source: Source) -> None:
    """A tied checkpoint may repeat the embedding as its head; transformers would not tie a head that differs."""
    hashes = []
    for name in (EMBEDDING, TIED_HEAD):
        info, digest = source.tensors[name], hashlib.sha256(str(source.tensors[name].dtype).encode())
        source.directory.fetch(info.file)
        for start in range(info.start, info.stop, _PIECE):
            piece = bytearray(min(_PIECE, info.stop - start))
            source.directory.read_into(info.file, start, memoryview(piece))
            digest.update(piece)
        hashes.append(digest.digest())
    if hashes[0] != hashes[1]:
        raise ValueError(
            f"{source.locate(TIED_HEAD)} differs from {EMBEDDING}, though config.json says tie_word_embeddings: true"
        )


def _prepare_downloads(source: Source, writer: CheckpointWriter) -> None:
    """What a killed run has downloaded is to be deleted after use; what the cache held before that run is not."""
    if isinstance(source.directory, HubDirectory):
        before = writer.remember("cached-files", json.dumps(sorted(source.directory.kept)).encode())
        source.directory.kept = set(json.loads(before))


def _release(source: Source, but: Set[str] = frozenset()) -> None:
    """Ends the use of every weight file except these."""
    for file in {tensor.file for tensor in source.tensors.values()} - but:
        source.directory.release(file)


def _check_space(writer: CheckpointWriter) -> None:
    free, needed = writer.directory.free_bytes(), writer.missing_bytes
    if free is not None and free < needed:
        raise ValueError(
            f"cannot write {writer.directory.path}: {needed} bytes are needed and only {free} are free on the device"
        )


def _in_file_order(
    table: tuple[NamePair, ...], tensors: Mapping[str, TensorInfo], writer: CheckpointWriter
) -> list[tuple[NamePair, TensorInfo]]:
    """What is still to be converted; a quantised parameter is finished when its scales are there too."""
    missing = writer.spec.keys() - writer.finished.keys()
    todo = [(row, tensors[row.source]) for row in table if {row.path, row.path + SCALE} & missing]
    return sorted(todo, key=lambda pair: (pair[1].file, pair[1].start))


def progress_bar(*, shown: bool = True) -> Progress:
    """Bytes, bytes a second, time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    return Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), disable=not shown)


def _hash_as(values: np.ndarray, dtype: np.dtype) -> str:
    """Hash of flat values converted to another dtype, a piece at a time."""
    digest = hashlib.sha256()
    for start in range(0, values.size, _PIECE):
        digest.update(values[start : start + _PIECE].astype(dtype).view(np.uint8).data)
    return digest.hexdigest()


class NonFiniteError(ValueError):
    """A weight is NaN or infinite."""


class _Pipeline:
    """Reads in this thread, hashes in a second, writes in a few more; the first error stops all."""

    def __init__(self, source: Source, writer: CheckpointWriter, *, allow_nan: bool, progress: Progress, task: TaskID):
        self._source = source
        self._writer = writer
        self._allow_nan = allow_nan
        self._advance = lambda count: progress.advance(task, count)
        largest = max(tensor.nbytes for tensor in source.tensors.values())
        self._buffers = BufferPool(2 * largest)

    def run(self, todo: list[tuple[NamePair, TensorInfo]], stop: Callable[[], bool]) -> None:
        """Converts these tensors, given in the order of their files, or those begun before `stop` says so."""
        last = {info.file: index for index, (_, info) in enumerate(todo)}
        pending: list[Future[None]] = []
        with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(WRITERS) as writers:
            for index, (row, info) in enumerate(todo):
                if stop():
                    break
                buffer = self._buffers.borrow(info.nbytes)
                if buffer is None:
                    break
                digest = self._read(info, buffer, hasher)
                pending.append(writers.submit(self._write, row, info, buffer, digest))
                if last[info.file] == index:
                    self._source.directory.release(info.file)
        for future in pending:
            future.result()

    def _read(self, info: TensorInfo, buffer: np.ndarray, hasher: ThreadPoolExecutor) -> Future[str]:
        where = self._source.locate(info.name)
        data = buffer.data
        running = hashlib.sha256()
        with explained(f"cannot read {where}"):
            self._source.directory.fetch(info.file)
            for start in range(0, len(data), _PIECE):
                piece = data[start : start + _PIECE]
                self._source.directory.read_into(info.file, info.start + start, piece)
                hasher.submit(running.update, piece)
                if not self._allow_nan and has_nonfinite(np.frombuffer(piece, info.dtype)):
                    raise NonFiniteError(f"{where} holds NaN or infinity (--allow-nan accepts it)")
                self._advance(len(piece))
        return hasher.submit(running.hexdigest)

    def _write(self, row: NamePair, info: TensorInfo, buffer: np.ndarray, digest: Future[str]) -> None:
        try:
            values, dtype = buffer.view(info.dtype), np.dtype(self._writer.spec[row.path].dtype)
            record = TensorRecord(
                path=row.path,
                shape=row.shape,
                dtype=dtype.name,
                source=row.source,
                source_dtype=info.dtype.name,
                sha256=digest.result(),
                stored_sha256="",
            )
            if row.path + SCALE in self._writer.spec:
                self._write_quantized(row, values.reshape(info.shape), record)
            else:
                stored = record.sha256 if dtype == info.dtype else _hash_as(values, dtype)
                record = record.model_copy(update={"stored_sha256": stored})
                self._writer.write(row.to_parameter(values.reshape(info.shape)), record)
        except BaseException:
            self._buffers.close()
            raise
        self._buffers.give_back(buffer)

    def _write_quantized(self, row: NamePair, matrix: np.ndarray, record: TensorRecord) -> None:
        quantized = quantized_row(row, self._writer.spec)
        assert quantized is not None
        for part, stored in zip((quantized.kernel, quantized.scale), quantized.quantize(matrix), strict=True):
            if part.path not in self._writer.finished:
                told = {"path": part.path, "shape": part.shape, "dtype": stored.dtype.name}
                told["stored_sha256"] = digest_of(stored)
                self._writer.write(part.to_parameter(stored), record.model_copy(update=told))
