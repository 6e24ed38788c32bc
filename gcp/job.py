"""A job as its TOML file describes it."""

import re
from pathlib import PurePosixPath
from typing import Literal, Self

from pydantic import Field, model_validator

from gcp.topology import Topology
from qwq_jax.config.frozen import Frozen
from qwq_jax.config.plan import Provisioning

# Verbs that join the other hosts of a slice; the others run on one.
DISTRIBUTED = ("generate", "sft", "rl", "dpo", "reward-model", "eval", "convert")
Verb = Literal["generate", "sft", "rl", "dpo", "reward-model", "eval", "convert", "export", "warm-up"]

# Google allows 63 characters in the name of a resource; we append a run and an attempt.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_REGION = re.compile(r"[a-z]+-[a-z]+\d+")
# Of what addresses are made of, so that a slip is told here and not by a server.
_ZONE = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_UNDASHED_ZONE = re.compile(r"([a-z]+-[a-z]+\d+)([a-z])")
_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z]([a-z0-9-]*[a-z0-9])?")
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}")


class JobSpec(Frozen):
    """What to run, where, and when to give up.

    Attributes:
        name: Of the job; one name, one record in the bucket.
        project: Google Cloud project.
        bucket: ``gs://BUCKET`` for code, record, logs, results and compile cache.
        verb: Of ``qwq-jax``.
        arguments: What follows the verb. ``--distributed`` is added where there are several hosts.
        files: Local files that the job reads, such as its configuration or prompts, named relative to where `submit` is
            called; the job finds them under the same names.
        results: Files the job writes under such names, mirrored to the bucket and restored before a restart. Outputs
            given as ``gs://`` need no mention.
        topology: Of one slice, such as ``v5e:4x4``.
        slices: How many of them.
        zones: Tried in this order.
        provisioning: How chips are paid for.
        reservation: Full name, where the reservation is not the project's own.
        vm: Name of a TPU VM that exists and is to be used; it is never deleted.
        runtime_version: Image, where the usual one will not do.
        service_account: Of the VMs; the project's default one otherwise. In a manifest, the Kubernetes one of the pods.
        network: VPC network; ``default`` otherwise.
        subnetwork: Of that network.
        external_ips: Whether VMs have addresses outside; installing from PyPI needs those or a NAT.
        deadline_hours: From the first `submit` until everything is deleted, done or not.
        idle_minutes: A job that logs nothing for so long hangs, and everything is deleted.
        wait_minutes: How long a zone may keep us waiting while another one is left to try.
        boot_minutes: From an active resource to the first sign of its workers.
        preemptions: How many are borne.
        failures: How many are borne, of the job or of resources.
        environment: Variables of the job's process.
        apt_packages: Debian packages that the VMs need, such as ``bubblewrap`` for rewards that run programs.
    """

    name: str
    project: str = Field(min_length=1)
    bucket: str
    verb: Verb
    arguments: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    topology: str
    slices: int = Field(default=1, ge=1)
    zones: tuple[str, ...] = Field(min_length=1)
    provisioning: Provisioning = "on-demand"
    reservation: str | None = None
    vm: str | None = Field(default=None, min_length=1)
    runtime_version: str | None = None
    service_account: str | None = None
    network: str | None = None
    subnetwork: str | None = None
    external_ips: bool = True
    deadline_hours: float = Field(gt=0, le=8760)
    idle_minutes: float = Field(default=60, gt=0)
    wait_minutes: float = Field(default=120, gt=0)
    boot_minutes: float = Field(default=30, gt=0)
    preemptions: int = Field(default=100, ge=0)
    failures: int = Field(default=2, ge=0)
    environment: dict[str, str] = Field(default_factory=dict)
    apt_packages: tuple[str, ...] = ()

    @property
    def slice(self) -> Topology:
        """The topology, parsed."""
        return Topology.parse(self.topology)

    @property
    def hosts(self) -> int:
        """VMs of all slices."""
        return self.slice.hosts * self.slices

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slice.chips * self.slices

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r}: expected at most 40 lower-case letters, digits and dashes, a letter first"
            )
        if not _PROJECT.fullmatch(self.project):
            raise ValueError(
                f"project {self.project!r}: expected a project's ID, of lower-case letters, digits and dashes"
            )
        if not _BUCKET.fullmatch(self.bucket):
            raise ValueError(f"bucket {self.bucket!r}: expected gs://BUCKET, without a directory")
        for zone in self.zones:
            _check_zone(zone)
        if len(set(self.zones)) < len(self.zones):
            raise ValueError("zones: one is named twice; each is tried again and again anyway")
        if self.hosts > 1 and self.verb not in DISTRIBUTED:
            raise ValueError(f"verb {self.verb} runs on one host, and topology {self.topology} has {self.hosts}")
        for field in ("files", "results"):
            for name in getattr(self, field):
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts or not path.parts:
                    raise ValueError(f"{field}: {name!r} is not a relative path within the working directory")
        if remote := next((name for name in self.results if "://" in name), None):
            raise ValueError(f"results: {remote} is no file of the working directory; other outputs need no mention")
        if "--distributed" in self.arguments:
            raise ValueError("arguments: --distributed is added where there are several hosts; leave it out")
        if self.reservation and self.provisioning != "reserved":
            raise ValueError("reservation: only with provisioning = 'reserved'")
        if self.vm:
            self._fits_a_vm()
        return self

    def _fits_a_vm(self) -> None:
        if self.slices > 1 or len(self.zones) > 1:
            raise ValueError("vm: one existing VM has one slice and one zone")
        for field in ("reservation", "runtime_version", "service_account", "network", "subnetwork"):
            if getattr(self, field) is not None:
                raise ValueError(f"{field}: VM {self.vm} exists, and has its own")
        if not self.external_ips:
            raise ValueError(f"external_ips: VM {self.vm} exists, and has its addresses")


def _check_zone(zone: str) -> None:
    if _REGION.fullmatch(zone):
        raise ValueError(f"zones: {zone} is a region; expected one of its zones, such as {zone}-b")
    if not _ZONE.fullmatch(zone):
        raise ValueError(f"zones: {zone!r} is none; expected one such as us-east5-b")
    if undashed := _UNDASHED_ZONE.fullmatch(zone):
        raise ValueError(f"zones: {zone} is none; expected {'-'.join(undashed.groups())}")
