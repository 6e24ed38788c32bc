"""How the hosts of a run do: what each process tells of itself, and what process 0 says of all of them."""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from jax.errors import JaxRuntimeError

GB = 1e9
_PROC = Path("/proc")


@dataclass(frozen=True)
class HostHealth:
    """What one process tells of itself and of the machine that it runs on; None where the machine does not say.

    Attributes:
        process: Its index.
        host: Name of the machine.
        memory_gb: That the process holds.
        free_gb: That the machine could still give.
        load: Tasks that ran or waited in the last minute, over processors.
        device_memory: Of its fullest device, the part in use; the CPU does not say.
        silent_seconds: Since it was heard of; whoever hears fills it in.
    """

    process: int
    host: str
    memory_gb: float | None
    free_gb: float | None
    load: float | None
    device_memory: float | None
    silent_seconds: float = 0.0

    @classmethod
    def of_this(cls, process: int, devices: Sequence[Any], proc: Path = _PROC) -> Self:
        """Looks at this process, its machine, and those of JAX's devices that are given."""
        return cls(
            process=process,
            host=socket.gethostname(),
            memory_gb=_asked(lambda: _resident(proc / "self" / "statm") / GB),
            free_gb=_asked(lambda: _available(proc / "meminfo") / GB),
            load=_asked(lambda: os.getloadavg()[0] / (os.cpu_count() or 1)),
            device_memory=_fullest(devices),
        )

    @classmethod
    def from_json(cls, told: Any) -> Self | None:
        """Reads what `to_json` gave; None if it is of another version of this program."""
        known = {field.name for field in fields(cls)}
        return cls(**told) if isinstance(told, dict) and set(told) == known else None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def heard(self, seconds: float) -> Self:
        """The same, of a process that was heard of so many seconds ago."""
        return replace(self, silent_seconds=round(seconds, 1))


def _asked(figure: Callable[[], float]) -> float | None:
    """A figure of the system, which not every one has."""
    try:
        return round(figure(), 3)
    except (OSError, KeyError):
        return None


def _resident(statm: Path) -> int:
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _available(meminfo: Path) -> int:
    """Bytes that Linux says it could give without swapping."""
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024


def _fullest(devices: Sequence[Any]) -> float | None:
    parts = []
    for device in devices:
        try:
            told = device.memory_stats()
        except (JaxRuntimeError, NotImplementedError):  # a device that cannot say, or is in trouble
            continue
        if told and told.get("bytes_limit"):
            parts.append(told["bytes_in_use"] / told["bytes_limit"])
    return round(max(parts), 3) if parts else None


def summary(told: Sequence[HostHealth]) -> str:
    """One line on all processes: how many, and of each figure the worst with the process that has it."""
    machines = len({each.host for each in told})
    words = [f"{len(told)} processes on {machines} host{'s' if machines > 1 else ''}"]

    def add(text: str, figures: dict[int, float | None], worst: Callable[..., int]) -> None:
        known = {process: figure for process, figure in figures.items() if figure is not None}
        if known:
            process = worst(known, key=lambda each: known[each])
            words.append(f"{text.format(known[process])} (p{process})")

    add("most memory {:.1f} GB", {each.process: each.memory_gb for each in told}, max)
    add("least free {:.1f} GB", {each.process: each.free_gb for each in told}, min)
    add("highest load {:.1f}", {each.process: each.load for each in told}, max)
    add("fullest device {:.0%}", {each.process: each.device_memory for each in told}, max)
    add("longest unheard of {:.0f} s", {each.process: each.silent_seconds for each in told}, max)
    return ", ".join(words)
