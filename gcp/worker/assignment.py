"""What a VM is told to do, as the launcher writes it into its metadata."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Assignment:
    """One attempt at a job.

    Attributes:
        project: Google Cloud project.
        zone: Of the VM.
        resource: The queued resource to delete at the end; empty for a VM that is its owner's.
        bucket: Name, without ``gs://``.
        record: Object of the job's record, which says what attempt is wanted.
        run: Prefix of everything of this run.
        uid: Of the run.
        attempt: Of this resource.
        deadline: Seconds since 1970; then everything ends.
        idle_seconds: A job that logs nothing for so long is ended.
        failures: How many are borne, with those in the record.
        preemptions: How many interruptions are borne.
        command: ``qwq-jax``'s words.
        distributed: Whether the hosts join.
        agent: Object of the agent's zip, for a VM without metadata of ours.
        wheel: Object.
        lock: Object.
        files: Objects by their names in the working directory.
        results: Patterns of files to mirror.
        environment: Variables of the job.
        apt_packages: Debian packages to install first.
        compile_cache: ``gs://`` directory of compiled programs.
        cpu: The workers have no TPU.
    """

    project: str
    zone: str
    resource: str
    bucket: str
    record: str
    run: str
    uid: str
    attempt: int
    deadline: float
    idle_seconds: float
    failures: int
    preemptions: int
    command: list[str]
    distributed: bool
    agent: str
    wheel: str
    lock: str
    files: dict[str, str]
    results: list[str]
    environment: dict[str, str]
    apt_packages: "list[str]"
    compile_cache: str
    cpu: bool

    def to_json(self) -> str:
        """As it goes into the metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Assignment":
        """Reads it back."""
        return cls(**json.loads(text))

    @property
    def outcome(self) -> str:
        """Object that says how the run ended."""
        return f"{self.run}/outcome.json"

    @property
    def place(self) -> str:
        """Prefix of what the workers of this attempt report."""
        return f"{self.run}/attempts/{self.attempt:04d}"
