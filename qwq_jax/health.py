"""How the hosts of a run do: what each tells of itself beside its beat, and what process 0 says of all of them."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

GB = 1e9
_PROC = Path("/proc")


@dataclass(frozen=True)
class HostHealth:
    """What one process tells of itself and of the machine that it runs on.

    Attributes:
        process: Its index.
        host: Name of the machine.
        memory_gb: That the process holds.
        free_gb: That the machine could still give.
        load: Tasks that ran or waited in the last minute, over processors.
        device_memory: Of its fullest device, the part in use; None where devices do not tell, as on the CPU.
        silent_seconds: Since it was heard of; whoever hears fills it in.
    """

    process: int
    host: str
    memory_gb: float
    free_gb: float
    load: float
    device_memory: float | None
    silent_seconds: float = 0.0

    @classmethod
    def of_this(cls, process: int, devices: Sequence[Any], proc: Path = _PROC) -> "HostHealth":
        """Looks at this process, its machine, and those of JAX's devices that are given."""
        pages = int((proc / "self" / "statm").read_text().split()[1])
        return cls(
            process=process,
            host=socket.gethostname(),
            memory_gb=round(pages * os.sysconf("SC_PAGE_SIZE") / GB, 3),
            free_gb=round(_available(proc / "meminfo") / GB, 3),
            load=round(os.getloadavg()[0] / (os.cpu_count() or 1), 2),
            device_memory=_fullest(devices),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def heard(self, seconds: float) -> "HostHealth":
        """The same, as it was told so many seconds ago."""
        return replace(self, silent_seconds=round(seconds, 1))


def _available(meminfo: Path) -> int:
    """Bytes that Linux says it could give without swapping."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _fullest(devices: Sequence[Any]) -> float | None:
    told = [stats for device in devices if (stats := device.memory_stats())]
    parts = [stats["bytes_in_use"] / stats["bytes_limit"] for stats in told if stats.get("bytes_limit")]
    return round(max(parts), 3) if parts else None


def summary(hosts: Mapping[int, HostHealth]) -> str:
    """One line on all hosts: how many, and of each figure the worst with the process that has it."""
    all_of_them = list(hosts.values())
    fullest = max(all_of_them, key=lambda host: host.memory_gb)
    tightest = min(all_of_them, key=lambda host: host.free_gb)
    busiest = max(all_of_them, key=lambda host: host.load)
    quietest = max(all_of_them, key=lambda host: host.silent_seconds)
    words = [
        f"{len(all_of_them)} hosts",
        f"most memory {fullest.memory_gb:.1f} GB (p{fullest.process})",
        f"least free {tightest.free_gb:.1f} GB (p{tightest.process} on {tightest.host})",
        f"highest load {busiest.load:.1f} (p{busiest.process})",
    ]
    told = [(host.device_memory, host.process) for host in all_of_them if host.device_memory is not None]
    if told:
        part, process = max(told)
        words.append(f"fullest device {part:.0%} (p{process})")
    words.append(f"last heard of {quietest.silent_seconds:.0f} s ago (p{quietest.process})")
    return ", ".join(words)
