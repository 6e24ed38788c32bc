"""The command line of xpk: it says all of a job, or the job is refused, or a note says what becomes of it."""

import argparse
import shlex
from typing import Any

import pytest

from gcp import manifest, xpk
from gcp.job import DISTRIBUTED, JobSpec
from tests.gcp.memory import a_job

# What a job may ask for, one setting at a time, each time something else than `alone()` does.
CHANGES: dict[str, dict[str, Any]] = {
    "name": {"name": "other"},
    "project": {"project": "other"},
    "bucket": {"bucket": "gs://other"},
    "verb": {"verb": "eval"},
    "arguments": {"arguments": ("a b",)},
    "files": {"files": ("x",)},
    "results": {"results": ("x",)},
    "topology": {"topology": "v5e:4x4"},
    "slices": {"slices": 2},
    "zones": {"zones": ("b",)},
    "provisioning": {"provisioning": "on-demand"},
    "reservation": {"provisioning": "reserved", "reservation": "r"},
    "vm": {"vm": "mine"},
    "runtime_version": {"runtime_version": "r"},
    "service_account": {"service_account": "trainer"},
    "network": {"network": "n"},
    "subnetwork": {"subnetwork": "n"},
    "external_ips": {"external_ips": False},
    "deadline_hours": {"deadline_hours": 3.0},
    "idle_minutes": {"idle_minutes": 10.0},
    "wait_minutes": {"wait_minutes": 10.0},
    "boot_minutes": {"boot_minutes": 10.0},
    "preemptions": {"preemptions": 3},
    "failures": {"failures": 5},
    "environment": {"environment": {"A": "1"}},
    "apt_packages": {"apt_packages": ("bubblewrap",)},
}


def alone(**changes: object) -> JobSpec:
    return a_job(**({"zones": ("a",)} | changes))


def words(job: JobSpec) -> list[str]:
    return shlex.split(xpk.command_line(job, image="i", cluster="c"))


def parsed(job: JobSpec) -> argparse.Namespace:
    """By the options that `xpk workload create` has; an unknown one ends the test."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("workload", "cluster", "project", "zone", "tpu-type", "docker-image", "command", "reservation"):
        parser.add_argument(f"--{name}")
    for name in ("num-slices", "max-restarts", "termination-grace-period-seconds"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("spot", "flex", "on-demand"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--env", action="append")
    told = words(job)
    assert told[:3] == ["xpk", "workload", "create"]
    return parser.parse_args(told[3:])


def in_a_manifest(job: JobSpec) -> Any:
    files = {name: b"" for name in job.files}
    return manifest.jobset(job, image="i", files=files, queue=None, namespace="n")


@pytest.mark.parametrize("field", JobSpec.model_fields)
@pytest.mark.parametrize(
    ("write", "note"), [(words, xpk.NOTE), (in_a_manifest, manifest.NOTE)], ids=["xpk", "manifest"]
)
def test_nothing_of_a_job_is_dropped_without_a_word(field, write, note):
    try:
        said = write(alone(**CHANGES[field])) != write(alone())
    except ValueError as refused:
        assert str(refused).startswith(f"{field}: ")
        return
    assert said or field in note


@pytest.mark.parametrize("field", ["idle_minutes", "wait_minutes", "boot_minutes", "failures"])
def test_limits_are_refused_and_their_defaults_noted(field):
    with pytest.raises(ValueError, match=rf"^{field}: xpk .*; --set {field}=\d+ leaves it to xpk$") as refused:
        words(alone(**CHANGES[field]))
    words(alone(**{field: int(str(refused.value).partition("=")[2].split()[0])}))
    assert field in xpk.NOTE and "deadline_hours" in xpk.NOTE and "provisioning" in xpk.NOTE
    assert words(alone(failures=0)) == words(alone()), "what xpk does by itself"


def test_all_that_xpk_has_words_for():
    job = alone(topology="v5e:4x4", slices=4, preemptions=7, environment={"A": "1 2"}, deadline_hours=2.0)
    told = parsed(job)
    assert (told.workload, told.cluster, told.project, told.zone) == ("job", "c", "p", "a")
    assert (told.tpu_type, told.num_slices, told.docker_image) == ("v5litepod-16", 4, "i")
    assert (told.max_restarts, told.termination_grace_period_seconds) == (7, 120)
    assert "A=1 2" in told.env and any(each.startswith("JAX_COMPILATION_CACHE_DIR=gs://bucket/") for each in told.env)
    assert shlex.split(told.command) == ["timeout", "--kill-after=120", "7200", "qwq-jax", "generate", "--distributed"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"provisioning": "on-demand"}, (True, False, False, None)),
        ({"provisioning": "spot"}, (False, True, False, None)),
        ({"provisioning": "flex-start"}, (False, False, True, None)),
        (
            {"provisioning": "reserved", "reservation": "projects/q/locations/a/reservations/r"},
            (False, False, False, "projects/q/reservations/r"),
        ),
    ],
)
def test_every_way_to_pay(changes, expected):
    told = parsed(alone(**changes))
    assert (told.on_demand, told.spot, told.flex, told.reservation) == expected


@pytest.mark.parametrize("verb", DISTRIBUTED)
@pytest.mark.parametrize(("topology", "several"), [("v6e:1x1", False), ("v6e:2x2", False), ("v6e:2x4", True)])
def test_hosts_of_xpk_have_four_chips(verb, topology, several):
    told = shlex.split(parsed(alone(verb=verb, topology=topology, arguments=("a",))).command)
    assert told[3:] == ["qwq-jax", verb, "a", *(["--distributed"] if several else [])]


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        (alone(zones=("a", "b")), "zones: xpk works in the one zone of its cluster; --set 'zones="),
        (alone(provisioning="reserved"), "reservation: xpk takes a reservation by its name only"),
        (alone(environment={"A": "1\n2"}), "environment: A has several lines"),
        (alone(verb="export", topology="v6e:2x4"), "verb export runs on one host, and topology v6e:2x4 has 2 with xpk"),
        (alone(topology="tpu7x:2x2x1"), "offered through GKE only"),
    ],
)
def test_what_xpk_has_no_words_for(job, sentence):
    with pytest.raises(ValueError, match=sentence):
        words(job)
