"""JobSets against the official schema, read as strictly as ``kubectl --validate=strict`` does."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gcp import kueue, manifest
from tests.gcp.memory import a_job

SCHEMA = Path(__file__).parent / "data" / "jobset_v1alpha2.schema.json"
QUEUES = Path(__file__).parent / "data" / "kueue_v1beta2.schema.json"


def strict(schema: Any) -> Any:
    """The API server drops keys that the schema does not know; here they are errors."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    known = schema.get("properties")
    if isinstance(known, dict) and schema.get("type") == "object" and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    return closed


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(strict(json.loads(SCHEMA.read_text())))


def the_jobset(job: Any, files: dict[str, bytes] | None = None, queue: str | None = None) -> Any:
    objects = manifest.jobset(job, image="image", files=files or {}, queue=queue, namespace="default")
    assert list(yaml.safe_load_all(manifest.to_yaml(objects))) == objects
    return objects[-1]


JOBS = {
    "one host": a_job(topology="v6e:2x4"),
    "several hosts": a_job(topology="v5p:4x4x4", provisioning="flex-start"),
    "several slices": a_job(topology="v5e:4x4", slices=4, provisioning="on-demand"),
    "reserved": a_job(topology="v4:2x2x4", provisioning="reserved", reservation="projects/p/reservations/r"),
    "GKE only": a_job(topology="tpu7x:2x2x2", environment={"A": "1"}),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
@pytest.mark.parametrize("files", [{}, {"configs/rl/x.toml": b"steps = 1\n"}], ids=["no files", "files"])
def test_the_official_schema(validator, job, files):
    validator.validate(the_jobset(job, files, queue="tpus"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda j: j["spec"]["failurePolicy"].update(maxRestart=3),
        lambda j: j["spec"]["failurePolicy"]["rules"][0].update(action="Fail"),
        lambda j: j["spec"]["replicatedJobs"][0].update(replicas="2"),
        lambda j: j["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"].update(nodeSelectors={}),
        lambda j: j["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0].pop("action"),
    ],
)
def test_the_schema_finds_damage(validator, damage):
    broken = the_jobset(a_job())
    damage(broken)
    assert not validator.is_valid(broken)


def outcome(jobset: Any, code: int) -> str:
    """What the Job controller and the JobSet controller do about an exit code, by their documented rules."""
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    matches = (code in rule["onExitCodes"]["values"]) == (rule["onExitCodes"]["operator"] == "In")
    assert spec["backoffLimit"] == 0
    reason = "PodFailurePolicy" if matches and rule["action"] == "FailJob" else "BackoffLimitExceeded"
    for policy in jobset["spec"]["failurePolicy"]["rules"]:
        if reason in policy["onJobFailureReasons"]:
            return policy["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("code", range(1, 256))
def test_which_exit_codes_are_restarted(code):
    expected = "RestartJobSet" if code == 42 or code >= 128 else "FailJobSet"
    assert outcome(the_jobset(a_job()), code) == expected


def test_what_kubernetes_bounds():
    """A rule holds at most 255 codes, and the name of a pod at most 63 characters."""
    assert len(manifest.RESTARTED) <= 255
    assert len(f"{'x' * 40}-slice-999-9999-abcde") <= 63


def test_where_it_runs():
    spec = the_jobset(JOBS["several slices"], queue="tpus")
    assert spec["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tpus"
    (replicated,) = spec["spec"]["replicatedJobs"]
    job, pod = replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (4, 4, 4)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == 4
    assert pod["containers"][0]["command"] == ["qwq-jax", "generate", "--distributed"]


@pytest.mark.parametrize(
    ("job", "files", "sentence"),
    [
        (a_job(results=("a",)), {}, "results: nothing mirrors files on GKE"),
        (a_job(vm="mine", zones=("a",)), {}, "vm: a manifest is for GKE"),
        (a_job(network="n"), {}, "network: the node pools"),
        (a_job(subnetwork="n"), {}, "subnetwork: the node pools"),
        (a_job(runtime_version="r"), {}, "runtime_version: the node pools"),
        (a_job(external_ips=False), {}, "external_ips: the node pools"),
        (a_job(apt_packages=("bubblewrap",)), {}, "apt_packages: nothing is installed on GKE"),
        (a_job(provisioning="reserved"), {}, "reservation: GKE takes a reservation by its name only"),
        (a_job(service_account="tpu@p.iam.gserviceaccount.com"), {}, "is not the name of a Kubernetes service account"),
        (a_job(topology="cpu:1"), {}, "GKE has no TPU nodes of this kind"),
        (a_job(), {"x": b"a" * 2_000_000}, "do not fit into a ConfigMap"),
        (a_job(), {"x": b"\xff"}, "a ConfigMap holds text"),
    ],
)
def test_what_a_manifest_cannot_give(job, files, sentence):
    with pytest.raises(ValueError, match=sentence):
        the_jobset(job, files)


def test_the_service_account_is_the_pods(validator):
    jobset = the_jobset(a_job(service_account="trainer"))
    validator.validate(jobset)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "trainer"


@pytest.fixture(scope="module")
def queue_validators() -> dict[str, jsonschema.Draft202012Validator]:
    schemas = json.loads(QUEUES.read_text())
    return {kind: jsonschema.Draft202012Validator(strict(schema)) for kind, schema in schemas.items()}


def the_queue(job: Any, chips: int = 512) -> Any:
    objects = kueue.objects(job, queue="tpus", chips=chips, namespace="team")
    assert list(yaml.safe_load_all(manifest.to_yaml(objects))) == objects
    return objects


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_a_queue_by_the_official_schema(queue_validators, job):
    for each in the_queue(job):
        assert each["apiVersion"] == "kueue.x-k8s.io/v1beta2"
        queue_validators[each["kind"]].validate(each)


@pytest.mark.parametrize(
    "damage",
    [
        lambda flavor, cluster, local: flavor["spec"].update(nodeLabel={}),
        lambda flavor, cluster, local: cluster["spec"].update(cohort="all"),
        lambda flavor, cluster, local: cluster["spec"]["resourceGroups"][0].pop("coveredResources"),
        lambda flavor, cluster, local: local["spec"].update(clusterQueue="A B"),
    ],
)
def test_the_schemas_of_a_queue_find_damage(queue_validators, damage):
    objects = the_queue(a_job())
    damage(*objects)
    assert not all(queue_validators[each["kind"]].is_valid(each) for each in objects)


def admitted(jobset: Any, objects: Any) -> dict[str, str]:
    """What Kueue does with a JobSet, by its documented rules; returns the labels that its pods select in the end."""
    flavor, cluster, local = objects
    metadata = jobset["metadata"]
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"], "or nothing suspends it"
    assert metadata["namespace"] == local["metadata"]["namespace"]
    assert cluster["spec"]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": metadata["namespace"]}
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    (group,) = cluster["spec"]["resourceGroups"]
    (offered,) = group["flavors"]
    assert offered["name"] == flavor["metadata"]["name"]
    (quota,) = offered["resources"]
    needed: dict[str, int] = {}
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = replicated["template"]["spec"]
        pod = job["template"]["spec"]
        for name, amount in pod["containers"][0]["resources"]["requests"].items():
            needed[name] = needed.get(name, 0) + replicated["replicas"] * job["parallelism"] * amount
    assert [*needed] == group["coveredResources"] == [quota["name"]], "a resource without a quota is never admitted"
    assert needed[quota["name"]] <= quota["nominalQuota"]
    labels = flavor["spec"]["nodeLabels"]
    for name in labels.keys() & pod["nodeSelector"].keys():
        assert labels[name] == pod["nodeSelector"][name], "no flavor fits"
    return {**pod["nodeSelector"], **labels}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_a_job_is_let_in_by_its_queue_and_stays_where_it_wanted(job):
    jobset = manifest.jobset(job, image="i", files={}, queue="tpus", namespace="team")[-1]
    alone = manifest.jobset(job, image="i", files={}, queue=None, namespace="team")[-1]
    selected = alone["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["nodeSelector"]
    assert admitted(jobset, the_queue(job, chips=job.chips)) == selected
    assert "suspend" not in jobset["spec"], "applied again, it would stop a job that runs"


def test_every_kind_of_chips_has_a_flavor_of_its_own():
    names = [the_queue(job)[0]["metadata"]["name"] for job in JOBS.values()]
    assert len({*names}) == len(names)
    assert names[:2] == ["tpu-v6e-slice-2x4-spot", "tpu-v5p-slice-4x4x4-flex-start"]


@pytest.mark.parametrize(
    ("job", "changes", "sentence"),
    [
        (a_job(topology="v5e:4x4", slices=2), {"chips": 31}, "chips 31: job job needs 32, and would wait"),
        (a_job(), {"queue": "TPUs"}, "queue 'TPUs': expected at most 63"),
        (a_job(), {"namespace": "X Y"}, "namespace 'X Y': expected at most 63"),
        (a_job(topology="cpu:1"), {}, "GKE has no TPU nodes of this kind"),
        (a_job(provisioning="reserved"), {}, "reservation: GKE takes a reservation by its name only"),
    ],
)
def test_what_is_no_queue(job, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        kueue.objects(job, **({"queue": "tpus", "chips": 64, "namespace": "team"} | changes))


def test_a_jobset_for_a_queue_without_a_name():
    with pytest.raises(ValueError, match="queue '': expected"):
        the_jobset(a_job(), queue="")


@pytest.mark.parametrize("words", [{"image": ""}, {"image": "an image"}, {"namespace": "X Y"}, {"namespace": ""}])
def test_words_that_kubernetes_would_not_take(words):
    (name,) = words
    with pytest.raises(ValueError, match=f"{name} {words[name]!r}: expected"):
        manifest.jobset(a_job(), **({"image": "image", "namespace": "default"} | words), files={}, queue=None)
