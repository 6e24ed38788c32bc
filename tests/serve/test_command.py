"""The command: what is wrong is one sentence and exit code 2; a SIGTERM drains and is exit code 0."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import openai
import pytest

from qwq_jax.__main__ import main
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.jobs.serve import model_name, read_keys, serve
from qwq_jax.serve.options import ServeOptions
from qwq_jax.serve.server import bind
from tests.serve.conftest import ENGINE
from tests.serve.live import QUESTION


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--host 127.0.0.1 --port {port}: cannot listen there: Address already"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "sentence"),
    [("no.such.host.invalid", "--host no.such.host.invalid: no such host"), ("192.0.2.1", "cannot listen there: ")],
)
def test_a_bad_host(host, sentence):
    with pytest.raises(ValueError, match=sentence):
        bind(host, 0)


def test_keys_of_a_file(tmp_path):
    file = tmp_path / "keys"
    with pytest.raises(ValueError, match="keys: cannot be read: No such file"):
        read_keys(file)
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="keys: holds no key"):
        read_keys(file)
    file.write_text("one\n\ntwo \n")
    assert read_keys(file) == ("one", "two")


def test_names():
    assert model_name("gs://bucket/qwq-32b/") == "qwq-32b"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": ""}, "served model name"),
        ({"model": "m", "port": 70000}, "port: expected 0 to 65535, got 70000"),
        ({"model": "m", "max_waiting": -1}, "max_waiting: expected 0 or more, got -1"),
        ({"model": "m", "drain_seconds": float("nan")}, "drain_seconds: expected 0 or more, got nan"),
        ({"model": "m", "api_keys": ("a secret",)}, "API key: expected printable ASCII"),
    ],
)
def test_options_that_make_no_sense(options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        ServeOptions(**options)
    assert "secret" not in str(caught.value)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qwq_jax", "serve", *arguments]


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """Whatever a test finds, its process does not outlive it."""
    try:
        yield
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)])
def test_the_command_serves_until_a_signal(checkpoint, tmp_path, number):
    keys = tmp_path / "keys"
    keys.write_text("hidden-key\n")
    words = command(checkpoint, "--port", "0", "--api-key-file", str(keys), "--served-model-name", "tiny")
    words += ["--set", "engine.max_context=256", "--set", "engine.max_sequences=4", "--simulate-devices", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, **pipes, text=True, env=environment) as process, ended(process):
        said = ""
        while (found := re.search(r"serving tiny at (http://\S+/v1) \(an API key is needed\)\n", said)) is None:
            line = process.stderr.readline()
            assert line, said
            said += line
        with openai.OpenAI(base_url=found[1], api_key="hidden-key", max_retries=0) as client:
            stream = client.chat.completions.create(
                model="tiny", messages=QUESTION, temperature=0, max_tokens=80, stream=True
            )
            chunks = iter(stream)
            next(chunks)
            process.send_signal(number)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).startswith("The answer is")
        out, rest = process.communicate(timeout=60)
    assert process.returncode == 0, said + rest
    assert "draining" in rest and "Traceback" not in rest
    assert "hidden-key" not in out + said + rest


@pytest.mark.slow
def test_the_command_says_what_is_wrong_before_it_loads(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(command(checkpoint, "--port", port), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: --host 127.0.0.1 --port {port}: cannot listen there: Address already in use\n"


def test_nobody_can_connect_before_all_is_compiled(checkpoint, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def knock(engine):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        raise ValueError("nobody answered")

    monkeypatch.setattr("qwq_jax.jobs.serve.compile_programs", knock)
    with pytest.raises(ValueError, match="nobody answered"):
        serve(checkpoint, ServeOptions("m", port=port), engine=ENGINE, mesh=MeshConfig(), sampling=SamplingParams())


def test_the_verb_passes_its_options(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr("qwq_jax.jobs.serve.serve", lambda *arguments, **options: calls.append((arguments, options)))
    monkeypatch.setattr("qwq_jax.runtime.start", lambda **options: None)
    keys = tmp_path / "keys"
    keys.write_text("two\n")
    words = ["serve", "ck/qwq", "--port", "81", "--host", "::1", "--api-key", "one", "--api-key-file", str(keys)]
    words += ["--max-waiting", "3", "--drain-seconds", "1.5", "--set", "engine.page_size=8", "--set", "sampling.n=2"]
    assert main(words) == 0
    ((checkpoint, options), settings) = calls[0]
    assert checkpoint == "ck/qwq"
    assert options == ServeOptions("qwq", "::1", 81, ("one", "two"), max_waiting=3, drain_seconds=1.5)
    assert settings["engine"].page_size == 8 and settings["sampling"].n == 2 and settings["warm_up"]
    assert main(["serve", "ck", "--no-warm-up"]) == 0 and not calls[1][1]["warm_up"]
    assert main(["serve", "ck", "--api-key", "with space"]) == main(["serve", "ck", "--api-key-file", "/no"]) == 2
    assert "with space" not in capsys.readouterr().err
