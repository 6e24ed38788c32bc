"""The three Google services that a VM talks to, over HTTP, with the token of its own service account."""

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

_TIMEOUT = 20.0
_TRIES = 4
# Answers after which the same request may well succeed.
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Endpoints:
    """Where the services are; tests have their own."""

    metadata: str = "http://metadata.google.internal"
    storage: str = "https://storage.googleapis.com"
    tpu: str = "https://tpu.googleapis.com"


class Conflict(Exception):
    """The object is there already."""


class Google:
    """Metadata server, one bucket, and the TPU API.

    Whatever goes wrong on the way is an `OSError`.
    """

    def __init__(self, endpoints: Endpoints, attributes: "dict[str, str] | None" = None) -> None:
        self._endpoints = endpoints
        self._attributes = attributes or {}
        self._token = ("", 0.0)
        self.bucket = ""

    def metadata(self, path: str) -> "str | None":
        """Reads a key of the metadata server; None if there is none."""
        url = f"{self._endpoints.metadata}/computeMetadata/v1/{path}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        found = self._send(request)
        return None if found is None else found.decode()

    def attribute(self, key: str) -> "str | None":
        """Reads an attribute of this VM, of those given at start before those of the metadata server."""
        if key in self._attributes:
            return self._attributes[key]
        return self.metadata(f"instance/attributes/{key}")

    def get(self, name: str) -> "bytes | None":
        """Reads an object; None if there is none."""
        return self._authorized("GET", f"{self._objects()}/{_quote(name)}?alt=media")

    def put(self, name: str, data: bytes, *, only_new: bool = False) -> None:
        """Writes an object.

        Raises:
            Conflict: It was to be a new one, and is there.
        """
        about = json.dumps({"name": name}).encode()
        boundary = hashlib.sha256(data).hexdigest().encode()
        head = b"--%b\r\nContent-Type: application/json\r\n\r\n%b\r\n" % (boundary, about)
        part = b"--%b\r\nContent-Type: application/octet-stream\r\n\r\n%b\r\n--%b--\r\n" % (boundary, data, boundary)
        url = f"{self._endpoints.storage}/upload/storage/v1/b/{self.bucket}/o?uploadType=multipart"
        content_type = f'multipart/related; boundary="{boundary.decode()}"'
        try:
            self._authorized("POST", url + ("&ifGenerationMatch=0" if only_new else ""), head + part, content_type)
        except urllib.error.HTTPError as error:
            if error.code != 412:
                raise
            raise Conflict(name) from None

    def list(self, prefix: str) -> "list[str]":
        """Names of all objects that begin so."""
        found, page = [], ""
        while True:
            answer = self._authorized("GET", f"{self._objects()}?prefix={_quote(prefix)}{page}") or b"{}"
            listing = json.loads(answer)
            found += [item["name"] for item in listing.get("items", ())]
            if not listing.get("nextPageToken"):
                return sorted(found)
            page = f"&pageToken={_quote(listing['nextPageToken'])}"

    def delete_queued_resource(self, project: str, zone: str, name: str) -> None:
        """Deletes the resource that this VM belongs to; that it is gone already is fine."""
        path = f"v2/projects/{project}/locations/{zone}/queuedResources/{name}?force=true"
        self._authorized("DELETE", f"{self._endpoints.tpu}/{path}")

    def _objects(self) -> str:
        return f"{self._endpoints.storage}/storage/v1/b/{self.bucket}/o"

    def _authorized(
        self, method: str, url: str, data: "bytes | None" = None, content_type: str = "application/json"
    ) -> "bytes | None":
        headers = {"Authorization": f"Bearer {self._fresh_token()}", "Content-Type": content_type}
        return self._send(urllib.request.Request(url, data, headers, method=method))

    def _fresh_token(self) -> str:
        token, until = self._token
        if time.monotonic() >= until:
            answer = json.loads(self.metadata("instance/service-accounts/default/token") or "{}")
            token = answer.get("access_token", "")
            self._token = (token, time.monotonic() + max(float(answer.get("expires_in", 0)) - 120, 0))
        return token

    def _send(self, request: urllib.request.Request) -> "bytes | None":
        for again in range(_TRIES - 1, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 404:
                    return None
                if error.code not in _AGAIN or not again:
                    raise
            except OSError:
                if not again:
                    raise
            except http.client.HTTPException as error:
                # An answer that broke off; it is no OSError of itself.
                if not again:
                    raise ConnectionError(f"{type(error).__name__}: {error}") from None
            time.sleep(0.5 * 2 ** (_TRIES - 1 - again))
        raise AssertionError("the last try returns or raises")


def _quote(text: str) -> str:
    return urllib.parse.quote(text, safe="")
