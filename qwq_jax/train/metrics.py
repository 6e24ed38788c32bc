"""Numbers of a run: a JSON line a record, and TensorBoard events; each step once, however often resumed."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from etils import epath
from tensorboardX import SummaryWriter

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends records ``{"step": 12, "loss": 0.71, ...}`` to ``metrics.jsonl``, and to TensorBoard events.

    Opened with the step that a run resumes from, it first drops every record after that step, so that the file reads as
    if the run had never been interrupted. `flush` before a checkpoint is committed: then no step can be missing either.

    Nothing can be appended to an object in a bucket: there, files grow locally and every `flush` copies them.
    """

    def __init__(self, directory: epath.PathLike, *, resume_step: int = 0) -> None:
        """Opens or creates the log in `directory`; `resume_step` is 0 for a new run, which drops what was there."""
        self._target = epath.Path(directory)
        self._target.mkdir(parents=True, exist_ok=True)
        self._copies = "://" in str(directory)
        self._local = Path(tempfile.mkdtemp(prefix="qwq-jax-")) if self._copies else Path(directory)
        self.path = self._local / METRICS
        if self._copies and (self._target / METRICS).exists():
            self.path.write_bytes((self._target / METRICS).read_bytes())
        # A run may measure something before its first step, as step 0.
        last_step = resume_step or -1
        truncate_records(self.path, last_step=last_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(self._local / "tensorboard"), purge_step=last_step + 1)

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
        if self._copies:
            self._copy()

    def _copy(self) -> None:
        for path in self._local.rglob("*"):
            if path.is_file():
                target = self._target / path.relative_to(self._local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes, error or not."""
        self.close()

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
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n") or _step_of(line, f"{path}:{number}") > last_step:
            break
        kept.append(line)
    replacement = path.with_suffix(".jsonl.tmp")
    with replacement.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)


def _step_of(line: bytes, where: str) -> int:
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not even text
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"{where}: not a record of a training run; move the file away")
    return record["step"]


def read_records(path: Path) -> list[dict[str, float]]:
    """The records of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
