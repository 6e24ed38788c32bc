"""Mirrored logs, read back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gcp.objects import Objects
from gcp.record import Record


@dataclass
class LogReader:
    """Reads what the logs of a run gained since the last look.

    Attributes:
        objects: The bucket.
        record: Of the run.
        worker: Only this one; all otherwise.
    """

    objects: Objects
    record: Record
    worker: int | None = None
    _read: dict[str, int] = field(default_factory=dict)
    _rest: dict[str, bytes] = field(default_factory=dict)

    def new_lines(self) -> Iterator[str]:
        """Yields whole lines, each with attempt and worker before it."""
        for name, size in self.objects.list(f"{self.record.places.logs}/").items():
            source = name.rpartition("/")[2].rpartition("-")[0]
            if self.worker is not None and int(source.partition("-")[2]) != self.worker:
                continue
            before = self._read.get(name, 0)
            if size <= before or (found := self.objects.get(name)) is None:
                continue
            self._read[name] = len(found.data)
            lines = (self._rest.pop(source, b"") + found.data[before:]).split(b"\n")
            self._rest[source] = lines.pop()
            for line in lines:
                yield f"{_short(source)} {line.decode(errors='replace')}"

    def rest(self) -> Iterator[str]:
        """Yields last lines that have no end."""
        for source, line in sorted(self._rest.items()):
            if line:
                yield f"{_short(source)} {line.decode(errors='replace')}"


def follow(reader: LogReader, *, over: Callable[[], bool], sleep: Callable[[float], None]) -> Iterator[str]:
    """Yields lines as they come, until the run is over and all are read."""
    while True:
        ended = over()
        yield from reader.new_lines()
        if ended:
            yield from reader.rest()
            return
        sleep(5.0)


def _short(source: str) -> str:
    attempt, _, worker = source.partition("-")
    return f"[{int(attempt)}.{int(worker)}]"
