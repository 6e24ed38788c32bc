"""Where things lie in the bucket, and what resources are called."""

from dataclasses import dataclass

ROOT = "qwq_jax"


@dataclass(frozen=True)
class Places:
    """Object names of one run of a job, relative to its bucket.

    ``record.json`` is the job's; all else belongs to one run, so that a name can be used again.
    """

    job: str
    uid: str

    @property
    def run(self) -> str:
        """Everything of this run."""
        return f"{ROOT}/jobs/{self.job}/{self.uid}"

    @property
    def outcome(self) -> str:
        """Written once, by whoever ends the run first."""
        return f"{self.run}/outcome.json"

    def attempt(self, number: int) -> str:
        """What the workers of one attempt report."""
        return f"{self.run}/attempts/{number:04d}"

    def status(self, number: int) -> str:
        """The first worker's signs of life."""
        return f"{self.attempt(number)}/status-0000.json"

    def vm_started(self, number: int) -> str:
        """Says that the agents of an attempt were started on a VM that exists."""
        return f"{self.attempt(number)}/vm-started"

    def vm_left(self, number: int) -> str:
        """Says that they are to be taken for gone."""
        return f"{self.attempt(number)}/vm-left"

    @property
    def logs(self) -> str:
        """Segments of the workers' logs, by attempt and worker."""
        return f"{self.run}/logs"

    @property
    def results(self) -> str:
        """Mirrored result files."""
        return f"{self.run}/results"

    def resource(self, attempt: int) -> str:
        """The queued resource of an attempt. Each has a new name: a dead resource keeps its own until it is gone."""
        return f"{self.job}-{self.uid}-{attempt}"


def record(job: str) -> str:
    """The record of a job."""
    return f"{ROOT}/jobs/{job}/record.json"


def content(digest: str, name: str) -> str:
    """A staged file. What it is decides where it lies, so that nothing is uploaded twice or changed under a job."""
    return f"{ROOT}/content/{digest}/{name}"


def compile_cache(bucket: str, accelerator: str) -> str:
    """Compiled programs, shared by all jobs on one kind of slice."""
    return f"{bucket}/{ROOT}/compile-cache/{accelerator}"
