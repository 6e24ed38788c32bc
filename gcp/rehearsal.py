"""``--dry-run``: the whole life of a job without a network, every request printed."""

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from google.api_core.exceptions import NotFound
from google.cloud import tpu_v2

from gcp import gcloud
from gcp.client import ClientCloud
from gcp.cloud import Cloud, Request, Resource
from gcp.job import JobSpec
from gcp.objects import Objects
from gcp.record import Outcome, Record, Staged, conclude, load, save

Say = Callable[[str], None]
# Resources that were asked for, by zone and name, and their slices.
Made = dict[tuple[str, str], int]
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|KEY", re.IGNORECASE)
_SERVICE = "https://tpu.googleapis.com/v2"


class PlannedCloud:
    """The chosen client, and in the place of the service one that prints; resources become active at once.

    Args:
        project: Google Cloud project.
        say: Prints a line.
        by_gcloud: Command lines instead of HTTP.
        active: Called when a resource is seen active, in place of its workers.
    """

    def __init__(self, project: str, say: Say, *, by_gcloud: bool, active: Callable[[], None]) -> None:
        self._say = say
        self._active = active
        self._made: Made = {}
        self._gcloud = gcloud.GcloudCloud(project, self._run)
        # As much of Google's client as ours calls; the whole of it would connect.
        service = cast(tpu_v2.TpuClient, PlannedService(say, self._made))
        self._by_gcloud = by_gcloud
        self._cloud: Cloud = self._gcloud if by_gcloud else ClientCloud(project, service)

    def adopt(self, record: Record) -> None:
        """Takes the resource of a record for made."""
        self._made[record.zone, record.resource] = record.job.slices

    def get(self, zone: str, name: str) -> Resource | None:
        """Asks the client; active if it was made."""
        found = self._cloud.get(zone, name)
        if found is not None:
            self._active()
        return found

    def list(self, zone: str) -> list[Resource]:
        """Asks the client."""
        return self._cloud.list(zone)

    def create(self, request: Request) -> None:
        """Prints the request in full, but for the start script."""
        if self._by_gcloud:
            # Not by the client, which would write the metadata to files that are gone when they are read here.
            self._say(shlex.join(self._gcloud.create_command(request, Path("METADATA"))))
            for key, value in request.metadata.items():
                self._say(f"  METADATA/{key}: {_short(key, value)}")
        else:
            self._cloud.create(request)
        self._made[request.zone, request.name] = request.slices

    def delete(self, zone: str, name: str) -> None:
        """Asks the client."""
        self._cloud.delete(zone, name)
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


class PlannedService:
    """Answers in the place of `tpu_v2.TpuClient`, and prints what that would send."""

    def __init__(self, say: Say, made: Made) -> None:
        self._say = say
        self._made = made

    def get_queued_resource(self, *, name: str, timeout: float) -> tpu_v2.QueuedResource:
        """Active, if it was made.

        Raises:
            NotFound: It was not.
        """
        self._say(f"GET {_SERVICE}/{name}")
        parent, _, short = name.rpartition("/queuedResources/")
        slices = self._made.get((parent.rpartition("/")[2], short))
        if slices is None:
            raise NotFound(name)
        spec = tpu_v2.QueuedResource.Tpu.NodeSpec(parent=parent, node_id=short)
        if slices > 1:
            several = tpu_v2.QueuedResource.Tpu.NodeSpec.MultisliceParams(node_count=slices, node_id_prefix=short)
            spec = tpu_v2.QueuedResource.Tpu.NodeSpec(parent=parent, multislice_params=several)
        state = tpu_v2.QueuedResourceState(state=tpu_v2.QueuedResourceState.State.ACTIVE)
        return tpu_v2.QueuedResource(name=name, state=state, tpu=tpu_v2.QueuedResource.Tpu(node_spec=[spec]))

    def list_queued_resources(self, *, parent: str, timeout: float) -> list[tpu_v2.QueuedResource]:
        """None: a launcher looks for those of other attempts only."""
        self._say(f"GET {_SERVICE}/{parent}/queuedResources")
        return []

    def create_queued_resource(
        self, *, parent: str, queued_resource_id: str, queued_resource: tpu_v2.QueuedResource, timeout: float
    ) -> None:
        """Prints the body, but for the start script."""
        written = tpu_v2.QueuedResource.to_json(
            queued_resource, always_print_fields_with_no_presence=False, use_integers_for_enums=False
        )
        body = json.loads(written)
        metadata = body["tpu"]["nodeSpec"][0]["node"]["metadata"]
        metadata.update({key: _short(key, value) for key, value in metadata.items()})
        self._say(f"POST {_SERVICE}/{parent}/queuedResources?queuedResourceId={queued_resource_id}")
        self._say(json.dumps(body, indent=2))

    def delete_queued_resource(self, *, request: tpu_v2.DeleteQueuedResourceRequest, timeout: float) -> None:
        """Says so."""
        self._say(f"DELETE {_SERVICE}/{request.name}{'?force=true' if request.force else ''}")

    def get_node(self, *, name: str, timeout: float) -> tpu_v2.Node:
        """Ready, as the nodes of an active resource are."""
        self._say(f"GET {_SERVICE}/{name}")
        return tpu_v2.Node(name=name, state=tpu_v2.Node.State.READY)


def planned_run(say: Say, active: Callable[[], None]) -> gcloud.Run:
    """Prints gcloud's command lines for a VM that exists, and answers as one that is ready."""

    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        say(shlex.join(word if len(word) < 200 else word[:200] + "..." for word in command))
        if "describe" in command:
            active()
        return subprocess.CompletedProcess(list(command), 0, '{"state": "READY"}', "")

    return run


def without_secrets(say: Say, environment: Mapping[str, str]) -> Say:
    """Prints as `say` does, but for values of variables whose names call them secret."""
    secrets = [value for name, value in environment.items() if value and _SECRET.search(name)]

    def printed(text: str) -> None:
        for secret in secrets:
            text = text.replace(secret, "***")
        say(text)

    return printed


def finish(objects: Objects, job: str) -> None:
    """What the workers would write at the end."""
    saved = load(objects, job)
    assert saved is not None, "workers run for a record"
    conclude(objects, saved.record, Outcome(kind="done", detail="rehearsed", at=saved.record.created))


def _short(key: str, value: str) -> str:
    return f"({len(value.splitlines())} lines of gcp/boot.sh)" if key == "startup-script" else value


def seed(objects: Objects, job: JobSpec, *, now: float) -> Record:
    """Puts a record of a job in its first attempt into a rehearsed bucket."""
    staged = Staged(agent="AGENT", agent_sha256="SHA256", wheel="WHEEL", lock="LOCK", files={})
    deadline = now + job.deadline_hours * 3600
    record = Record(job=job, uid="000000", staged=staged, created=now, deadline=deadline, owner="rehearsal")
    record = record.changed(phase="asked", attempt=1, created_resource=True, asked_at=now)
    save(objects, record, generation=0)
    if job.vm:
        objects.put(record.places.vm_started(record.attempt), b"")
    return record
