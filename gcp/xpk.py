"""The job as a command line of xpk, for those who have it. xpk restarts after 42 and after signals by itself."""

import math
import re
import shlex

from gcp import names
from gcp.job import DISTRIBUTED, JobSpec

# What no word of xpk says, and why. Refused where a job asks for it: as other than its default.
_UNSAID = {
    "files": "xpk carries none; put them into the image",
    "results": "xpk carries none; give the outputs as gs:// addresses",
    "vm": "xpk is for GKE, which makes its own nodes",
    "runtime_version": "the node pools of xpk's cluster have theirs",
    "service_account": "xpk chooses the account of its pods",
    "network": "the node pools of xpk's cluster have theirs",
    "subnetwork": "the node pools of xpk's cluster have theirs",
    "external_ips": "the node pools of xpk's cluster decide it",
    "apt_packages": "xpk installs nothing; put them into the image",
}
# Likewise, with defaults that do something elsewhere: `NOTE` says what becomes of those.
_LIMITS = {
    "idle_minutes": "xpk ends no job that hangs",
    "boot_minutes": "xpk does not bound how long nodes take to boot",
    "wait_minutes": "xpk has one zone, and waits in its queue",
    "failures": "xpk restarts after no failure but an interruption",
}
# Said with every command line.
NOTE = (
    "xpk ends no job that hangs (idle_minutes), bounds no wait (wait_minutes, boot_minutes), restarts after no failure "
    "but an interruption (failures), and gives every start its deadline_hours anew; node pools that exist decide how "
    "chips are paid for, and provisioning only those that xpk's cluster makes"
)
# Seconds to save in, as elsewhere.
_GRACE_SECONDS = 120
# Chips of a host, also where a single host could have eight.
_HOST_CHIPS = 4


def command_line(job: JobSpec, *, image: str, cluster: str) -> str:
    """Writes it out.

    Raises:
        ValueError: The job asks for what xpk has no words for.
    """
    _check(job)
    hosts = job.slices * math.ceil(job.slice.chips / _HOST_CHIPS)
    if hosts > 1 and job.verb not in DISTRIBUTED:
        raise ValueError(f"verb {job.verb} runs on one host, and topology {job.topology} has {hosts} with xpk")
    distributed = ["--distributed"] if hosts > 1 else []
    environment = {
        "JAX_COMPILATION_CACHE_DIR": names.compile_cache(job.bucket, job.slice.accelerator_type),
        "PYTHONUNBUFFERED": "1",
        **job.environment,
    }
    words = ["xpk", "workload", "create", "--cluster", cluster, "--project", job.project, "--zone", job.zones[0]]
    words += ["--workload", job.name, "--tpu-type", _tpu_type(job), "--num-slices", str(job.slices)]
    words += ["--docker-image", image, "--max-restarts", str(job.preemptions), *_payment(job)]
    words += ["--termination-grace-period-seconds", f"{_GRACE_SECONDS}"]
    for name, value in environment.items():
        words += ["--env", f"{name}={value}"]
    # xpk has no deadline. This one asks first, so that the job saves, and exits with 124, which is not restarted; a job
    # that has to be killed then exits with 137, which is, within --max-restarts.
    bounded = ["timeout", f"--kill-after={_GRACE_SECONDS}", f"{job.deadline_hours * 3600:.0f}"]
    words += ["--command", shlex.join([*bounded, "qwq-jax", job.verb, *job.arguments, *distributed])]
    return shlex.join(words)


def _check(job: JobSpec) -> None:
    """Refuses what would be left out: it was asked for."""
    for field, reason in (_UNSAID | _LIMITS).items():
        default = JobSpec.model_fields[field].default
        # No failure borne is what xpk does.
        if getattr(job, field) not in (default, *([0] if field == "failures" else [])):
            leave = f"; --set {field}={default:g} leaves it to xpk" if field in _LIMITS else ""
            raise ValueError(f"{field}: {reason}{leave}")
    if len(job.zones) > 1:
        one = f"--set 'zones=[\"{job.zones[0]}\"]'"
        raise ValueError(f"zones: xpk works in the one zone of its cluster; {one} names one")
    for name, value in job.environment.items():
        if "\n" in value:
            raise ValueError(f"environment: {name} has several lines, of which xpk takes the first")


def _tpu_type(job: JobSpec) -> str:
    if job.slice.is_usual:
        return job.slice.accelerator_type
    return f"{job.slice.accelerator_type.partition('-')[0]}-{job.slice.shape_text}"


def _payment(job: JobSpec) -> list[str]:
    match job.provisioning:
        case "spot":
            return ["--spot"]
        case "flex-start":
            return ["--flex"]
        case "on-demand":
            return ["--on-demand"]
        case "reserved":
            if job.reservation is None:
                raise ValueError("reservation: xpk takes a reservation by its name only; give it")
            # Cloud TPU's full name has a place in it, which xpk's has not.
            return ["--reservation", re.sub(r"/locations/[^/]+", "", job.reservation)]
