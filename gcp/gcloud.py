"""Cloud TPU by the ``gcloud`` command: for flex start, for VMs that exist, and where it is what one has."""

import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcp.cloud import Refusal, Refused, Request, Resource, State, refusal_of, state_of

# Runs a command line and returns its end; a rehearsal prints it instead.
Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]

_CODE = re.compile(r"\b(ALREADY_EXISTS|RESOURCE_EXHAUSTED|UNAVAILABLE|INTERNAL|ABORTED|DEADLINE_EXCEEDED)\b")
_NOT_FOUND = re.compile(r"NOT_FOUND|not found|HTTPError 404", re.IGNORECASE)
# What gcloud says, without a code, when the network failed it.
_NO_ANSWER = re.compile(
    r"gcloud crashed|problem refreshing|connection|timed? ?out|max retries|unable to (connect|find the server)"
    r"|name resolution|HTTPError 5\d\d",
    re.IGNORECASE,
)
_SECONDS = 300
# What the released track of gcloud has not, or only for old kinds of TPU.
_TYPE = "--type="
_ALPHA = ("--provisioning-model", _TYPE)
# With its nodes, without a question, without waiting.
_DELETION = ("--force", "--quiet", "--async")


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command line to its end.

    Raises:
        ValueError: There is no gcloud.
        Refused: It took too long.
    """
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]} was not found; install the Google Cloud CLI, or use --client rest")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Refused(Refusal.TRANSIENT, f"no answer in {_SECONDS} s: {shlex.join(command[:5])}") from None


@dataclass(frozen=True)
class GcloudCloud:
    """Queued resources of one project, through ``gcloud compute tpus queued-resources``."""

    project: str
    run: Run = run

    def get(self, zone: str, name: str) -> Resource | None:
        """Describes a queued resource, and its nodes when it says that it is active."""
        found = self._json(["queued-resources", "describe", name], zone)
        if found is None:
            return None
        word = found.get("state", {}).get("state", "")
        nodes = self._nodes(found, zone) if word == "ACTIVE" else ()
        return _resource(found, zone, nodes)

    def list(self, zone: str) -> list[Resource]:
        """Looks at all of a zone, without their nodes."""
        return [_resource(each, zone, ()) for each in self._json(["queued-resources", "list"], zone) or ()]

    def create(self, request: Request) -> None:
        """Asks for one; metadata goes through files, which take commas and newlines."""
        with tempfile.TemporaryDirectory() as temporary:
            for key, value in request.metadata.items():
                (Path(temporary) / key).write_text(value, encoding="utf-8")
            self._run(self.create_command(request, Path(temporary)))

    def create_command(self, request: Request, metadata: Path) -> Sequence[str]:
        """The command line that asks for a queued resource, with `metadata` as in `create_words`."""
        return self._command(create_words(request, metadata), request.zone, "--async")

    def delete(self, zone: str, name: str) -> None:
        """Deletes one with its nodes."""
        self._call(["queued-resources", "delete", name], zone, *_DELETION)

    def delete_command(self, zone: str, name: str) -> Sequence[str]:
        """The command line that deletes a queued resource with its nodes."""
        return self._command(["queued-resources", "delete", name], zone, *_DELETION)

    def node_state(self, zone: str, name: str) -> str | None:
        """The state of a TPU VM; None if there is none."""
        found = self._json(["tpu-vm", "describe", name], zone)
        return None if found is None else found.get("state", "")

    def ssh(self, zone: str, name: str, command: str) -> None:
        """Runs `command` on all workers of a TPU VM."""
        self._call(["tpu-vm", "ssh", name], zone, "--worker=all", f"--command={command}")

    def _nodes(self, found: dict[str, Any], zone: str) -> tuple[str, ...]:
        states = []
        for spec in found.get("tpu", {}).get("nodeSpec", ()):
            several = spec.get("multisliceParams") or spec.get("multiNodeParams")
            if several:
                nodes = [f"{several['nodeIdPrefix']}-{index}" for index in range(int(several["nodeCount"]))]
            else:
                nodes = [spec["nodeId"]]
            states.extend(state for node in nodes if (state := self.node_state(zone, node)))
        return tuple(states)

    def _json(self, words: Sequence[str], zone: str) -> Any:
        try:
            return json.loads(self._call(words, zone, "--format=json") or "null")
        except json.JSONDecodeError:
            raise Refused(Refusal.TRANSIENT, f"gcloud {' '.join(words)} did not answer in JSON") from None

    def _command(self, words: Sequence[str], zone: str, *options: str) -> Sequence[str]:
        track = ["alpha"] if any(word.startswith(_ALPHA) for word in words) else []
        where = [f"--zone={zone}", f"--project={self.project}"]
        return ["gcloud", *track, "compute", "tpus", *words, *where, *options]

    def _call(self, words: Sequence[str], zone: str, *options: str) -> str | None:
        """Runs a command line and returns what it printed; None if there is nothing to describe or delete."""
        command = self._command(words, zone, *options)
        try:
            return self._run(command)
        except Refused as refused:
            if _NOT_FOUND.search(refused.detail) and words[1] in ("describe", "delete"):
                return None
            raise

    def _run(self, command: Sequence[str]) -> str:
        done = self.run(command)
        if done.returncode == 0:
            return done.stdout
        said = " ".join(done.stderr.split())
        code = _CODE.search(said)
        otherwise = "UNAVAILABLE" if _NO_ANSWER.search(said) else "INVALID_ARGUMENT"
        raise Refused(refusal_of(code.group(1) if code else otherwise, said), said)


def create_words(request: Request, metadata: Path) -> list[str]:
    """The words of ``gcloud compute tpus`` that ask for a queued resource.

    Args:
        request: What is wanted.
        metadata: A directory of files, one a key.
    """
    words = ["queued-resources", "create", request.name]
    words += [f"--runtime-version={request.runtime}"]
    if request.topology is None:
        words += [f"--accelerator-type={request.accelerator_type}"]
    else:
        words += [f"{_TYPE}{request.accelerator_type.partition('-')[0]}", f"--topology={request.topology}"]
    if request.slices > 1:
        words += [f"--node-count={request.slices}", f"--node-prefix={request.name}"]
    else:
        words += [f"--node-id={request.name}"]
    words += [f"--valid-until-duration={request.valid_seconds}s"]
    words += ["--metadata-from-file=" + ",".join(f"{key}={metadata / key}" for key in request.metadata)]
    if request.labels:
        words += ["--labels=" + ",".join(f"{key}={value}" for key, value in request.labels.items())]
    match request.provisioning:
        case "spot":
            words += ["--spot"]
        case "reserved" if request.reservation:
            raise ValueError("reservation: gcloud takes only the project's own; use --client rest")
        case "reserved":
            words += ["--reserved"]
        case "flex-start":
            # The service itself ends these: a second guard beside ours.
            words += ["--provisioning-model=flex-start", f"--max-run-duration={request.valid_seconds}s"]
        case "on-demand":
            pass
    for option, value in (
        ("service-account", request.service_account),
        ("network", request.network),
        ("subnetwork", request.subnetwork),
    ):
        words += [f"--{option}={value}"] if value else []
    words += [] if request.external_ips else ["--internal-ips"]
    return words


def _resource(found: dict[str, Any], zone: str, nodes: tuple[str, ...]) -> Resource:
    word = found.get("state", {}).get("state", "")
    state = state_of(word, nodes)
    error = found.get("state", {}).get("failedData", {}).get("error", {})
    message = error.get("message", "")
    detail = f"{word}: {message}" if state is State.FAILED and message else word
    refusal = refusal_of("RESOURCE_EXHAUSTED" if error.get("code") == 8 else "UNKNOWN", message)
    name = found.get("name", "").rpartition("/")[2]
    return Resource(name, zone, state, detail, refusal if state is State.FAILED else None)
