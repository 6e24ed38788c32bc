"""Logs and results to the bucket while the job runs: a killed VM takes nothing with it but the last seconds."""

import glob
from pathlib import Path

from gcp.worker.google import Google

# An object cannot be appended to. A log is a row of segments, of which only the last is written again.
SEGMENT = 256 * 1024


class LogMirror:
    """Copies a growing file into ``PREFIX-000000.log``, ``PREFIX-000001.log``, ..."""

    def __init__(self, google: Google, path: Path, prefix: str) -> None:
        self._google = google
        self._path = path
        self._prefix = prefix
        self._sent = 0

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._path.stat().st_size if self._path.exists() else 0

    def copy(self) -> None:
        """Brings the bucket up to date. An `OSError` leaves it to the next call."""
        while self._sent < (size := self.size):
            segment = self._sent // SEGMENT
            begin = segment * SEGMENT
            with self._path.open("rb") as log:
                log.seek(begin)
                data = log.read(SEGMENT)
            self._google.put(f"{self._prefix}-{segment:06d}.log", data)
            self._sent = min(begin + len(data), size)


class ResultMirror:
    """Copies files that match `patterns` in `directory` under `prefix` whenever they have changed."""

    def __init__(self, google: Google, directory: Path, patterns: "list[str]", prefix: str) -> None:
        self._google = google
        self._directory = directory
        self._patterns = patterns
        self._prefix = prefix
        self._sent: dict[str, tuple[int, int]] = {}

    def copy(self) -> None:
        """Brings the bucket up to date. An `OSError` leaves it to the next call."""
        for pattern in self._patterns:
            for name in sorted(glob.glob(pattern, root_dir=self._directory, recursive=True)):
                path = self._directory / name
                if not path.is_file():
                    continue
                state = (path.stat().st_size, path.stat().st_mtime_ns)
                if self._sent.get(name) != state:
                    self._google.put(f"{self._prefix}/{name}", path.read_bytes())
                    self._sent[name] = state

    def restore(self) -> None:
        """Fetches what an earlier VM copied and this one does not have."""
        if not self._patterns:
            return
        for name in self._google.list(f"{self._prefix}/"):
            path = self._directory / name[len(self._prefix) + 1 :]
            if path.exists() or (data := self._google.get(name)) is None:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            # Whole or not at all: half a file would be taken for the job's own.
            partial = path.with_name(path.name + ".part")
            partial.write_bytes(data)
            partial.rename(path)
