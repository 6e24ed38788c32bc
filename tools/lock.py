"""Writes requirements.lock: what this environment holds of the project's dependencies, direct and indirect, pinned.

.venv/bin/python tools/lock.py
"""

import importlib.metadata
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# What the tests and the command line use on a machine without an accelerator.
EXTRAS = ("dev", "rl")
# Needed to install the project itself without a network.
BUILD = ("setuptools",)

HEADER = """\
# Written by tools/lock.py from the environment that the tests pass in. Install with pip: where torch is concerned, only
# pip takes a CPU build from --find-links for a line without "+cpu".
"""


def main() -> None:
    """Follows the requirements of pyproject.toml through the installed metadata."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *BUILD]
    for extra in EXTRAS:
        wanted.extend(project["optional-dependencies"][extra])
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
    lines = [
        f"{name}=={version}{markers.get(canonicalize_name(name), '')}\n" for name, version in sorted(pinned.items())
    ]
    (ROOT / "requirements.lock").write_text(HEADER + "".join(lines))
    print(f"requirements.lock: {len(lines)} packages")


if __name__ == "__main__":
    main()
