"""The code and the files of a job, in the bucket, each under the hash of its content."""

import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from gcp import names
from gcp.objects import Conflict, Objects
from gcp.record import Staged

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "gcp" / "worker.lock"
BOOT = ROOT / "gcp" / "boot.sh"
_AGENT = ROOT / "gcp" / "worker"
# What a wheel is made of. Built in a copy: setuptools leaves old modules in build/, and would pack them.
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "qwq_jax")
# The oldest time a zip file can hold; with it the same sources give the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_EPOCH_SECONDS = "315532800"


def build_wheel() -> tuple[str, bytes]:
    """Builds this package's wheel, and returns its file name and bytes; the same sources give the same bytes.

    Raises:
        ValueError: It cannot be built here.
    """
    with tempfile.TemporaryDirectory() as temporary:
        copy, out = Path(temporary) / "source", Path(temporary) / "wheel"
        copy.mkdir()
        for source in _SOURCES:
            origin = ROOT / source
            if origin.is_dir():
                shutil.copytree(origin, copy / source, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(origin, copy)
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy)]
        environment = {"PATH": "/usr/bin:/bin", "SOURCE_DATE_EPOCH": _EPOCH_SECONDS, "PYTHONHASHSEED": "0"}
        done = subprocess.run([*pip, *options], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"the wheel of this package cannot be built: {last}")
        (wheel,) = out.glob("*.whl")
        return wheel.name, wheel.read_bytes()


def pack_agent() -> bytes:
    """The worker's agent as a zip that Python runs; the same sources give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        members = {f"gcp/worker/{path.name}": path.read_bytes() for path in sorted(_AGENT.glob("*.py"))}
        for name, data in {"gcp/__init__.py": b"", **members}.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
    return buffer.getvalue()


def read_files(files: Sequence[str], working_directory: Path) -> dict[str, bytes]:
    """Reads a job's files, all of them before anything is uploaded.

    Raises:
        ValueError: One cannot be read; it is named.
    """
    found = {}
    for name in files:
        try:
            found[name] = (working_directory / name).read_bytes()
        except OSError as error:
            raise ValueError(f"files: {name} cannot be read: {error.strerror}") from None
    return found


def stage(objects: Objects, files: dict[str, bytes], *, wheel: tuple[str, bytes], lock: bytes | None = None) -> Staged:
    """Uploads what is not there yet."""
    lock = LOCK.read_bytes() if lock is None else lock
    agent = pack_agent()
    return Staged(
        agent=_upload(objects, "agent.zip", agent),
        agent_sha256=hashlib.sha256(agent).hexdigest(),
        wheel=_upload(objects, *wheel),
        lock=_upload(objects, "requirements.lock", lock),
        files={name: _upload(objects, Path(name).name, data) for name, data in files.items()},
    )


def _upload(objects: Objects, name: str, data: bytes) -> str:
    place = names.content(hashlib.sha256(data).hexdigest(), name)
    try:
        objects.put(place, data, generation=0)
    except Conflict:
        pass  # the name is the hash: what is there is the same
    return place
