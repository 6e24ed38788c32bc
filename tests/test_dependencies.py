"""What pyproject.toml asks for is imported, and what requirements.lock pins is asked for."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line}

# The module of a package, where it is named otherwise.
MODULES = {"google-auth": "google", "orbax-checkpoint": "orbax"}
# Packages for accelerators, which bring no module of their own, for developers, who also run programs, and for parts
# that are on the way.
OTHER_EXTRAS = {"tpu", "cuda", "dev", "gcp", "rl"}


def name(requirement: str) -> str:
    return re.split(r"[\[<>=]", requirement)[0]


def modules(folder: Path) -> set[str]:
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found


def test_every_dependency_is_imported():
    extras = [group for extra, group in PROJECT["optional-dependencies"].items() if extra not in OTHER_EXTRAS]
    needed = {name(line) for line in sum(extras, PROJECT["dependencies"])}
    assert {package for package in needed if MODULES.get(package, package) not in modules(ROOT / "qwq_jax")} == set()


@pytest.mark.parametrize("package", ["google-cloud-tpu", "libtpu-nightly", "jaxtyping"])
def test_the_lock_holds_nothing_that_nobody_asks_for(package):
    assert package not in LOCKED


def test_the_lock_holds_every_direct_dependency():
    extras = PROJECT["optional-dependencies"]
    direct = {name(line) for line in PROJECT["dependencies"] + extras["dev"] + extras["rl"]}
    assert {package.lower().replace("_", "-") for package in direct} <= LOCKED
