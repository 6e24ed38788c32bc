"""A directory that is local or in a bucket: durable atomic writes, listings, and reads of byte ranges.

A write counts only when it returns: the bytes, the name and every new parent directory are then on disk (local) or the
object is complete (bucket). A reader therefore never sees half a file under its final name.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, Protocol

import aiohttp
import fsspec
import gcsfs.retry
import google.auth.exceptions

TEMPORARY = ".tmp"
# What the clients of buckets raise that is no OSError.
_BUCKET_ERRORS = (
    gcsfs.retry.HttpError,
    gcsfs.retry.ChecksumError,
    gcsfs.retry.NonRetryableError,
    google.auth.exceptions.GoogleAuthError,
    aiohttp.ClientError,
)
_REASONS = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the system allows",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.EIO: "the device reports an input/output error",
}


class Directory(Protocol):
    """What both kinds offer. Names are relative, with ``/`` between parts."""

    path: str

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that lies directly in the directory; empty when there is no directory."""
        ...

    def children(self) -> set[str]:
        """Names of files and folders directly inside."""
        ...

    def stamp(self, name: str) -> str:
        """A text that changes when the file is replaced."""
        ...

    def read(self, name: str) -> bytes:
        """The whole file."""
        ...

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fills `out` with the bytes from `start` on."""
        ...

    def fetch(self, name: str) -> None:
        """Brings the file near, where that has a meaning; many reads of it follow."""
        ...

    def release(self, name: str) -> None:
        """Says that no more reads of the file follow."""
        ...

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Opens a file that appears under its name when the ``with`` block ends without an error."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file, durably and at once."""
        ...

    def delete(self, name: str) -> None:
        """Deletes a file or a folder with all it holds; nothing happens when it is absent."""
        ...

    def remove_if_empty(self) -> None:
        """Removes the directory itself, if it holds nothing and has a parent to lie in."""
        ...

    def sync(self, name: str) -> None:
        """Makes the folder `name`, written by somebody else, durable."""
        ...

    def free_bytes(self) -> int | None:
        """Space left, where that has a meaning."""
        ...


def open_directory(path: str | os.PathLike[str]) -> Directory:
    """Returns the directory at a local path or a ``gs://`` address. Creates nothing.

    Raises:
        ValueError: The address is of another kind.
    """
    text = os.fspath(path)
    scheme, separator, _ = text.partition("://")
    if separator and scheme != "gs":
        raise ValueError(f"{text}: expected a local path or a gs:// address, not {scheme}://")
    return BucketDirectory(text) if "://" in text else LocalDirectory(text)


@contextmanager
def sole_writer(path: str) -> Iterator[None]:
    """Keeps other processes of this user and machine that write to the same directory out; death lets go.

    The lock lies in the system's temporary directory: the destination stays as it is, and may be in a bucket. It is
    deleted while it is held, so whoever gets hold of a deleted one tries again.

    Raises:
        ValueError: Another process holds it.
    """
    place = path.rstrip("/") if "://" in path else os.path.realpath(path)
    name = f"qwq-jax-{os.getuid()}-{hashlib.sha256(place.encode()).hexdigest()[:16]}.lock"
    lock = Path(tempfile.gettempdir()) / name
    while True:
        with lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path} is being written by another process") from None
            if _is_file_at(file, lock):
                try:
                    yield
                finally:
                    lock.unlink(missing_ok=True)
                return


def _is_file_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns a failing disk or bucket into one sentence that opens with `what`, such as ``"cannot write PATH"``."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{what}: {reason(error)}") from error


@contextmanager
def os_errors() -> Iterator[None]:
    """A full disk comes from tensorstore as a ValueError with the system's error number in its text."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        text = re.split(r"\[(?:source locations|tensorstore_spec)", str(error))[0].strip()
        raise (OSError(text) if code is None else OSError(int(code[1]), text)) from error


def reason(error: OSError) -> str:
    """Why the operating system refused, in words a user understands."""
    return _REASONS.get(error.errno or 0) or error.strerror or str(error).splitlines()[0]


@contextmanager
def answered(address: str) -> Iterator[None]:
    """Turns a bucket's refusal, or the want of a login, into one sentence about `address`; absence stays as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (*_BUCKET_ERRORS, OSError, ValueError) as error:
        raise ValueError(_refusal(address, error)) from error


def _refusal(address: str, error: BaseException) -> str:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    unknown = isinstance(error, google.auth.exceptions.GoogleAuthError) or getattr(error, "code", None) in (401, "401")
    advice = "; log in with gcloud auth application-default login" if unknown else ""
    return f"{address}: the bucket cannot be used: {said}{advice}"


class LocalDirectory:
    """A directory of this machine's file system."""

    def __init__(self, path: str):
        self.path = path
        self._root = Path(path)

    def sizes(self) -> dict[str, int]:  # noqa: D102
        if not self._root.is_dir():
            return {}
        found: dict[str, int] = {}
        for entry in os.scandir(self._root):
            with suppress(FileNotFoundError):  # another process has put it in its place meanwhile
                if entry.is_file():
                    found[entry.name] = entry.stat().st_size
        return found

    def children(self) -> set[str]:  # noqa: D102
        if self._root.exists() and not self._root.is_dir():
            raise ValueError(f"{self.path} is a file, a directory was expected")
        return set(os.listdir(self._root)) if self._root.is_dir() else set()

    def stamp(self, name: str) -> str:  # noqa: D102
        status = (self._root / name).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"

    def read(self, name: str) -> bytes:  # noqa: D102
        return (self._root / name).read_bytes()

    def read_into(self, name: str, start: int, out: memoryview) -> None:  # noqa: D102
        with open(self._root / name, "rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < len(out):
                count = file.readinto(out[done:])
                if not count:
                    raise ValueError(f"{self._root / name} ends early, at byte {start + done}")
                done += count

    def fetch(self, name: str) -> None:  # noqa: D102
        """Nothing to do."""

    def release(self, name: str) -> None:  # noqa: D102
        """Nothing to do."""

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:  # noqa: D102
        target = self._root / name
        self._make(target.parent)
        temporary = target.with_name(target.name + TEMPORARY)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)

    def write(self, name: str, data: bytes) -> None:  # noqa: D102
        with self.create(name) as file:
            file.write(data)

    def delete(self, name: str) -> None:  # noqa: D102
        target = self._root / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        if self._root.is_dir():
            _sync_directory(self._root)

    def remove_if_empty(self) -> None:  # noqa: D102
        if not self.children():
            with suppress(OSError):  # a mount point, or somebody else's parent: an empty directory stays
                self._root.rmdir()

    def sync(self, name: str) -> None:  # noqa: D102
        for folder, _, _ in os.walk(self._root / name):
            _sync_directory(Path(folder))
        for parent in (self._root / name).relative_to(self._root).parents:
            _sync_directory(self._root / parent)

    def free_bytes(self) -> int | None:  # noqa: D102
        existing = next(p for p in (self._root, *self._root.absolute().parents) if p.exists())
        return shutil.disk_usage(existing).free

    def _make(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make(folder.absolute().parent)
        folder.mkdir(exist_ok=True)
        _sync_directory(folder.absolute().parent)


class BucketDirectory:
    """A prefix of a bucket, by the fsspec file system that its scheme names."""

    def __init__(self, path: str):
        self.path = path.rstrip("/")
        with answered(self.path):
            self._fs, self._root = fsspec.core.url_to_fs(self.path, use_listings_cache=False)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _entries(self) -> list[dict]:
        try:
            with answered(self.path):
                found = self._fs.ls(self._root, detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return [entry for entry in found if entry["name"].rstrip("/") != self._root]

    def sizes(self) -> dict[str, int]:  # noqa: D102
        return {e["name"].rsplit("/", 1)[-1]: e["size"] for e in self._entries() if e["type"] == "file"}

    def children(self) -> set[str]:  # noqa: D102
        return {e["name"].rstrip("/").rsplit("/", 1)[-1] for e in self._entries()}

    def stamp(self, name: str) -> str:  # noqa: D102
        with answered(f"{self.path}/{name}"):
            info = self._fs.info(self._at(name))
        return f"{info['size']}-{info.get('etag') or info.get('mtime') or info.get('created')}"

    def read(self, name: str) -> bytes:  # noqa: D102
        with answered(f"{self.path}/{name}"):
            return self._fs.cat_file(self._at(name))

    def read_into(self, name: str, start: int, out: memoryview) -> None:  # noqa: D102
        with answered(f"{self.path}/{name}"):
            data = self._fs.cat_file(self._at(name), start=start, end=start + len(out))
        if len(data) != len(out):
            raise ValueError(f"{self.path}/{name} ends early, at byte {start + len(data)}")
        out[:] = data

    def fetch(self, name: str) -> None:  # noqa: D102
        """Nothing to do."""

    def release(self, name: str) -> None:  # noqa: D102
        """Nothing to do."""

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:  # noqa: D102
        address = f"{self.path}/{name}"
        with answered(address):
            file = self._fs.open(self._at(name), "wb")
        try:
            yield file
        except BaseException as error:
            with suppress(*_BUCKET_ERRORS, OSError):
                file.discard()
            file.closed = True
            if isinstance(error, _BUCKET_ERRORS):
                raise ValueError(_refusal(address, error)) from error
            raise
        with answered(address):
            file.close()

    def write(self, name: str, data: bytes) -> None:  # noqa: D102
        with answered(f"{self.path}/{name}"):
            self._fs.pipe_file(self._at(name), data)

    def delete(self, name: str) -> None:  # noqa: D102
        with suppress(FileNotFoundError), answered(f"{self.path}/{name}"):
            self._fs.rm(self._at(name), recursive=True)

    def remove_if_empty(self) -> None:  # noqa: D102
        """Buckets have no directories."""

    def sync(self, name: str) -> None:  # noqa: D102
        """A bucket is durable when the request is answered."""

    def free_bytes(self) -> int | None:  # noqa: D102
        return None


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
