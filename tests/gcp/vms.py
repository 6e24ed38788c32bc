"""VMs as process groups of this machine: the start script runs in each, as on a TPU VM."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.gcp.fake_tpu import Server
from tests.gcp.world import Queued

ROOT = Path(__file__).parents[2]


@dataclass
class Vms:
    """The workers of every active resource.

    Attributes:
        server: Answers their metadata servers.
        storage: Address of the bucket server.
        home: Disks, one a worker; a new VM in the place of an old one finds the old disk, to spare the tests a second
            installation.
        workers: Of one slice.
        environment: Of the clients that the job uses.
        pace: Factor of the agent's periods.
    """

    server: Server
    storage: str
    home: Path
    workers: int
    environment: dict[str, str]
    pace: float = 0.1
    running: dict[str, list[subprocess.Popen[bytes]]] = field(default_factory=dict)
    booted: list[str] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self.server.metadata = self.metadata
        self.server.world.vm = self.active

    def active(self, queued: Queued, now: float) -> None:
        """Boots the VMs of a resource when it becomes active."""
        if queued.name not in self.running:
            self.booted.append(queued.name)
            self.running[queued.name] = [self._boot(queued, index) for index in range(self.workers)]

    def metadata(self, vm: str, path: str) -> str | None:
        """What the metadata server of ``RESOURCE.INDEX`` says."""
        name, _, index = vm.rpartition(".")
        (queued,) = [each for each in self.server.world.history if each.name == name]
        attributes = {
            **queued.node["metadata"],
            "agent-worker-number": index,
            "worker-network-endpoints": ",".join(["unknown:unknown:127.0.0.1"] * self.workers),
        }
        if path == "instance/service-accounts/default/token":
            return '{"access_token": "x", "expires_in": 3600}'
        if path == "instance/preempted":
            return "TRUE" if queued.state == "SUSPENDING" else "FALSE"
        return attributes.get(path.removeprefix("instance/attributes/"))

    def kill(self, name: str) -> None:
        """Takes the VMs of a resource without a warning."""
        for process in self.running.get(name, ()):
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()

    def reap(self) -> None:
        """Ends the VMs of resources that are going or gone."""
        alive = {queued.name for queued in self.server.world.resources.values() if queued.state == "ACTIVE"}
        for name in set(self.running) - alive:
            self.kill(name)

    def _boot(self, queued: Queued, index: int) -> subprocess.Popen[bytes]:
        disk = self.home / f"worker-{index}"
        disk.mkdir(parents=True, exist_ok=True)
        script = disk / "startup.sh"
        script.write_text(queued.node["metadata"]["startup-script"])
        variables = {
            "QWQ_JAX_METADATA": f"{self.server.url}/vm/{queued.name}.{index}",
            "QWQ_JAX_STORAGE": self.storage,
            "QWQ_JAX_TPU": self.server.url,
            "QWQ_JAX_HOME": str(disk),
            "QWQ_JAX_FOREGROUND": "1",
            "QWQ_JAX_PACE": str(self.pace),
            "QWQ_JAX_COORDINATOR_PORT": str(self.port),
            # The packages that the lock would bring are here already.
            "PYTHONPATH": next(path for path in sys.path if path.endswith("site-packages")),
            "PATH": f"{Path(sys.base_prefix) / 'bin'}:{os.environ['PATH']}",
        }
        with (disk / "console").open("ab") as console:
            return subprocess.Popen(
                ["bash", str(script)],
                env=self.environment | variables,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
