"""Objects in a bucket, with conditional writes."""

import hashlib
import io
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import gcsfs
import requests
from gcsfs.retry import ChecksumError, HttpError
from google.auth.exceptions import RefreshError, TransportError


class Conflict(Exception):
    """Somebody else wrote the object since it was read."""


class Unavailable(Exception):
    """The bucket did not answer, and may later."""


@dataclass(frozen=True)
class Object:
    """What was read, and the generation that a conditional write names."""

    data: bytes
    generation: int


class Objects(Protocol):
    """One bucket. Any call may raise `Unavailable`."""

    def get(self, name: str) -> Object | None:
        """Reads an object; None if there is none."""
        ...

    def put(self, name: str, data: bytes, *, generation: int | None = None) -> int:
        """Writes one and returns its generation.

        Args:
            name: Of the object.
            data: All of it.
            generation: Write only if this one is the present generation; 0 for "only if there is none".

        Raises:
            Conflict: The present generation is another one.
        """
        ...

    def list(self, prefix: str) -> dict[str, int]:
        """Names and sizes of all objects that begin so, in order."""
        ...


class Bucket:
    """A bucket of Google Cloud Storage, by its JSON API through gcsfs, which finds credentials and retries."""

    def __init__(self, address: str, filesystem: gcsfs.GCSFileSystem) -> None:
        self._name = address.removeprefix("gs://")
        self._filesystem = filesystem

    def get(self, name: str) -> Object | None:
        """Reads an object and its generation in one answer."""
        try:
            headers, data = self._call("GET", "b/{}/o/{}", self._name, name, alt="media")
        except FileNotFoundError:
            return None
        return Object(data, int(headers["X-Goog-Generation"]))

    def put(self, name: str, data: bytes, *, generation: int | None = None) -> int:
        """Writes with a multipart upload, the form whose conditions every server checks."""
        boundary = hashlib.sha256(data).hexdigest()
        about = json.dumps({"name": name, "contentType": "application/octet-stream"})
        body = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{about}\r\n"
            f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        ).encode() + data
        condition = {} if generation is None else {"ifGenerationMatch": str(generation)}
        try:
            _, answer = self._call(
                "POST",
                f"{self._filesystem._location}/upload/storage/v1/b/{{}}/o",
                self._name,
                data=_Body(body + f"\r\n--{boundary}--\r\n".encode()),
                headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
                uploadType="multipart",
                **condition,
            )
        except FileExistsError:
            # A retry after a lost answer meets what the first try wrote.
            present = self.get(name)
            if present is not None and present.data == data:
                return present.generation
            raise Conflict(name) from None
        return int(json.loads(answer)["generation"])

    def list(self, prefix: str) -> dict[str, int]:
        """Follows the pages of the listing."""
        found: dict[str, int] = {}
        page: dict[str, str] = {}
        while True:
            _, answer = self._call("GET", "b/{}/o", self._name, prefix=prefix, **page)
            listing = json.loads(answer)
            found |= {item["name"]: int(item["size"]) for item in listing.get("items", ())}
            if not (token := listing.get("nextPageToken")):
                return dict(sorted(found.items()))
            page = {"pageToken": token}

    def _call(self, method: str, path: str, *arguments: str, **options: object) -> tuple[Mapping[str, str], bytes]:
        try:
            answer: Any = self._filesystem.call(method, path, *arguments, **options)
        except (FileNotFoundError, FileExistsError):
            raise
        except _ERRORS as error:
            if _is_transient(error):
                raise Unavailable(f"gs://{self._name} does not answer: {str(error) or type(error).__name__}") from None
            if isinstance(error, HttpError):
                raise OSError(f"gs://{self._name}: {error}") from None
            raise
        return answer


# What a call raises where the bucket, the network or the credentials are at fault.
_ERRORS = (
    HttpError,
    RefreshError,
    TransportError,
    ChecksumError,
    aiohttp.ClientError,
    requests.RequestException,
    OSError,
)


def _is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later. gcsfs has tried a few times when it raises one of these."""
    match error:
        case HttpError():
            return int(error.code or 500) in (401, 408, 429) or int(error.code or 500) >= 500
        case RefreshError():
            return error.retryable
        case TransportError() | ChecksumError() | aiohttp.ClientError() | requests.RequestException():
            return True
        case _:
            # The network's own; gcsfs says "no permission" with a plain OSError.
            return isinstance(error, ConnectionError | TimeoutError | socket.gaierror)


class _Body(io.BytesIO):
    """Stays open after it was sent: a retry sends it again."""

    def close(self) -> None:
        """Does nothing."""


def open_bucket(address: str) -> Bucket:
    """Opens ``gs://BUCKET`` with the caller's own credentials."""
    return Bucket(address, gcsfs.GCSFileSystem())


class PlannedObjects:
    """A bucket of a rehearsal, empty at first: says what it is asked, and keeps what is written in memory."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._written: dict[str, Object] = {}

    def others(self) -> "PlannedObjects":
        """The same bucket for those who are not rehearsed, such as the workers: what they ask is not said."""
        others = PlannedObjects(lambda text: None)
        others._written = self._written
        return others

    def get(self, name: str) -> Object | None:
        """What this rehearsal wrote."""
        self._say(f"GET {name}")
        return self._written.get(name)

    def put(self, name: str, data: bytes, *, generation: int | None = None) -> int:
        """Says so."""
        before = self._written.get(name)
        if generation is not None and generation != (before.generation if before else 0):
            raise Conflict(name)
        condition = "" if generation is None else f" if generation is {generation}"
        self._say(f"PUT {name} ({len(data)} bytes{condition})")
        self._written[name] = Object(data, (before.generation if before else 0) + 1)
        return self._written[name].generation

    def list(self, prefix: str) -> dict[str, int]:
        """What this rehearsal wrote."""
        self._say(f"LIST {prefix}")
        return {name: len(item.data) for name, item in sorted(self._written.items()) if name.startswith(prefix)}
