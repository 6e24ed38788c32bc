"""Runs one conversion again and again, each time killed with SIGKILL at another point and resumed.

Run as `python -m tests.checkpoint.crash_points SOURCE WORKDIR SEED COUNT`; prints what it saw as JSON. A process of
its own that imports once and then forks, so that a kill costs milliseconds. A point is a system call that makes
something durable, or the write of a shard, both counted.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwq_jax.checkpoint import store
from qwq_jax.jobs.convert import convert
from tests.checkpoint.sources import tree_bytes


class Points:
    """Counts events and kills this process at one of them."""

    def __init__(self, kill_at: int | None):
        self.count = 0
        self._kill_at = kill_at
        self._lock = threading.Lock()

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.hit()
            result = function(*args, **kwargs)
            self.hit()
            return result

        return watched

    def hit(self) -> None:
        with self._lock:
            self.count += 1
            if self.count == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def convert_in_child(source: Path, dest: Path, log: Path, kill_at: int | None) -> tuple[bool, int]:
    """Returns whether the child was killed, and how many points it passed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        points = Points(kill_at)
        os.fsync = points.watch(os.fsync)
        os.replace = points.watch(os.replace)
        boxes = store._boxes
        store._boxes = lambda *args: (points.hit() or box for box in boxes(*args))
        write = store.CheckpointWriter.write

        def logged(self, array, record):
            with open(log, "a") as file:
                file.write(record.path + "\n")
            write(self, array, record)

        store.CheckpointWriter.write = logged
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        convert(str(source), str(dest))
        os.write(writer, str(points.count).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        passed = pipe.read()
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, status
    return killed, int(passed or 0)


def finished(dest: Path) -> set[str]:
    """What the killed run had told the disk is finished."""
    if (dest / "manifest.json").exists():
        return {tensor["path"] for tensor in json.loads((dest / "manifest.json").read_text())["tensors"]}
    return {path.stem for path in (dest / "partial").glob("*.json")} - {"identity"}


def files_of(dest: Path, names: set[str]) -> dict[str, tuple[int, int]]:
    found = [p for name in names for p in (dest / "params" / name).rglob("*") if p.is_file()]
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


def crash_and_resume(source: Path, dest: Path, points: list[int]) -> dict[str, Any]:
    """Kills the same conversion once at each point, then lets it finish."""
    kills, rewritten, counts = 0, [], []
    for kill_at in [*points, None]:
        log = dest.with_suffix(".log")
        log.unlink(missing_ok=True)
        done = finished(dest)
        before = files_of(dest, done)
        marked = (dest / "COMMITTED").exists()
        assert not marked or not kill_at or kills
        killed, _ = convert_in_child(source, dest, log, kill_at)
        kills += killed
        written = log.read_text().split() if log.exists() else []
        rewritten += sorted(done & set(written))
        assert files_of(dest, done) == before, "a finished tensor's file changed"
        counts.append(len(done))
    return {"points": points, "kills": kills, "finished_before": counts, "rewritten": rewritten}


def main(source: Path, workdir: Path, seed: int, count: int) -> None:
    calm = workdir / "calm"
    _, total = convert_in_child(source, calm, workdir / "calm.log", None)
    want = tree_bytes(calm)
    chance = random.Random(seed)
    results = []
    for index in range(count):
        # one of equal slices each, so that the first and the last steps are always among them
        first = chance.randint(index * total // count + 1, (index + 1) * total // count)
        dest = workdir / f"killed-{index}"
        result = crash_and_resume(source, dest, [first, chance.randint(1, total)])
        results.append(result | {"equal": tree_bytes(dest) == want})
        shutil.rmtree(dest)
    print(json.dumps({"total": total, "tensors": len(finished(calm)), "results": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
