"""A model repository of the Hugging Face hub, seen as a directory.

Headers are read by byte range, so a checkpoint is checked before anything large is downloaded. Files come down one at a
time through huggingface_hub's cache and can be deleted after use.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from qwq_jax.checkpoint.directory import LocalDirectory


def is_hub_id(text: str) -> bool:
    """Whether the text has the form ``owner/name`` or ``owner/name@revision``."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*(@[\w][\w./-]*)?", text) is not None


class HubDirectory:
    """The files of one commit; its `Directory` methods that write refuse.

    Args:
        location: ``owner/name`` or ``owner/name@revision``.
        delete_used: Delete from the cache, on `release`, each file that is not in `kept`.

    Attributes:
        kept: Files that are not ours to delete: what the cache held before.
    """

    def __init__(self, location: str, *, delete_used: bool):
        self.path = location
        self._repo, _, revision = location.partition("@")
        self._delete_used = delete_used
        self._local: dict[str, Path] = {}
        with _explained(location):
            info = HfApi().model_info(self._repo, revision=revision or None, files_metadata=True)
        self._commit = info.sha
        self._sizes = {f.rfilename: f.size or 0 for f in info.siblings or () if "/" not in f.rfilename}
        self.kept = {name for name in self._sizes if self._cached(name) is not None}

    def _cached(self, name: str) -> Path | None:
        found = try_to_load_from_cache(self._repo, name, revision=self._commit)
        return Path(found) if isinstance(found, str) else None

    def sizes(self) -> dict[str, int]:  # noqa: D102
        return dict(self._sizes)

    def children(self) -> set[str]:  # noqa: D102
        return set(self._sizes)

    def stamp(self, name: str) -> str:  # noqa: D102
        return f"{self._commit}/{name}"

    def read(self, name: str) -> bytes:  # noqa: D102
        self.fetch(name)
        return self._local[name].read_bytes()

    def read_into(self, name: str, start: int, out: memoryview) -> None:  # noqa: D102
        if name in self._local:
            at = self._local[name]
            LocalDirectory(str(at.parent)).read_into(at.name, start, out)
            return
        if not out:
            return
        headers = build_hf_headers() | {"Range": f"bytes={start}-{start + len(out) - 1}"}
        with _explained(f"{self.path}/{name}"):
            url = hf_hub_url(self._repo, name, revision=self._commit)
            answer = get_session().get(url, headers=headers, follow_redirects=True)
            hf_raise_for_status(answer)
        if len(answer.content) != len(out):
            raise ValueError(f"{self.path}/{name}: asked for {len(out)} bytes at {start}, got {len(answer.content)}")
        out[:] = answer.content

    def fetch(self, name: str) -> None:
        """Downloads the file unless it is there."""
        if name in self._local:
            return
        with _explained(f"{self.path}/{name}"):
            self._local[name] = Path(hf_hub_download(self._repo, name, revision=self._commit))

    def release(self, name: str) -> None:
        """The file, which an earlier run may have downloaded, is not needed any more."""
        self._local.pop(name, None)
        local = self._cached(name)
        if local is not None and self._delete_used and name not in self.kept:
            blob = local.resolve()
            local.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:  # noqa: D102
        raise ValueError(f"{self.path} is a hub repository and cannot be written to")

    def write(self, name: str, data: bytes) -> None:  # noqa: D102
        self.create(name)

    def delete(self, name: str) -> None:  # noqa: D102
        self.create(name)

    def remove_if_empty(self) -> None:  # noqa: D102
        self.create("")

    def sync(self, name: str) -> None:  # noqa: D102
        self.create(name)

    def free_bytes(self) -> int | None:  # noqa: D102
        return None


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{where}: no such directory here, and the Hugging Face hub answers: {first}") from error
