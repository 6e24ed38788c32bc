"""The job as a command line of xpk, for those who have it. xpk restarts after 42 and after signals by itself."""

import shlex

from gcp import names
from gcp.job import DISTRIBUTED, JobSpec


def command_line(job: JobSpec, *, image: str, cluster: str) -> str:
    """Writes it out.

    Raises:
        ValueError: The job has files, which only the image could hold.
    """
    if job.files or job.results:
        raise ValueError("files, results: xpk carries none; put inputs into the image and outputs to gs:// addresses")
    distributed = ["--distributed"] if job.hosts > 1 and job.verb in DISTRIBUTED else []
    environment = {
        "JAX_COMPILATION_CACHE_DIR": names.compile_cache(job.bucket, job.slice.accelerator_type),
        **job.environment,
    }
    words = ["xpk", "workload", "create", "--cluster", cluster, "--project", job.project, "--zone", job.zones[0]]
    words += ["--workload", job.name, "--tpu-type", job.slice.accelerator_type, "--num-slices", str(job.slices)]
    words += ["--docker-image", image, "--max-restarts", str(job.preemptions)]
    for name, value in environment.items():
        words += ["--env", f"{name}={value}"]
    words += ["--command", shlex.join(["qwq-jax", job.verb, *job.arguments, *distributed])]
    return shlex.join(words)
