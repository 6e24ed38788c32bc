"""Cloud TPU by Google's client library."""

from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from google.api_core import exceptions
from google.auth import default as default_credentials
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import RefreshError, TransportError
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuRestTransport
from google.protobuf.duration_pb2 import Duration

from gcp.cloud import Refusal, Refused, Request, Resource, State, refusal_of, state_of

T = TypeVar("T")
_SECONDS = 60.0


class ClientCloud:
    """Queued resources of one project, through `tpu_v2.TpuClient`."""

    def __init__(self, project: str, client: tpu_v2.TpuClient) -> None:
        self._project = project
        self._client = client

    def get(self, zone: str, name: str) -> Resource | None:
        """Looks at a queued resource, and at its nodes when it says that it is active."""
        try:
            found = _asked(lambda: self._client.get_queued_resource(name=self._path(zone, name), timeout=_SECONDS))
        except exceptions.NotFound:
            return None
        word = found.state.state.name
        # A preempted node says so before its queued resource does.
        nodes = self._nodes(found) if word == "ACTIVE" else ()
        return _resource(found, zone, nodes)

    def list(self, zone: str) -> list[Resource]:
        """Looks at all of a zone, without their nodes."""
        parent = f"projects/{self._project}/locations/{zone}"
        found = _asked(lambda: list(self._client.list_queued_resources(parent=parent, timeout=_SECONDS)))
        return [_resource(each, zone, ()) for each in found]

    def create(self, request: Request) -> None:
        """Asks for one; the operation that comes back is not waited for."""
        parent = f"projects/{self._project}/locations/{request.zone}"
        resource = queued_resource(request, parent)
        try:
            _asked(
                lambda: self._client.create_queued_resource(
                    parent=parent, queued_resource_id=request.name, queued_resource=resource, timeout=_SECONDS
                )
            )
        except exceptions.NotFound as error:
            raise Refused(Refusal.BAD_REQUEST, error.message) from None

    def delete(self, zone: str, name: str) -> None:
        """Deletes one with its nodes: without force an active or suspended one would be refused."""
        wanted = tpu_v2.DeleteQueuedResourceRequest(name=self._path(zone, name), force=True)
        try:
            _asked(lambda: self._client.delete_queued_resource(request=wanted, timeout=_SECONDS))
        except exceptions.NotFound:
            return

    def _path(self, zone: str, name: str) -> str:
        return f"projects/{self._project}/locations/{zone}/queuedResources/{name}"

    def _nodes(self, resource: tpu_v2.QueuedResource) -> tuple[str, ...]:
        states = []
        for spec in resource.tpu.node_spec:
            count = spec.multislice_params.node_count
            prefix = spec.multislice_params.node_id_prefix
            for node in [f"{prefix}-{index}" for index in range(count)] or [spec.node_id]:
                name = f"{spec.parent}/nodes/{node}"
                try:
                    states.append(_asked(lambda n=name: self._client.get_node(name=n, timeout=_SECONDS)).state.name)
                except exceptions.NotFound:
                    continue  # an active resource whose node is not listed yet
        return tuple(states)


def connect(project: str, *, endpoint: str | None = None) -> ClientCloud:
    """Makes a client with the caller's own credentials, or without any for an `endpoint` of one's own.

    Args:
        project: Google Cloud project.
        endpoint: ``http://HOST:PORT`` in place of Google's.
    """
    if endpoint is not None:
        plain = TpuRestTransport(host=endpoint, url_scheme="http", credentials=AnonymousCredentials())
        return ClientCloud(project, tpu_v2.TpuClient(transport=plain))
    credentials, _ = default_credentials(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    return ClientCloud(project, tpu_v2.TpuClient(credentials=credentials, transport="rest"))


def queued_resource(request: Request, parent: str) -> tpu_v2.QueuedResource:
    """Writes a request in the library's own terms.

    Raises:
        ValueError: The library has no words for it.
    """
    if request.provisioning == "flex-start":
        raise ValueError("provisioning flex-start: Google's Python client has no field for it; use --client gcloud")
    node = tpu_v2.Node(
        runtime_version=request.runtime,
        metadata=request.metadata,
        labels=request.labels,
        network_config=tpu_v2.NetworkConfig(
            network=request.network or "", subnetwork=request.subnetwork or "", enable_external_ips=request.external_ips
        ),
    )
    if request.topology is None:
        node.accelerator_type = request.accelerator_type
    else:
        kinds = tpu_v2.AcceleratorConfig.Type
        prefix = request.accelerator_type.partition("-")[0]
        kind = kinds.V5LITE_POD if prefix == "v5litepod" else kinds[prefix.upper()]
        node.accelerator_config = tpu_v2.AcceleratorConfig(type_=kind, topology=request.topology)
    if request.service_account:
        scope = ["https://www.googleapis.com/auth/cloud-platform"]
        node.service_account = tpu_v2.ServiceAccount(email=request.service_account, scope=scope)
    spec = tpu_v2.QueuedResource.Tpu.NodeSpec(parent=parent, node=node)
    if request.slices > 1:
        several = tpu_v2.QueuedResource.Tpu.NodeSpec.MultisliceParams(
            node_count=request.slices, node_id_prefix=request.name
        )
        spec.multislice_params = several
    else:
        spec.node_id = request.name
    policy = tpu_v2.QueuedResource.QueueingPolicy(valid_until_duration=Duration(seconds=request.valid_seconds))
    resource = tpu_v2.QueuedResource(tpu=tpu_v2.QueuedResource.Tpu(node_spec=[spec]), queueing_policy=policy)
    if request.provisioning == "spot":
        resource.spot = tpu_v2.QueuedResource.Spot()
    if request.provisioning == "reserved":
        resource.guaranteed = tpu_v2.QueuedResource.Guaranteed()
        # parent is projects/P/locations/Z
        resource.reservation_name = request.reservation or f"{parent}/reservations/-"
    return resource


def _asked(call: Callable[[], T]) -> T:
    """Makes a call, and turns its errors, but for "there is none", into a `Refused`."""
    try:
        return call()
    except exceptions.NotFound:
        raise
    except exceptions.GoogleAPICallError as error:
        word = _word(error)
        raise Refused(refusal_of(word, error.message or str(error)), error.message or str(error)) from None
    except (exceptions.RetryError, TransportError, ConnectionError, OSError) as error:
        raise Refused(Refusal.TRANSIENT, str(error)) from None
    except RefreshError as error:
        if not error.retryable:
            raise
        raise Refused(Refusal.TRANSIENT, str(error)) from None


def _word(error: exceptions.GoogleAPICallError) -> str:
    """The canonical name of an error: gRPC says it, and HTTP says a number that several share."""
    if error.grpc_status_code is not None:
        return error.grpc_status_code.name
    return {409: "ALREADY_EXISTS", 429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE", 504: "UNAVAILABLE"}.get(
        int(error.code or 0), "INTERNAL" if int(error.code or 0) >= 500 else "INVALID_ARGUMENT"
    )


def _resource(found: tpu_v2.QueuedResource, zone: str, nodes: tuple[str, ...]) -> Resource:
    word = found.state.state.name
    state = state_of(word, nodes)
    error: Any = found.state.failed_data.error
    detail = f"{word}: {error.message}" if state is State.FAILED and error.message else word
    if state is State.LOST and word == "ACTIVE":
        detail = f"{word}, nodes {', '.join(nodes)}"
    refusal = refusal_of(_code_word(error.code), error.message) if state is State.FAILED else None
    return Resource(found.name.rpartition("/")[2], zone, state, detail, refusal)


def _code_word(code: int) -> str:
    names = {status.value[0]: status.name for status in grpc.StatusCode}
    return names.get(code, "UNKNOWN")
