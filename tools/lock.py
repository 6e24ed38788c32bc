"""Writes what this environment holds of the project's dependencies, direct and indirect, pinned.

requirements.lock is for tests and laptops, gcp/worker.lock for what a TPU VM runs.

.venv/bin/python tools/lock.py
"""

import importlib.metadata
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# What the tests and the command line use on a machine without an accelerator.
EXTRAS = ("dev", "gcp", "rl", "serve")
# What a job on a TPU VM uses; libtpu comes with the developers' packages here, for it compiles without a TPU.
WORKER_EXTRAS = ("rl", "serve", "tpu")
WORKER_HEADER = """\
# Written by tools/lock.py. What the VMs of gcp/ install.
"""
# Needed to install the project itself without a network.
BUILD = ("setuptools",)

HEADER = """\
# Written by tools/lock.py from the environment that the tests pass in. Install with pip: where torch is concerned, only
# pip takes a CPU build from --find-links for a line without "+cpu".
"""


def main() -> None:
    """Writes both files."""
    write(ROOT / "requirements.lock", HEADER, EXTRAS)
    write(ROOT / "gcp" / "worker.lock", WORKER_HEADER, WORKER_EXTRAS)


def write(path: Path, header: str, extras: Sequence[str]) -> None:
    """Pins what the project and `extras` need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *BUILD]
    for extra in extras:
        wanted.extend(project["optional-dependencies"][extra])
    lines = pin(wanted)
    path.write_text(header + "".join(lines))
    print(f"{path.relative_to(ROOT)}: {len(lines)} packages")


def pin(wanted: Sequence[str]) -> list[str]:
    """Follows requirements through the installed metadata."""
    waiting = [Requirement(line) for line in wanted]
    # Of a platform's own package the others must not try to install any version.
    markers = {canonicalize_name(needed.name): f" ; {needed.marker}" for needed in waiting if needed.marker}
    pinned: dict[str, str] = {}
    visited: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            if (key := (canonicalize_name(requirement.name), extra)) in visited:
                continue
            visited.add(key)
            try:
                distribution = importlib.metadata.distribution(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                continue  # an indirect dependency of another platform's build
            pinned[key[0]] = distribution.version.partition("+")[0]
            for line in distribution.requires or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return [
        f"{name}=={version}{markers.get(canonicalize_name(name), '')}\n" for name, version in sorted(pinned.items())
    ]


if __name__ == "__main__":
    main()
