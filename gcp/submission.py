"""From a job's description to its record, once, however often and from wherever it is submitted."""

import hashlib
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from gcp import arguments, staging
from gcp import record as records
from gcp.job import JobSpec
from gcp.objects import Conflict, Objects
from gcp.record import Record, Saved
from qwq_jax.__main__ import check_words
from qwq_jax.config.evaluate import load_rewards
from qwq_jax.config.frozen import Frozen
from qwq_jax.config.load import load_toml
from qwq_jax.config.preference import PreferenceConfig
from qwq_jax.config.rl import RlConfig
from qwq_jax.config.train import SftConfig

_CONFIGS: dict[str, type[Frozen]] = {
    "sft": SftConfig,
    "rl": RlConfig,
    "dpo": PreferenceConfig,
    "reward-model": PreferenceConfig,
}

# What stands for a bucket in the configurations that ship.
_PLACEHOLDER = re.compile(r"gs://BUCKET(/|$)")

# Builds the wheel: its file name and bytes.
Build = Callable[[], tuple[str, bytes]]


def check(job: JobSpec, working_directory: Path, *, client: str | None = None) -> dict[str, bytes]:
    """Reads all files of a job and checks what can be checked before chips are paid for.

    Args:
        job: As described.
        working_directory: Where its files are.
        client: How Cloud TPU will be asked, ``rest`` or ``gcloud``; None for GKE.

    Raises:
        ValueError: What the job would refuse after an hour in the queue.
    """
    if client is not None:
        _check_client(job, client)
    files = staging.read_files(job.files, working_directory)
    try:
        check_words(job.verb, job.arguments)
    except ValueError as error:
        raise ValueError(f"arguments: {error}") from None
    arguments.check_addresses(job)
    # GKE and a VM that exists may have disks of their own.
    mounts = client is None or job.vm is not None
    # Workers without a TPU, which try a job out, may be on one machine.
    keeps = mounts or job.slice.generation == "cpu"
    outputs = list(arguments.outputs_of(job))
    if (config := _CONFIGS.get(job.verb)) is not None:
        if not job.arguments or job.arguments[0].startswith("-"):
            raise ValueError(f"arguments: {job.verb} needs its TOML file as the first one")
        overrides = list(arguments.values(job.arguments, "--set"))
        settings: Any = load_toml(working_directory / job.arguments[0], config, overrides)
        _check_settings(settings.model_dump(mode="json"), job, mounts=mounts)
        arguments.check_mesh(job, settings.mesh)
        outputs.append(settings.output_dir)
        if not keeps:
            arguments.check_common(job, settings.output_dir)
    elif job.verb in ("generate", "eval"):
        mesh = arguments.inference_mesh(job)
        arguments.check_mesh(job, mesh)
        if not mounts:
            arguments.check_shared(job, mesh)
    if not mounts:
        arguments.check_inputs(job)
    if client is None:
        arguments.check_pod_outputs(outputs)
    elif not keeps:
        arguments.check_outputs(job, outputs)
    for index, argument in enumerate(job.arguments):
        if job.verb == "eval" and argument == "--rewards" and index + 1 < len(job.arguments):
            load_rewards(working_directory / job.arguments[index + 1])
        if argument.endswith(".toml") and argument not in job.files:
            raise ValueError(f"files: {argument} is an argument of the job, and has to be listed")
    return files


def submit(
    objects: Objects,
    job: JobSpec,
    files: dict[str, bytes],
    *,
    build: Build,
    owner: str,
    now: float,
    again: bool = False,
) -> Record:
    """Stages the code and writes the record, or finds the record of the same job.

    Args:
        objects: The job's bucket.
        job: As described.
        files: Contents of its files.
        build: Makes the wheel.
        owner: The launcher.
        now: The time.
        again: Start a job that is over once more.

    Raises:
        ValueError: A job of this name runs with other settings.
    """
    while True:
        saved = records.load(objects, job.name)
        if saved is not None and (saved.record.phase != "over" or not again):
            _same(saved.record, job, files)
            return saved.record
        staged = staging.stage(objects, files, wheel=build())
        fresh = Record(
            job=job,
            uid=secrets.token_hex(3),
            staged=staged,
            created=now,
            deadline=now + job.deadline_hours * 3600,
            owner=owner,
        )
        try:
            return _write(objects, fresh, saved).record
        except Conflict:
            continue  # somebody else submitted it this moment: theirs is looked at


def _check_client(job: JobSpec, client: str) -> None:
    """Raises what the client would raise once everything is staged. A VM that exists is not asked for."""
    _ = job.slice.accelerator_type
    if job.vm:
        return
    if job.provisioning == "flex-start" and client == "rest":
        raise ValueError("provisioning flex-start: Google's Python client has no field for it; use --client gcloud")
    if job.reservation and client == "gcloud":
        raise ValueError("reservation: gcloud takes only the project's own; use --client rest")


def _check_settings(settings: dict[str, Any], job: JobSpec, *, mounts: bool) -> None:
    """Refuses what the job's own configuration names and no host will find."""
    source = job.arguments[0]
    for key, text in _texts(settings):
        if _PLACEHOLDER.match(text):
            raise ValueError(f'{source}: {key} is still {text}; add "--set", "{key}=..." with your bucket to arguments')
    staged = {PurePosixPath(name) for name in job.files}
    for path in map(PurePosixPath, _inputs(settings)):
        if path not in staged and not (mounts and path.is_absolute()):
            raise ValueError(f"files: {source} reads {path}, which has to be listed")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings of nested tables, with their keys as dotted paths."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{key}.{name}" if key else f"{name}")


def _inputs(settings: dict[str, Any]) -> Iterator[str]:
    """The local files that a configuration names."""
    evaluation = settings.get("evaluation") or {}
    for source in (*settings.get("tasks", ()), *evaluation.get("tasks", ())):
        if "path" in source:
            yield source["path"]
    for key in ("train_files", "eval_files"):
        yield from settings.get(key) or ()


def _write(objects: Objects, fresh: Record, saved: Saved | None) -> Saved:
    return records.save(objects, fresh, generation=saved.generation if saved else 0)


def _same(record: Record, job: JobSpec, files: dict[str, bytes]) -> None:
    """What runs is what is asked for; code that changed meanwhile is for the next run."""
    changed = [key for key in JobSpec.model_fields if getattr(record.job, key) != getattr(job, key)]
    staged = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    running = {name: Path(place).parent.name for name, place in record.staged.files.items()}
    changed += [name for name in staged if staged[name] != running.get(name)]
    if changed and record.phase != "over":
        raise ValueError(
            f"job {job.name} runs with another {', '.join(changed)}: cancel it first, or give this one another name"
        )
    if changed:
        raise ValueError(f"job {job.name} is over, and had another {', '.join(changed)}: submit it with --again")
