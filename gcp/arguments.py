"""What a job's arguments name and need: inputs that are staged, outputs that outlive its VMs, a mesh that is there."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import PurePosixPath

from gcp.job import JobSpec
from qwq_jax.config.inference import InferenceConfig
from qwq_jax.config.load import build
from qwq_jax.config.mesh import MeshConfig


def check_addresses(job: JobSpec) -> None:
    """Raises a ValueError if `generate` is given an address where it takes a file."""
    if job.verb != "generate":
        return
    for option, field in (("--input", "files"), ("--output", "results")):
        if remote := next((name for name in values(job.arguments, option) if "://" in name), None):
            raise ValueError(
                f"arguments: generate reads and writes local files only, and {remote} is none; give {option} a file, "
                f"and list it in {field}"
            )


def check_pod_outputs(outputs: Sequence[str]) -> None:
    """Raises a ValueError if an output lies in a pod alone, which is deleted at the end."""
    if name := next((name for name in outputs if "://" not in name and not PurePosixPath(name).is_absolute()), None):
        raise ValueError(
            f"arguments: {name} would lie in a pod, which is deleted; expected gs:// or, for what is written to local "
            "files only, an absolute path in a volume that you add to the manifest"
        )


def check_inputs(job: JobSpec) -> None:
    """Raises a ValueError if an argument names a local file that is not staged."""
    found = [*values(job.arguments, "--input"), *values(job.arguments, "--task")]
    staged = {PurePosixPath(name) for name in job.files}
    for name in found:
        is_file = "://" not in name and (":" not in name or name.endswith(".jsonl"))
        if is_file and not PurePosixPath(name).is_absolute() and PurePosixPath(name) not in staged:
            raise ValueError(f"files: {name} is an argument of the job, and has to be listed")


def check_outputs(job: JobSpec, outputs: Sequence[str]) -> None:
    """Raises a ValueError if an output lies on VMs alone, which are deleted at the end."""
    for name in outputs:
        if "://" in name:
            continue
        if PurePosixPath(name).is_absolute():
            raise ValueError(f"arguments: {name} lies on VMs, which are deleted; expected gs:// or a relative path")
        covered = any(fnmatchcase(name, each) or each.startswith(f"{name.rstrip('/')}/") for each in job.results)
        if not covered:
            raise ValueError(f"results: nothing there matches the output {name}, which would be deleted with the VMs")


def outputs_of(job: JobSpec) -> Iterator[str]:
    """What the arguments say is written; an `output_dir` stands in a configuration, and is not among it."""
    yield from values(job.arguments, "--output")
    if job.verb in ("convert", "export"):
        plain = [word for word in job.arguments[:2] if not word.startswith("-")]
        yield from plain[1:]


def check_mesh(job: JobSpec, mesh: MeshConfig) -> None:
    """Raises a ValueError if the slices have other devices than the mesh arranges."""
    if job.slice.generation == "cpu":  # workers simulate as many as they are asked for
        return
    devices = job.chips * job.slice.devices_per_chip
    few = f"mesh: {mesh.size} devices are asked for, and {job.slices} x {job.topology} has {devices}"
    if mesh.size > devices or (job.hosts > 1 and mesh.size < devices):
        raise ValueError(few if mesh.size > devices else f"{few}: several hosts must use all of them")


def check_common(job: JobSpec, output_dir: str) -> None:
    """Raises a ValueError if hosts that write one directory would each have their own."""
    if job.hosts > 1 and "://" not in output_dir:
        raise ValueError(
            f"output_dir: {output_dir} is another directory on each of the {job.hosts} hosts; expected a gs:// address"
        )


def inference_mesh(job: JobSpec) -> MeshConfig:
    """The mesh of `generate` or `eval`; a ValueError names a setting that is none."""
    return build(InferenceConfig, {}, list(values(job.arguments, "--set")), source="arguments").mesh


def check_shared(job: JobSpec, mesh: MeshConfig) -> None:
    """Raises a ValueError if hosts would each write a part of one file, for which they need a directory in common."""
    local = job.slice.chips_per_host * job.slice.devices_per_chip
    if job.verb == "generate" and job.hosts > 1 and mesh.share_of_process(job.hosts, local) is not None:
        raise ValueError(
            f"arguments: with mesh.data={mesh.data} each of the {job.hosts} hosts answers a part of the file, and "
            "they need a directory in common: give mesh.data=1 and a larger mesh.tensor, or run it on GKE or on a VM "
            "with a mount"
        )


def values(arguments: tuple[str, ...], option: str) -> Iterator[str]:
    """What an option is given, as ``--option VALUE`` or ``--option=VALUE``."""
    for word, following in pairwise((*arguments, "")):
        if word == option:
            yield following
        elif word.startswith(f"{option}="):
            yield word.partition("=")[2]
