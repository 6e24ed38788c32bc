import os
import signal
import subprocess
import sys

import pytest

from qwq_jax import runtime
from qwq_jax.interrupt import StopRequested


def run(code, **environment):
    # A user's environment, not that of the tests.
    ours = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("own", ["--a=3", None])
def test_flags_for_libtpu_leave_the_last_word_to_the_users_own(monkeypatch, own):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", own or "")  # which is undone
    if own is None:
        del os.environ["LIBTPU_INIT_ARGS"]
    runtime.add_tpu_flags("--a=1 --b=2")
    assert os.environ["LIBTPU_INIT_ARGS"].split() == ["--a=1", "--b=2", *([own] if own else [])]


def test_stop_is_noted_and_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequested() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_ctrl_c_is_meant():
    with StopRequested() as stop, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("flags", ["", "--xla_force_host_platform_device_count=2"])
def test_devices_are_simulated_whatever_the_environment_says(flags, tmp_path):
    code = "from qwq_jax import runtime; runtime.start(simulate_devices=5); import jax; print(jax.device_count())"
    result = run(code, XLA_FLAGS=flags, XDG_CACHE_HOME=str(tmp_path))
    assert result.stdout == "5\n", result.stderr


def test_devices_of_a_running_backend_are_enough_or_refused():
    runtime_code = "import jax; jax.devices(); from qwq_jax import runtime; runtime.start(simulate_devices={})"
    flags = "--xla_force_host_platform_device_count=2"
    assert run(runtime_code.format(2), XLA_FLAGS=flags).returncode == 0
    refused = run(runtime_code.format(3), XLA_FLAGS=flags)
    assert "ValueError: --simulate-devices 3: JAX has already started" in refused.stderr


def test_compile_cache_has_a_home(tmp_path):
    code = "from qwq_jax import runtime; runtime.start(); import jax; print(jax.config.jax_compilation_cache_dir)"
    result = run(code, XDG_CACHE_HOME=str(tmp_path))
    assert result.stdout.strip() == str(tmp_path / "qwq_jax" / "xla"), result.stderr


def test_processes_are_named_in_full(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(ValueError, match="go together"):
        runtime.start(distributed=True)
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID 'first' is not a number"):
        runtime.start(distributed=True)


def test_processes_that_nobody_named_are_asked_for_by_the_variables_names():
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    code = "from qwq_jax import runtime; runtime.start(simulate_devices=1, distributed=True)"
    error = run(code).stderr.splitlines()[-1]
    assert error.startswith("ValueError: --distributed") and all(name in error for name in names)


def test_a_coordinator_without_a_port_is_refused(monkeypatch):
    for address in ("host-0", "host-0:99999", ":80"):
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
        with pytest.raises(ValueError, match=f"process 0, '{address}', is not of the form HOST:PORT"):
            runtime.start(distributed=True)


def test_cpu_computes_in_float32():
    assert runtime.default_compute_dtype() == "float32"


def test_abandoned_reads_leave_no_traceback_and_other_errors_do():
    code = """
from qwq_jax import runtime
runtime.start()
runtime.start()
class Failing:
    def __init__(self, text): self.text = text
    def __del__(self): raise RuntimeError(self.text)
Failing("Event loop is closed")
Failing("something else")
"""
    error = run(code).stderr
    assert "Event loop is closed" not in error and error.count("RuntimeError: something else") == 1


@pytest.mark.parametrize(
    ("vendor", "libtpu", "expected"), [("0x8086", True, True), ("0x1ae0", True, False), ("0x8086", False, False)]
)
def test_a_compiler_for_tpus_is_not_taken_for_a_tpu(tmp_path, monkeypatch, vendor, libtpu, expected):
    (tmp_path / "0000:00:01.0").mkdir()
    (tmp_path / "0000:00:01.0" / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr(runtime, "find_spec", lambda name: object() if name == "libtpu" and libtpu else None)
    assert runtime.tpu_is_only_compiled_for(tmp_path) is expected


def test_answers_of_the_compiler_under_other_flags_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    usual = runtime.plan_directory()
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_some_flag=true")
    assert usual == runtime.cache_directory() / "plan" and runtime.plan_directory().parent == usual
