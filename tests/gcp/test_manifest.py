"""JobSets against the official schema, read as strictly as ``kubectl --validate=strict`` does."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gcp import manifest, xpk
from tests.gcp.memory import a_job

SCHEMA = Path(__file__).parent / "data" / "jobset_v1alpha2.schema.json"


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


def test_xpk():
    line = xpk.command_line(JOBS["several slices"], image="i", cluster="c")
    assert "--tpu-type v5litepod-16 --num-slices 4" in line and "'qwq-jax generate --distributed'" in line
    with pytest.raises(ValueError, match="xpk carries none"):
        xpk.command_line(a_job(files=("x",)), image="i", cluster="c")
