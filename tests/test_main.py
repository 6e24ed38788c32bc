import os
import socket
import subprocess
import sys

import pytest

from qwq_jax import __main__ as command_line
from qwq_jax import __version__
from qwq_jax.config.engine import EngineConfig
from qwq_jax.config.inference import CHAT_SAMPLING
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.place import Place
from qwq_jax.config.sampling import SamplingParams
from qwq_jax.interrupt import Interrupted

VERBS = [
    "convert",
    "export",
    "generate",
    "chat",
    "serve",
    "warm-up",
    "sft",
    "dpo",
    "reward-model",
    "rl",
    "eval",
    "demo",
]


@pytest.fixture
def job(monkeypatch):
    """Replaces the job of a verb by one that notes its arguments, or raises, and starts no runtime."""

    def replace(verb, error=None):
        calls = []

        def record(*arguments, **options):
            calls.append((arguments, options))
            if error is not None:
                raise error

        module = type(sys)(f"qwq_jax.jobs.{verb}")
        setattr(module, verb, record)
        monkeypatch.setitem(sys.modules, f"qwq_jax.jobs.{verb}", module)
        import qwq_jax.jobs

        monkeypatch.setattr(qwq_jax.jobs, verb, module, raising=False)
        monkeypatch.setattr("qwq_jax.runtime.start", lambda **options: None)
        return calls

    return replace


def test_help_lists_every_verb_and_each_has_an_example(capsys):
    assert command_line.main(["--help"]) == command_line.main([]) == 0
    listing = capsys.readouterr().out
    for verb in VERBS:
        assert verb in listing
        assert command_line.main([verb, "--help"]) == 0
        assert f"qwq-jax {verb}" in capsys.readouterr().out


def test_version(capsys):
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_help_does_not_load_jax():
    code = "import sys, qwq_jax.__main__ as m; m.main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["conver"], "No such command 'conver'"),
        (["convert", "source"], "Missing argument"),
        (["convert", "a", "b", "--dtype", "int4"], "int4"),
        (["convert", "a", "b", "--fast"], "No such option: --fast"),
        (["sft", "/nowhere/run.toml"], "error: /nowhere/run.toml: cannot be read: No such file or directory"),
    ],
)
def test_bad_usage_exits_2_without_a_traceback(capsys, arguments, sentence):
    assert command_line.main(arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_convert_passes_its_options(job):
    calls = job("convert")
    assert command_line.main(["convert", "a", "b", "--dtype", "float32", "--low-disk"]) == 0
    options = {"dtype": "float32", "quantize": None, "allow_nan": False, "low_disk": True}
    assert calls == [(("a", "b"), options | {"together": False})]


PLACE = ["--coordinator-address", "host-0:8476", "--num-processes", "4", "--process-id", "3"]


def test_who_names_its_processes_joins_them(job, monkeypatch):
    calls, started = job("convert"), []
    monkeypatch.setattr("qwq_jax.runtime.start", lambda **options: started.append(options["distributed"]))
    assert command_line.main([*PLACE, "convert", "a", "b"]) == 0
    assert command_line.main(["convert", "a", "b", "--distributed"]) == 0
    assert command_line.main(["convert", "a", "b"]) == 0
    assert [options["together"] for _, options in calls] == [True, True, False]
    assert started == [Place("host-0:8476", 4, 3), True, False]


def test_the_processes_that_were_named_meet():
    """The first alone: JAX lets it begin when it is the only one."""
    code = """
from qwq_jax import runtime
from qwq_jax.config.place import Place
runtime.start(simulate_devices=1, distributed=Place("localhost:PORT", 1, 0))
import jax
print(jax.process_count(), jax.distributed.is_initialized())
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        code = code.replace("PORT", str(free.getsockname()[1]))
    ours = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run([sys.executable, "-c", code], env=ours, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["1", "True"], run.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*PLACE[:4], "convert", "a", "b"], "--coordinator-address, --num-processes and --process-id go together"),
        (
            [*PLACE[:4], "--process-id", "4", "convert", "a", "b"],
            "process 4 is none of 4 processes, which count from 0",
        ),
        ([*PLACE, "export", "a", "b"], "export is done by one process: leave out --process-id"),
    ],
)
def test_processes_that_cannot_be_are_refused(words, sentence, capsys):
    assert command_line.main(words) == 2
    assert sentence in capsys.readouterr().err


def test_settings_reach_the_engine_the_mesh_and_the_sampler(job, tmp_path):
    calls = job("generate")
    paths = ["--input", str(tmp_path / "i"), "--output", str(tmp_path / "o")]
    sampling = ["--set", "sampling.top_k=40"]
    assert (
        command_line.main(
            ["generate", "ck", *paths, "--set", "mesh.tensor=4", "--set", "engine.page_size=8", *sampling]
        )
        == 0
    )
    [(arguments, options)] = calls
    assert arguments == ("ck", tmp_path / "i", tmp_path / "o")
    # float32 because the tests run on the CPU.
    engine = EngineConfig(page_size=8, compute_dtype="float32")
    assert options == {"engine": engine, "mesh": MeshConfig(tensor=4), "sampling": SamplingParams(top_k=40), "seed": 0}


def test_chat_draws_as_the_makers_advise_but_for_what_is_set(job):
    [calls] = [job("chat")]
    assert command_line.main(["chat", "ck", "--set", "sampling.temperature=0"]) == 0
    [(_, options)] = calls
    assert options["sampling"].model_dump() == {**CHAT_SAMPLING.model_dump(), "temperature": 0.0}


def test_warm_up_passes_its_settings(job):
    calls = job("warm_up")
    assert command_line.main(["warm-up", "ck", "--set", "mesh.tensor=2", "--set", "engine.page_size=8"]) == 0
    engine = EngineConfig(page_size=8, compute_dtype="float32")
    assert calls == [(("ck",), {"engine": engine, "mesh": MeshConfig(tensor=2)})]


def test_a_wrong_setting_names_its_path(job, capsys):
    job("chat")
    assert command_line.main(["chat", "ck", "--set", "engine.pagesize=8"]) == 2
    assert "engine.pagesize: unknown key, did you mean engine.page_size?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ValueError("config.json: hidden_size is missing"), 2, "error: config.json: hidden_size is missing"),
        (OSError(28, "No space left on device", "/full"), 2, "error: /full: No space left on device"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "error: /root/x: Permission denied"),
        (Interrupted("12 of 30 answered"), 42, "interrupted: 12 of 30 answered"),
        (KeyboardInterrupt(), 1, ""),
    ],
)
def test_errors_become_exit_codes(job, capsys, error, code, sentence):
    job("export", error)
    assert command_line.main(["export", "ck", "out"]) == code
    assert capsys.readouterr().err.strip() == sentence


def test_bugs_keep_their_traceback(job):
    job("export", AssertionError("a bug"))
    with pytest.raises(AssertionError, match="a bug"):
        command_line.main(["export", "ck", "out"])


def test_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-m", "qwq_jax", "sft", str(tmp_path / "absent.toml")]
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
