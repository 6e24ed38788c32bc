"""What Kueue needs once before it lets a job of ``manifest --queue`` in: a flavor, a ClusterQueue and a LocalQueue."""

from typing import Any

from gcp import manifest
from gcp.job import JobSpec

# Kueue serves it since 0.15; its older one, v1beta1, is deprecated.
_VERSION = "kueue.x-k8s.io/v1beta2"
_TPU = "google.com/tpu"


def objects(job: JobSpec, *, queue: str, chips: int, namespace: str) -> list[dict[str, Any]]:
    """Writes the objects of a queue for jobs on such slices as `job` has, whoever submits them.

    They are apart from the JobSet: the first two belong to the cluster, and outlive all jobs.

    Args:
        job: Says the kind of slice, and how it is paid for.
        queue: Name of the LocalQueue.
        chips: That jobs of this queue may hold together.
        namespace: Whose jobs the queue is for.

    Raises:
        ValueError: GKE has no such nodes, a name is none, or the job would wait for ever.
    """
    manifest.check_label("queue", queue)
    manifest.check_label("namespace", namespace)
    if chips < job.chips:
        raise ValueError(f"chips {chips}: job {job.name} needs {job.chips}, and would wait in this queue for ever")
    # Just the labels that the pods select: Kueue adds a flavor's labels to the pods, and no other could agree better.
    labels = manifest.node_labels(job)
    flavor = "-".join(job.provisioning if value == "true" else value for value in labels.values())
    # Cluster-wide, so that queues of one name in two namespaces are two.
    cluster_queue = f"{namespace}-{queue}"
    quota = {"name": _TPU, "nominalQuota": chips}
    group = {"coveredResources": [_TPU], "flavors": [{"name": flavor, "resources": [quota]}]}
    return [
        _object("ResourceFlavor", {"name": flavor}, {"nodeLabels": labels}),
        _object(
            "ClusterQueue",
            {"name": cluster_queue},
            {
                # Without a selector it would take jobs of no namespace.
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "resourceGroups": [group],
            },
        ),
        _object("LocalQueue", {"name": queue, "namespace": namespace}, {"clusterQueue": cluster_queue}),
    ]


def _object(kind: str, metadata: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": _VERSION, "kind": kind, "metadata": metadata, "spec": spec}
