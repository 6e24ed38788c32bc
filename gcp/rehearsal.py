"""``--dry-run``: the whole life of a job without a network, every request printed."""

import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from google.cloud import tpu_v2

from gcp import gcloud
from gcp.client import queued_resource
from gcp.cloud import Request, Resource, State
from gcp.job import JobSpec
from gcp.objects import Objects
from gcp.record import Outcome, Record, Staged, conclude, save

Say = Callable[[str], None]


class PlannedCloud:
    """Prints what it is asked, in the words of the chosen client; resources become active at once.

    Args:
        project: Google Cloud project.
        say: Prints a line.
        by_gcloud: Command lines instead of HTTP.
        active: Called when a resource is seen active, in place of its workers.
    """

    def __init__(self, project: str, say: Say, *, by_gcloud: bool, active: Callable[[], None]) -> None:
        self._project = project
        self._gcloud = gcloud.GcloudCloud(project, self._run)
        self._say = say
        self._by_gcloud = by_gcloud
        self._active = active
        # Slices, by zone and name.
        self._made: dict[tuple[str, str], int] = {}

    def adopt(self, record: Record) -> None:
        """Takes the resource of a record for made."""
        self._made[record.zone, record.resource] = record.job.slices

    def get(self, zone: str, name: str) -> Resource | None:
        """Says so; active if it was made."""
        if self._by_gcloud:
            found = self._gcloud.get(zone, name)
        else:
            self._say(f"GET {self._url(zone, name)}")
            found = Resource(name, zone, State.ACTIVE, "ACTIVE") if (zone, name) in self._made else None
        if found is not None:
            self._active()
        return found

    def list(self, zone: str) -> list[Resource]:
        """Says so."""
        if self._by_gcloud:
            return self._gcloud.list(zone)
        self._say(f"GET {self._url(zone, '')}")
        return []

    def create(self, request: Request) -> None:
        """Prints the request in full, but for the start script."""
        self._made[request.zone, request.name] = request.slices
        if self._by_gcloud:
            self._say(shlex.join(self._gcloud.create_command(request, Path("METADATA"))))
            for key, value in request.metadata.items():
                self._say(f"  METADATA/{key}: {_short(key, value)}")
            return
        parent = f"projects/{self._project}/locations/{request.zone}"
        body = json.loads(
            tpu_v2.QueuedResource.to_json(
                queued_resource(request, parent),
                always_print_fields_with_no_presence=False,
                use_integers_for_enums=False,
            )
        )
        metadata = body["tpu"]["nodeSpec"][0]["node"]["metadata"]
        metadata.update({key: _short(key, value) for key, value in metadata.items()})
        self._say(f"POST {self._url(request.zone, '')}?queuedResourceId={request.name}")
        self._say(json.dumps(body, indent=2))

    def delete(self, zone: str, name: str) -> None:
        """Says so."""
        if self._by_gcloud:
            self._gcloud.delete(zone, name)
        else:
            self._say(f"DELETE {self._url(zone, name)}?force=true")
        self._made.pop((zone, name), None)

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Prints a command line of gcloud, and answers for it."""
        self._say(shlex.join(command))
        answer: dict[str, object] | None = None
        if "tpu-vm" in command:
            answer = {"state": "READY"}
        elif "describe" in command:
            for (_, name), slices in self._made.items():
                if name in command:
                    node = {"multisliceParams": {"nodeCount": slices, "nodeIdPrefix": name}}
                    spec = node if slices > 1 else {"nodeId": name}
                    answer = {"name": name, "state": {"state": "ACTIVE"}, "tpu": {"nodeSpec": [spec]}}
        return subprocess.CompletedProcess(list(command), 0, json.dumps(answer), "")

    def _url(self, zone: str, name: str) -> str:
        tail = f"/{name}" if name else ""
        return f"https://tpu.googleapis.com/v2/projects/{self._project}/locations/{zone}/queuedResources{tail}"


def planned_run(say: Say, objects: Objects, record: Callable[[], Record]) -> gcloud.Run:
    """Prints gcloud's command lines for a VM that exists, and answers as one that is ready."""

    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        say(shlex.join(word if len(word) < 200 else word[:200] + "..." for word in command))
        if "describe" in command:
            finish(objects, record())
        return subprocess.CompletedProcess(list(command), 0, '{"state": "READY"}', "")

    return run


def finish(objects: Objects, record: Record) -> None:
    """What the workers would write at the end."""
    conclude(objects, record, Outcome(kind="done", detail="rehearsed", at=record.created))


def _short(key: str, value: str) -> str:
    return f"({len(value.splitlines())} lines of gcp/boot.sh)" if key == "startup-script" else value


def seed(objects: Objects, job: JobSpec, *, now: float) -> Record:
    """Puts a record of a job in its first attempt into a rehearsed bucket."""
    staged = Staged(agent="AGENT", agent_sha256="SHA256", wheel="WHEEL", lock="LOCK", files={})
    deadline = now + job.deadline_hours * 3600
    record = Record(job=job, uid="000000", staged=staged, created=now, deadline=deadline, owner="rehearsal")
    record = record.changed(phase="asked", attempt=1, created_resource=True, asked_at=now)
    save(objects, record, generation=0)
    return record
