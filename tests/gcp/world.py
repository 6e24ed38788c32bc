"""Cloud TPU as a model: queued resources that come, are taken away and go, by a clock that tests own."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gcp.cloud import Refused, Request, Resource, State, refusal_of, state_of

Key = tuple[str, str]


class Refusing(Exception):
    """An error of the API."""

    def __init__(self, status: int, word: str, message: str) -> None:
        super().__init__(message)
        self.status, self.word, self.message = status, word, message


@dataclass
class Queued:
    """A queued resource: its body as it was asked for, and what became of it."""

    name: str
    zone: str
    body: dict[str, Any]
    created: float
    state: str = "ACCEPTED"
    error: dict[str, Any] | None = None
    active_from: float | None = None
    active_until: float | None = None
    boots: int = 0
    node_states: dict[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        (spec,) = self.body["tpu"]["nodeSpec"]
        several = spec.get("multisliceParams") or spec.get("multiNodeParams")
        if several:
            return [f"{several['nodeIdPrefix']}-{index}" for index in range(several["nodeCount"])]
        return [spec["nodeId"]]

    @property
    def node(self) -> dict[str, Any]:
        return self.body["tpu"]["nodeSpec"][0]["node"]


@dataclass
class World:
    """All zones.

    Attributes:
        clock: The time.
        provision: Seconds from a request to an active resource.
        deletion: Seconds that a deletion takes.
        lifetimes: Of the first, second, ... active resource, until it is preempted; None for ever.
        dry: Zones without room: resources fail. Stays so.
        over_quota: Zones where requests are refused.
        stuck: Zones that keep everybody waiting.
        vm: Called for each active resource whenever time is looked at: the workers.
    """

    clock: Callable[[], float]
    provision: float = 60.0
    deletion: float = 20.0
    lifetimes: list[float | None] = field(default_factory=list)
    dry: set[str] = field(default_factory=set)
    over_quota: set[str] = field(default_factory=set)
    stuck: set[str] = field(default_factory=set)
    vm: Callable[[Queued, float], None] = lambda queued, now: None
    resources: dict[Key, Queued] = field(default_factory=dict)
    history: list[Queued] = field(default_factory=list)
    _deleting: dict[Key, float] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def advance(self) -> None:
        """Lets happen what is due."""
        now = self.clock()
        with self.lock:
            for key, queued in list(self.resources.items()):
                if key in self._deleting:
                    if now >= self._deleting[key]:
                        del self.resources[key], self._deleting[key]
                    continue
                self._provision(queued, now)
                if queued.state == "ACTIVE":
                    lifetime = self._lifetime(queued)
                    if lifetime is not None and now >= (queued.active_from or 0) + lifetime:
                        self.preempt(queued, now)
                    else:
                        self.vm(queued, now)

    def _provision(self, queued: Queued, now: float) -> None:
        if queued.state not in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"):
            return
        valid = queued.body.get("queueingPolicy", {}).get("validUntilDuration")
        if queued.zone in self.dry:
            self._fail(queued, 8, "There is no more capacity in the zone; try another one or later.")
        elif valid and now >= queued.created + float(valid.rstrip("s")):
            self._fail(queued, 4, "The valid until time of the request has passed.")
        elif queued.zone in self.stuck:
            queued.state = "WAITING_FOR_RESOURCES"
        elif now >= queued.created + self.provision:
            queued.state, queued.active_from = "ACTIVE", now
            queued.node_states = dict.fromkeys(queued.nodes, "READY")

    def _fail(self, queued: Queued, code: int, message: str) -> None:
        queued.state, queued.error = "FAILED", {"code": code, "message": message}

    def _lifetime(self, queued: Queued) -> float | None:
        active = [each for each in self.history if each.active_from is not None]
        index = active.index(queued)
        return self.lifetimes[index] if index < len(self.lifetimes) else None

    def preempt(self, queued: Queued, now: float) -> None:
        """Takes the VMs; the queued resource keeps its name and its place in the quota."""
        queued.state, queued.active_until = "SUSPENDED", now
        queued.node_states = dict.fromkeys(queued.nodes, "PREEMPTED")

    def held(self) -> list[tuple[str, float, float | None]]:
        """Names, and when chips were held; None for an end that has not come."""
        return [(q.name, q.active_from, q.active_until) for q in self.history if q.active_from is not None]

    def create(self, zone: str, name: str, body: dict[str, Any]) -> Queued:
        self.advance()
        with self.lock:
            if (zone, name) in self.resources:
                raise Refusing(409, "ALREADY_EXISTS", f"Resource '{name}' already exists")
            if zone in self.over_quota:
                raise Refusing(429, "RESOURCE_EXHAUSTED", "Quota limit 'TPUV5sLitepodPerProjectPerZone' exceeded")
            queued = Queued(name, zone, body, self.clock())
            self.resources[zone, name] = queued
            self.history.append(queued)
            return queued

    def get(self, zone: str, name: str) -> Queued | None:
        self.advance()
        return self.resources.get((zone, name))

    def list(self, zone: str) -> list[Queued]:
        self.advance()
        return [queued for (where, _), queued in self.resources.items() if where == zone]

    def delete(self, zone: str, name: str, *, force: bool) -> bool:
        self.advance()
        return self.drop(zone, name, force=force)

    def drop(self, zone: str, name: str, *, force: bool = True) -> bool:
        """Deletes, while time stands still."""
        with self.lock:
            queued = self.resources.get((zone, name))
            if queued is None:
                return False
            if not force and queued.state in ("ACTIVE", "SUSPENDED"):
                raise Refusing(400, "FAILED_PRECONDITION", "The queued resource has nodes; use force")
            if (zone, name) not in self._deleting:
                self._deleting[zone, name] = self.clock() + self.deletion
                if queued.state == "ACTIVE":
                    queued.active_until = self.clock()
                queued.state = "DELETING"
                queued.node_states = dict.fromkeys(queued.node_states, "DELETING")
            return True


@dataclass
class WorldCloud:
    """A `Cloud` without a wire, for tests by the thousand."""

    world: World

    def get(self, zone: str, name: str) -> Resource | None:
        queued = self.world.get(zone, name)
        return None if queued is None else _resource(queued)

    def list(self, zone: str) -> list[Resource]:
        return [_resource(queued) for queued in self.world.list(zone)]

    def create(self, request: Request) -> None:
        node = {"metadata": request.metadata, "labels": request.labels}
        body = {
            "tpu": {"nodeSpec": [{"nodeId": request.name, "node": node}]},
            "queueingPolicy": {"validUntilDuration": f"{request.valid_seconds}s"},
        }
        try:
            self.world.create(request.zone, request.name, body)
        except Refusing as error:
            raise Refused(refusal_of(error.word, error.message), error.message) from None

    def delete(self, zone: str, name: str) -> None:
        self.world.delete(zone, name, force=True)


def _resource(queued: Queued) -> Resource:
    state = state_of(queued.state, tuple(queued.node_states.values()))
    codes = {8: "RESOURCE_EXHAUSTED", 4: "DEADLINE_EXCEEDED"}
    error = queued.error or {}
    refusal = refusal_of(codes.get(error.get("code", 0), "UNKNOWN"), error.get("message", ""))
    return Resource(queued.name, queued.zone, state, queued.state, refusal if state is State.FAILED else None)
