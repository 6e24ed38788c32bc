"""The start script for real, where the agent comes late, falls over, or never comes."""

import hashlib
import io
import os
import signal
import subprocess
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from gcp import driver, staging
from tests.gcp.fake_tpu import serving
from tests.gcp.memory import a_job, a_record

RESOURCE = "projects/p/locations/a/queuedResources/job-abc123-1"


def an_agent(program: str) -> bytes:
    """A zip in the place of the agent's."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in {"gcp/__init__": "", "gcp/worker/__init__": "", "gcp/worker/__main__": program}.items():
            archive.writestr(f"{name}.py", text)
    return buffer.getvalue()


class Vm:
    """One VM, and all services that its start script talks to.

    Attributes:
        attributes: What the metadata server says.
        answers: The bucket's, one after another, the last one for ever; None for an error.
        deleted: Paths of deletions, with the token that came along.
    """

    def __init__(self, home: Path) -> None:
        self.attributes: dict[str, str] = {}
        self.answers: list[bytes | None] = [None]
        self.deleted: list[tuple[str, str | None]] = []
        self.url = ""
        self.home = home

    def boot(self, agent: bytes, *, seconds: float, variables: dict[str, str] | None = None) -> None:
        """Starts the script with a deadline in so many seconds."""
        record = a_record(a_job(), phase="asked", attempt=1).changed(deadline=time.time() + seconds)
        told = driver.request(record, boot="", now=record.created).metadata
        self.attributes = told | {"qwq-jax-agent-sha256": hashlib.sha256(agent).hexdigest()}
        environment = {
            "QWQ_JAX_METADATA": self.url,
            "QWQ_JAX_STORAGE": self.url,
            "QWQ_JAX_TPU": self.url,
            "QWQ_JAX_HOME": str(self.home),
            "QWQ_JAX_PAUSE": "0.05",
            "QWQ_JAX_FOREGROUND": "1",
        }
        self.process = subprocess.Popen(
            ["bash", str(staging.BOOT)],
            cwd=self.home,
            env=os.environ | environment | (variables or {}),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def answer(self, method: str, path: str) -> bytes | None:
        """What a request gets; None for an error."""
        if method == "DELETE":
            return b"{}"
        if path.startswith("/computeMetadata/v1/instance/service-accounts/"):
            return b'{"access_token": "secret", "expires_in": 3600}'
        if path.startswith("/computeMetadata/"):
            found = self.attributes.get(path.rpartition("/")[2])
            return None if found is None else found.encode()
        assert path == "/storage/v1/b/bucket/o/agent.zip?alt=media"
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def vm(tmp_path) -> Iterator[Vm]:
    vm = Vm(tmp_path)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def _serve(self) -> None:
            if self.command == "DELETE":
                vm.deleted.append((self.path, self.headers["Authorization"]))
            data = vm.answer(self.command, self.path)
            self.send_response(503 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        do_GET = do_DELETE = _serve

    with serving(Handler) as vm.url:
        yield vm
        try:
            os.killpg(vm.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        vm.process.wait()


def deleted_twice(vm: Vm) -> bool:
    """Waits for it: the first deletion may come to nothing."""
    until = time.monotonic() + 20
    while time.monotonic() < until and len(vm.deleted) < 2:
        time.sleep(0.02)
    return set(vm.deleted) == {(f"/v2/{RESOURCE}?force=true", "Bearer secret")}


def test_an_agent_that_comes_late(vm):
    """After errors, and after what is not the agent; its end is the script's end."""
    agent = an_agent("import pathlib, os; pathlib.Path(os.environ['QWQ_JAX_HOME'], 'ran').touch()")
    vm.answers = [None, None, b"something else", agent]
    vm.boot(agent, seconds=600)
    assert vm.process.wait(timeout=30) == 0
    assert (vm.home / "ran").exists() and not vm.deleted and len(vm.answers) == 1


def test_an_agent_that_never_comes(vm):
    vm.boot(b"", seconds=0.5)
    assert deleted_twice(vm)


def test_an_agent_that_falls_over(vm):
    agent = an_agent("raise SystemExit(1)")
    vm.answers = [agent]
    vm.boot(agent, seconds=0.5)
    assert deleted_twice(vm)


def test_nothing_is_deleted_before_the_deadline(vm):
    vm.boot(b"", seconds=600)
    time.sleep(1.0)
    assert not vm.deleted and vm.process.poll() is None


def test_a_vm_of_its_owners_is_let_alone(vm):
    vm.boot(b"", seconds=0.0, variables={"QWQ_JAX_RESOURCE": ""})
    assert vm.process.wait(timeout=30) == 1 and not vm.deleted


def test_it_runs_on_in_a_session_of_its_own(vm):
    agent = an_agent("import pathlib, os; pathlib.Path(os.environ['QWQ_JAX_HOME'], 'ran').touch()")
    vm.answers = [None, agent]
    vm.boot(agent, seconds=600, variables={"QWQ_JAX_FOREGROUND": ""})
    assert vm.process.wait(timeout=30) == 0
    until = time.monotonic() + 20
    while time.monotonic() < until and not (vm.home / "ran").exists():
        time.sleep(0.02)
    assert (vm.home / "ran").exists()
