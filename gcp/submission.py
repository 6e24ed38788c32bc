"""From a job's description to its record, once, however often and from wherever it is submitted."""

import hashlib
import secrets
from collections.abc import Callable
from pathlib import Path

from gcp import record as records
from gcp import staging
from gcp.job import JobSpec
from gcp.objects import Conflict, Objects
from gcp.record import Record, Saved
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
    if (config := _CONFIGS.get(job.verb)) is not None:
        if not job.arguments or job.arguments[0].startswith("-"):
            raise ValueError(f"arguments: {job.verb} needs its TOML file as the first one")
        load_toml(working_directory / job.arguments[0], config, _overrides(job.arguments))
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


def _overrides(arguments: tuple[str, ...]) -> list[str]:
    return [value for option, value in zip(arguments, arguments[1:], strict=False) if option == "--set"]
