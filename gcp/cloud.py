"""What the launcher asks of Cloud TPU, whichever client carries it there."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from qwq_jax.config.plan import Provisioning


class State(Enum):
    """A queued resource, in as many states as there are things to do about it."""

    WAITING = "waiting"
    ACTIVE = "active"
    LOST = "lost"
    FAILED = "failed"
    DELETING = "deleting"


class Refusal(Enum):
    """Why a resource was not made, or came to nothing."""

    STOCK_OUT = "no room in the zone"
    QUOTA = "quota used up"
    NAME_TAKEN = "the name is taken"
    BAD_REQUEST = "refused"
    TRANSIENT = "not answered"


class Refused(Exception):
    """The cloud said no."""

    def __init__(self, reason: Refusal, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Resource:
    """What was seen of a queued resource.

    Attributes:
        name: Its id.
        zone: Where it is.
        state: See `State`.
        detail: The cloud's own word, and its error if there is one.
        refusal: Of a failed one, why.
    """

    name: str
    zone: str
    state: State
    detail: str = ""
    refusal: Refusal | None = None


@dataclass(frozen=True)
class Request:
    """A queued resource to be made.

    Attributes:
        name: Its id, and that of its node; of several slices, the prefix of theirs.
        zone: Where.
        accelerator_type: Such as ``v5litepod-16``.
        runtime: Image of the VMs.
        slices: Nodes.
        provisioning: How it is paid for.
        valid_seconds: It is not wanted any more after so long a wait.
        metadata: Of the VMs; the start script and what it reads.
        labels: To find it again, and for the bill.
        topology: Shape of a slice, such as ``4x4x16``, where the accelerator type stands for another one.
        reservation: Its full name, if it is not the project's own.
        service_account: Of the VMs.
        network: Of the VMs.
        subnetwork: Of the VMs.
        external_ips: Whether they have addresses outside.
    """

    name: str
    zone: str
    accelerator_type: str
    runtime: str
    slices: int
    provisioning: Provisioning
    valid_seconds: int
    metadata: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)
    topology: str | None = None
    reservation: str | None = None
    service_account: str | None = None
    network: str | None = None
    subnetwork: str | None = None
    external_ips: bool = True


class Cloud(Protocol):
    """Queued resources of one project."""

    def get(self, zone: str, name: str) -> Resource | None:
        """Looks at one; None if there is none of this name."""
        ...

    def list(self, zone: str) -> list[Resource]:
        """Looks at all of a zone."""
        ...

    def create(self, request: Request) -> None:
        """Asks for one, without waiting for it.

        Raises:
            Refused: The cloud said no, or did not answer.
        """
        ...

    def delete(self, zone: str, name: str) -> None:
        """Deletes one with its nodes, without waiting; none of this name is fine.

        Raises:
            Refused: The cloud said no, or did not answer.
        """
        ...


_STATES = {
    "CREATING": State.WAITING,
    "ACCEPTED": State.WAITING,
    "WAITING_FOR_RESOURCES": State.WAITING,
    "PROVISIONING": State.WAITING,
    "ACTIVE": State.ACTIVE,
    "SUSPENDING": State.LOST,
    "SUSPENDED": State.LOST,
    "FAILED": State.FAILED,
    "DELETING": State.DELETING,
}
# A node that will not run its job again, though the queued resource may be active a while longer.
DEAD_NODES = frozenset({"PREEMPTED", "TERMINATED", "STOPPED", "STOPPING"})


def state_of(word: str, nodes: tuple[str, ...]) -> State:
    """Brings the cloud's states of a queued resource and of its nodes together.

    An unknown word waits: a new state of the service must not delete anything.
    """
    state = _STATES.get(word, State.WAITING)
    if state is State.ACTIVE and DEAD_NODES & set(nodes):
        return State.LOST
    return state


_STOCK_OUT = re.compile(
    r"no more capacity|out of (stock|capacity|resources)|stock ?out|insufficient capacity"
    r"|not enough (resources|capacity)|does not have enough|valid[ _]until|expired",
    re.IGNORECASE,
)


def refusal_of(code: str, message: str) -> Refusal:
    """Sorts an error by its canonical code, such as ``RESOURCE_EXHAUSTED``, and its text.

    Quota and room share a code, so the text decides between them.
    """
    if code == "ALREADY_EXISTS":
        return Refusal.NAME_TAKEN
    if "quota" in message.lower():
        return Refusal.QUOTA
    if code in ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED") or _STOCK_OUT.search(message):
        return Refusal.STOCK_OUT
    if code in ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "ABORTED", "CANCELLED"):
        return Refusal.TRANSIENT
    return Refusal.BAD_REQUEST
