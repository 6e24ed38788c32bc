"""A result file that survives a crash: lines are appended as they are known, and a restart goes on where it stood.

Beside `OUTPUT` lies `OUTPUT.run.json`, which says what the results belong to (the fingerprints of input and checkpoint,
the seed); it also carries the lock that keeps a second process out.  A line counts once it is complete with its line
feed; a torn last line is cut off at the next start.  Lines are appended in the order in which requests end; when all
are there they are put in input order by one atomic rename.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwq_jax.jobs.batch_file import result_number

SYNC_SECONDS = 1.0


def file_fingerprint(path: Path) -> dict[str, Any]:
    """Length and SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


class ResultFile:
    """Open it with `with`; then `done` holds the request lines that are answered already.

    `origin` is what the results depend on; going on with another one is refused.
    """

    def __init__(self, path: Path, origin: dict[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._record = path.with_name(path.name + ".run.json")
        self.done: set[int] = set()
        self._origin = origin
        self._clock = clock
        self._offsets: dict[int, tuple[int, int]] = {}
        self._in_order = True
        self._last = 0
        self._end = 0
        self._unsynced = False
        self._synced_at = clock()

    def __enter__(self) -> Self:
        record = self._record
        try:
            self._lock = os.open(record, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"cannot write {record}: {error.strerror}") from None
        try:
            self._open(record)
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.sync()
        finally:
            if error is not None and not self.done:  # nothing was answered: leave nothing behind
                self.path.unlink(missing_ok=True)
                self._record.unlink(missing_ok=True)
            os.close(self._file)
            os.close(self._lock)

    def append(self, raw: bytes) -> None:
        """Add a result line whole; on a full disk none of it."""
        number = result_number(raw)
        assert number not in self.done, f"line {number} is answered already"
        assert raw.endswith(b"\n") and raw.count(b"\n") == 1, "one line is appended at a time"
        try:
            _write_all(self._file, raw)
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from None
        self._note(number, len(raw))
        self._unsynced = True
        self.sync_if_due()

    def sync_if_due(self) -> None:
        """Make durable what has waited for `SYNC_SECONDS`; called between appends too, it bounds what a crash takes."""
        if self._unsynced and self._clock() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make what was appended durable."""
        if self._unsynced:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise ValueError(f"cannot write {self.path}: {error.strerror}") from None
            self._unsynced = False
        self._synced_at = self._clock()

    def finish(self) -> None:
        """All lines are answered: put them in input order, unless they are."""
        self.sync()
        if self._in_order:
            return
        ordered = self.path.with_name(self.path.name + ".sorted.tmp")
        try:
            with self.path.open("rb") as source, ordered.open("wb") as target:
                for number in sorted(self._offsets):
                    offset, length = self._offsets[number]
                    source.seek(offset)
                    target.write(source.read(length))
                target.flush()
                os.fsync(target.fileno())
            ordered.replace(self.path)
        except OSError as error:
            ordered.unlink(missing_ok=True)
            raise ValueError(f"cannot write {ordered}: {error.strerror}") from None
        _sync_directory(self.path.parent)

    def lines(self) -> Iterator[bytes]:
        """The result lines, as they lie in the file."""
        with self.path.open("rb") as file:
            yield from file

    def delete(self) -> None:
        """Remove the file and what lies beside it, while the lock is held."""
        self.path.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)
        _sync_directory(self.path.parent)

    def _open(self, record: Path) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock may have deleted the file between its opening and this line.
            if not record.exists() or not os.path.samestat(os.fstat(self._lock), record.stat()):
                raise BlockingIOError
        except BlockingIOError:
            raise ValueError(f"{self.path} is being written by another process") from None
        self._check_origin(record)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from None
        try:
            self._recover()
        except BaseException:
            os.close(self._file)
            raise
        _sync_directory(self.path.parent)

    def _check_origin(self, record: Path) -> None:
        """Compare with what the file was begun with, or take note of it."""
        has_results = self.path.exists() and self.path.stat().st_size > 0
        written = os.pread(self._lock, os.fstat(self._lock).st_size, 0)
        try:
            begun_with = json.loads(written)
        except ValueError:
            begun_with = None
        if not isinstance(begun_with, dict):
            begun_with = {}
        if has_results and not begun_with:
            if not written:
                record.unlink()
            raise ValueError(
                f"{self.path} exists, and is not the unfinished result of this command: move it away first"
            )
        if has_results:
            changed = sorted(
                key for key in {*begun_with, *self._origin} if begun_with.get(key) != self._origin.get(key)
            )
            if changed:
                raise ValueError(
                    f"{self.path} was begun with another {' and '.join(changed)}: "
                    f"choose another output, or remove it with {record.name}"
                )
        elif begun_with != self._origin:
            try:
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, json.dumps(self._origin, indent=1).encode() + b"\n", 0)
                os.fsync(self._lock)
            except OSError as error:
                raise ValueError(f"cannot write {record}: {error.strerror}") from None

    def _recover(self) -> None:
        """Find the answered lines, and cut off a torn one."""
        with self.path.open("rb") as file:
            for index, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    number = result_number(raw)
                except ValueError:
                    raise ValueError(f"{self.path} line {index}: not a result line of this program") from None
                if number in self.done:
                    raise ValueError(f"{self.path} line {index}: answers line {number} of the input a second time")
                self._note(number, len(raw))
        if self._end < os.fstat(self._file).st_size:
            os.ftruncate(self._file, self._end)

    def _note(self, number: int, length: int) -> None:
        self._in_order = self._in_order and number > self._last
        self._last = number
        self.done.add(number)
        self._offsets[number] = (self._end, length)
        self._end += length


def _write_all(file: int, raw: bytes) -> None:
    view = memoryview(raw)
    while view:
        view = view[os.write(file, view) :]


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
