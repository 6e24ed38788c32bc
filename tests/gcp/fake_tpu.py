"""A server that Google's Python client and gcloud take for Cloud TPU. It speaks REST, and records every request."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.gcp.world import Queued, Refusing, World

_TYPE = "type.googleapis.com/google.cloud.tpu.{}.{}"


@dataclass
class Call:
    """A request as it came."""

    method: str
    path: str
    query: dict[str, str]
    body: dict[str, Any]


@dataclass
class Server:
    """A running server.

    Attributes:
        world: What it tells of.
        url: Where it listens.
        calls: All requests so far.
        before: Called before a request is served; whatever it raises as `Refusing` is the answer.
        after: Called when it has been served, before the answer goes out.
        metadata: Answers the metadata servers of VMs: from VM name and path to text.
        vms: TPU VMs beside queued resources, by zone and name, with their state.
        patched: The node that was changed last.
    """

    world: World
    url: str = ""
    calls: list[Call] = field(default_factory=list)
    before: Callable[[Call], None] = lambda call: None
    after: Callable[[Call], None] = lambda call: None
    metadata: Callable[[str, str], str | None] = lambda vm, path: None
    vms: dict[tuple[str, str], str] = field(default_factory=dict)
    patched: dict[str, Any] = field(default_factory=dict)

    def answer(self, call: Call) -> Any:
        """Serves a request of the TPU API or of the parts of Compute that gcloud needs."""
        parts = [part for part in call.path.split("/") if part]
        if parts[:2] == ["compute", "v1"]:
            return _compute(parts[2:])
        version, *rest = parts
        if rest[0] != "projects" or rest[2] != "locations":
            raise Refusing(404, "NOT_FOUND", f"no such path {call.path}")
        project, zone, kind, *tail = rest[1], rest[3], *rest[4:]
        parent = f"projects/{project}/locations/{zone}"
        match call.method, kind, tail:
            case "POST", "queuedResources", []:
                queued = self.world.create(zone, call.query["queuedResourceId"], call.body)
                return _operation(parent, version, _queued(queued, parent))
            case "GET", "queuedResources", []:
                return {"queuedResources": [_queued(each, parent) for each in self.world.list(zone)]}
            case "GET", "queuedResources", [name]:
                if (found := self.world.get(zone, name)) is None:
                    raise Refusing(404, "NOT_FOUND", f"Resource '{parent}/queuedResources/{name}' was not found")
                return _queued(found, parent)
            case "DELETE", "queuedResources", [name]:
                if not self.world.delete(zone, name, force=call.query.get("force", "").lower() == "true"):
                    raise Refusing(404, "NOT_FOUND", f"Resource '{parent}/queuedResources/{name}' was not found")
                return {"name": f"{parent}/operations/deletion", "done": False}
            case "GET", "operations", [name]:
                return {"name": f"{parent}/operations/{name}", "done": True, "response": self.patched}
            case "GET", "nodes", [name]:
                return self._node(parent, zone, name)
            case "PATCH", "nodes", [name]:
                operation = _operation(parent, version, self._node(parent, zone, name), kind="Node")
                self.patched = operation["response"]
                return operation
            case "POST", "nodes", [name] if name.endswith(":getGuestAttributes"):
                return {"guestAttributes": []}
        raise Refusing(404, "NOT_FOUND", f"no such path {call.path}")

    def _node(self, parent: str, zone: str, name: str) -> dict[str, Any]:
        self.world.advance()
        states = {node: state for q in self.world.list(zone) for node, state in q.node_states.items()}
        states |= {vm: state for (where, vm), state in self.vms.items() if where == zone}
        if name not in states:
            raise Refusing(404, "NOT_FOUND", f"Resource '{parent}/nodes/{name}' was not found")
        endpoint = {"ipAddress": "127.0.0.1", "port": 8470, "accessConfig": {"externalIp": "127.0.0.1"}}
        return {
            "name": f"{parent}/nodes/{name}",
            "state": states[name],
            "health": "HEALTHY",
            "networkEndpoints": [endpoint],
            "acceleratorType": "v5litepod-4",
        }


def _queued(queued: Queued, parent: str) -> dict[str, Any]:
    state: dict[str, Any] = {"state": queued.state}
    if queued.error:
        state["failedData"] = {"error": queued.error}
    body = {key: queued.body[key] for key in ("tpu", "spot", "guaranteed", "queueingPolicy") if key in queued.body}
    return {"name": f"{parent}/queuedResources/{queued.name}", "state": state, **body}


def _operation(parent: str, version: str, response: dict[str, Any], kind: str = "QueuedResource") -> dict[str, Any]:
    typed = {"@type": _TYPE.format(version, kind), **response}
    return {"name": f"{parent}/operations/operation-1", "done": True, "response": typed}


def _compute(parts: list[str]) -> dict[str, Any]:
    return {
        "name": parts[-1],
        "kind": "compute#project",
        "commonInstanceMetadata": {"items": [], "fingerprint": "AA=="},
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Server

    def log_message(self, *args: object) -> None:
        pass

    def _serve(self) -> None:
        address = urlsplit(self.path)
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if address.path.startswith("/vm/"):
            self._serve_metadata(address.path)
            return
        query = {key: values[-1] for key, values in parse_qs(address.query).items()}
        call = Call(self.command, address.path.replace("//", "/"), query, json.loads(text) if text else {})
        self.fake.calls.append(call)
        try:
            self.fake.before(call)
            status, answer = 200, self.fake.answer(call)
            self.fake.after(call)
        except Refusing as error:
            status = error.status
            answer = {"error": {"code": error.status, "status": error.word, "message": error.message}}
        self._send(status, json.dumps(answer).encode(), "application/json")

    def _serve_metadata(self, path: str) -> None:
        _, _, vm, key = path.split("/", 3)
        found = self.fake.metadata(vm, key.removeprefix("computeMetadata/v1/"))
        self._send(404 if found is None else 200, (found or "").encode(), "text/plain")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:
            pass  # the one who asked was killed

    do_GET = do_POST = do_DELETE = do_PATCH = _serve


@contextmanager
def serve(world: World) -> Iterator[Server]:
    """Serves a world on a free port."""
    fake = Server(world)
    with serving(type("Handler", (_Handler,), {"fake": fake})) as fake.url:
        yield fake


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answers on a free port, whose address it gives, until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
