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
MODULES = {
    "google-auth": "google",
    "google-cloud-tpu": "google",
    "grpcio": "grpc",
    "orbax-checkpoint": "orbax",
    "pyyaml": "yaml",
}
# Packages for accelerators, which bring no module of their own, for developers, who also run programs, and for gcp/,
# which is looked at by itself.
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
    imported = modules(ROOT / "qwq_jax")
    assert {package for package in needed if MODULES.get(package, package) not in imported} == set()


def test_every_dependency_of_gcp_is_imported():
    needed = {name(line) for line in PROJECT["optional-dependencies"]["gcp"]}
    imported = modules(ROOT / "gcp")
    assert {package for package in needed if MODULES.get(package, package) not in imported} == set()


def test_the_vms_get_what_the_tests_passed_with_and_no_developers_tools():
    lines = (ROOT / "gcp" / "worker.lock").read_text().splitlines()
    pins = {line.partition(" ")[0] for line in lines if "==" in line}
    ours = {line.partition(" ")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert pins <= ours
    packages = {pin.partition("==")[0] for pin in pins}
    assert {"jax", "libtpu", "math-verify"} <= packages and not {"pytest", "torch", "google-cloud-tpu"} & packages


@pytest.mark.parametrize("package", ["google-cloud-compute", "libtpu-nightly", "jaxtyping"])
def test_the_lock_holds_nothing_that_nobody_asks_for(package):
    assert package not in LOCKED


def test_the_lock_holds_every_direct_dependency():
    extras = PROJECT["optional-dependencies"]
    direct = {name(line) for line in PROJECT["dependencies"] + extras["dev"] + extras["gcp"] + extras["rl"]}
    assert {package.lower().replace("_", "-") for package in direct} <= LOCKED
