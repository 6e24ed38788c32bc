"""A job as a JobSet for GKE, which does there what the launcher and the agent do on TPU VMs.

Restarts follow from two rules. A container that exits with 42, or of a signal, fails its Job in the ordinary way
(`BackoffLimitExceeded`), and the JobSet starts all Jobs again. Any other failure fails the Job by its pod failure
policy (`PodFailurePolicy`), and that ends the JobSet.
"""

import hashlib
import re
from typing import Any

import yaml

from gcp import names
from gcp.job import DISTRIBUTED, JobSpec

# Kubernetes keeps a ConfigMap within 1 MiB.
_MOST_BYTES = 1_000_000
_GRACE_SECONDS = 120
_DIRECTORY = "/job"
_SERVICE_ACCOUNT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
# Of queues, which a label of the JobSet holds (labels are shorter than names), and of namespaces.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
# Said with every manifest: what the job's file may have asked for, and has no effect.
NOTE = (
    "kubectl's cluster runs it, without regard to project, zones, wait_minutes and boot_minutes; nothing there ends a "
    "job that hangs (idle_minutes), and any failure but an interruption ends the job (failures)"
)
# What a container exits with after a signal, and "interrupted, everything is saved".
RESTARTED = (42, *range(128, 256))


def jobset(
    job: JobSpec, *, image: str, files: dict[str, bytes], queue: str | None, namespace: str
) -> list[dict[str, Any]]:
    """Writes the objects to apply: a ConfigMap if the job has files, and the JobSet.

    Args:
        job: As described; see `NOTE` for what is the cluster's affair here.
        image: With ``qwq-jax`` in it.
        files: Contents of the job's files.
        queue: Kueue's LocalQueue; Kueue then decides when the JobSet starts.
        namespace: Of the objects.

    Raises:
        ValueError: The job needs what a manifest cannot give.
    """
    _check(job)
    if not _IMAGE.fullmatch(image):
        raise ValueError(
            f"image {image!r}: expected the name of a container image, such as us-docker.pkg.dev/P/R/I:TAG"
        )
    check_label("namespace", namespace)
    objects = []
    volume = None
    if files:
        config_map, volume = _files(job, files, namespace)
        objects.append(config_map)
    metadata: dict[str, Any] = {"name": job.name, "namespace": namespace, "labels": {"app": "qwq-jax"}}
    if queue is not None:
        check_label("queue", queue)
        # The label is all: by it Kueue's webhook suspends what is created. Were `suspend` written here, a second
        # `kubectl apply` of the same file would stop a job that runs.
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = queue
    if job.slices > 1:
        # One slice, one node pool: two Jobs must not share one.
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    spec = {
        "failurePolicy": {
            "maxRestarts": job.preemptions,
            "rules": [
                {"name": "failed", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                {"name": "deadline", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]},
            ],
        },
        "replicatedJobs": [{"name": "slice", "replicas": job.slices, "template": {"spec": _job(job, image, volume)}}],
    }
    objects.append({"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec})
    return objects


def check_label(what: str, name: str) -> None:
    """Checks the name of a LocalQueue or of a namespace; `what` says which.

    Raises:
        ValueError: Kubernetes would not take it.
    """
    if not _LABEL.fullmatch(name):
        raise ValueError(f"{what} {name!r}: expected at most 63 lower-case letters, digits and dashes")


def node_labels(job: JobSpec) -> dict[str, str]:
    """Labels of the nodes for a job: its pods select them, and Kueue's flavor of its chips has the same.

    Raises:
        ValueError: GKE has no such nodes, or the reservation has no name.
    """
    labels = {
        "cloud.google.com/gke-tpu-accelerator": job.slice.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": job.slice.shape_text,
    }
    match job.provisioning:
        case "spot":
            labels["cloud.google.com/gke-spot"] = "true"
        case "flex-start":
            labels["cloud.google.com/gke-flex-start"] = "true"
        case "reserved":
            if job.reservation is None:
                raise ValueError("reservation: GKE takes a reservation by its name only; give it")
            labels["cloud.google.com/reservation-name"] = job.reservation.rpartition("/")[2]
        case "on-demand":
            pass
    return labels


def _check(job: JobSpec) -> None:
    """Refuses what would be left out: it was asked for."""
    if job.vm:
        raise ValueError("vm: a manifest is for GKE, which makes its own nodes")
    if job.results:
        raise ValueError(
            "results: nothing mirrors files on GKE; leave it empty, and give the outputs as gs:// addresses or, for "
            "what is written to local files only, as absolute paths in a volume that you add to the manifest"
        )
    if job.apt_packages:
        raise ValueError("apt_packages: nothing is installed on GKE; put them into the image, and leave this empty")
    for field in ("network", "subnetwork", "runtime_version"):
        if getattr(job, field) is not None:
            raise ValueError(f"{field}: the node pools of the cluster have theirs, and a manifest cannot choose it")
    if not job.external_ips:
        raise ValueError("external_ips: the node pools of the cluster decide it, and a manifest cannot")
    if job.service_account is not None and not _SERVICE_ACCOUNT.fullmatch(job.service_account):
        raise ValueError(
            f"service_account: {job.service_account!r} is not the name of a Kubernetes service account, which pods have"
        )


def to_yaml(objects: list[dict[str, Any]]) -> str:
    """As ``kubectl apply -f -`` reads it."""
    return yaml.safe_dump_all(objects, sort_keys=False, width=120)


def _job(job: JobSpec, image: str, volume: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "parallelism": job.slice.hosts,
        "completions": job.slice.hosts,
        "completionMode": "Indexed",
        # A pod alone cannot come back: its neighbours wait for it in a collective. The JobSet starts them all.
        "backoffLimit": 0,
        # Of this Job; the JobSet's next ones have as long again.
        "activeDeadlineSeconds": round(job.deadline_hours * 3600),
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "job", "operator": "NotIn", "values": list(RESTARTED)},
                }
            ]
        },
        "template": {"spec": _pod(job, image, volume)},
    }


def _pod(job: JobSpec, image: str, volume: dict[str, Any] | None) -> dict[str, Any]:
    cache = names.compile_cache(job.bucket, f"{job.slice.generation}-{job.slice.shape_text}")
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1", **job.environment}
    distributed = ["--distributed"] if job.hosts > 1 and job.verb in DISTRIBUTED else []
    container: dict[str, Any] = {
        "name": "job",
        "image": image,
        "command": ["qwq-jax", job.verb, *job.arguments, *distributed],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "resources": {
            "requests": {"google.com/tpu": job.slice.chips_per_host},
            "limits": {"google.com/tpu": job.slice.chips_per_host},
        },
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "nodeSelector": node_labels(job),
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
    }
    if job.service_account is not None:
        pod["serviceAccountName"] = job.service_account
    if volume is not None:
        container["workingDir"] = _DIRECTORY
        container["volumeMounts"] = [{"name": "files", "mountPath": _DIRECTORY}]
        pod["volumes"] = [volume]
    return pod


def _files(job: JobSpec, files: dict[str, bytes], namespace: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A ConfigMap, and the volume that lays its keys out as files; keys cannot hold slashes."""
    if (size := sum(map(len, files.values()))) > _MOST_BYTES:
        raise ValueError(f"files: {size} bytes do not fit into a ConfigMap; give large inputs as gs:// addresses")
    try:
        texts = {name: data.decode() for name, data in files.items()}
    except UnicodeDecodeError:
        raise ValueError("files: a ConfigMap holds text; give other inputs as gs:// addresses") from None
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:8]
    name = f"{job.name}-{digest}"
    keys = {path: f"file-{index}" for index, path in enumerate(texts)}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace},
        "data": {keys[path]: text for path, text in texts.items()},
    }
    items = [{"key": key, "path": path} for path, key in keys.items()]
    return config_map, {"name": "files", "configMap": {"name": name, "items": items}}
