"""Numbers of a run: one JSON line a record and TensorBoard events, each step once however often the run is resumed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter


class MetricsLog:
    """Appends records ``{"step": 12, "loss": 0.71, ...}`` to ``metrics.jsonl`` and the same numbers as TensorBoard events.

    Opened with the step that a run resumes from, it first drops every record after that step, so that the file reads as
    if the run had never been interrupted. `flush` before a checkpoint is committed: then no step can be missing either.
    """

    def __init__(self, directory: Path, *, resume_step: int = 0) -> None:
        """Opens or creates the log in `directory`; `resume_step` is 0 for a new run, which drops what was there."""
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        truncate_records(self.path, last_step=resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one record."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Returns when everything written is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes both files."""
        self.flush()
        self._file.close()
        self._events.close()


def truncate_records(path: Path, *, last_step: int) -> None:
    """Drops, atomically, the records after `last_step` and a line that a crash left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > last_step:
            break
        kept.append(line)
    replacement = path.with_suffix(".jsonl.tmp")
    with replacement.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)


def read_records(path: Path) -> list[dict[str, float]]:
    """The records of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
