"""Reinforcement learning on two processes is that of one, and goes on bitwise whichever of them dies or is stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.jobs.rl_recipe import assert_same_run, draws, order, stored_state, without_times, write_recipe
from tests.multihost.launch import together

STEPS = 4
SETTINGS = ("--set", "mesh.data=2", "--set", f"stop_after={STEPS}")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def several(recipe: Path, output: Path, count: int = 2, *more: str, **moment: Any) -> list[int]:
    """Processes of one device, two by default; each keeps notes of its own."""
    options = (*SETTINGS, *more, "--distributed", "--simulate-devices", "1")
    text = order(recipe, output, *options, notes=f"{output}.notesINDEX", **moment).text()
    ends = together("-m", "tests.jobs.rl_worker", "--here", text, count=count)
    for end in ends:
        print(end.stdout, end.stderr[-3000:])  # shown if the test fails
    return [end.returncode for end in ends]


@pytest.fixture(scope="module")
def calm(recipe: Path) -> Path:
    output = recipe.parent / "calm"
    assert several(recipe, output) == [0, 0]
    return output


def one(recipe: Path, output: Path, devices: int = 2, *more: str) -> None:
    """One process of all devices."""
    options = (*SETTINGS, *more, "--simulate-devices", str(devices))
    text = order(recipe, output, *options, notes=f"{output}.notes0").text()
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.jobs.rl_worker", text],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(ended.stdout.splitlines()[-1]) == [0], ended.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_are_the_run_of_one(recipe: Path, calm: Path, tmp_path: Path) -> None:
    """The same devices in one process: the same tokens and rewards, and parameters to the last bit."""
    assert draws(calm, "0") == draws(calm, "1"), "both know the whole batch, and what every reply is worth"
    one(recipe, tmp_path / "one")
    alone, together_ = draws(tmp_path / "one", "0"), draws(calm, "0")
    for step in range(1, STEPS + 1):
        for name in ("cursors", "prompts", "tokens", "rewards"):
            assert alone[step][name] == together_[step][name], (step, name)
    states = [stored_state(output, STEPS) for output in (calm, tmp_path / "one")]
    for key, value in states[0].items():
        # A sum of two is the same in either order.
        np.testing.assert_array_equal(value, states[1][key], err_msg=key)
    assert without_times(calm) == without_times(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_four_processes_are_the_run_of_one(recipe: Path, tmp_path: Path) -> None:
    """As two; but parameters are equal up to the order in which gradients of four devices are added."""
    four, alone = tmp_path / "four", tmp_path / "one"
    settings = ("--set", "mesh.data=4", "--set", "stop_after=2")
    assert several(recipe, four, 4, *settings) == [0] * 4
    one(recipe, alone, 4, *settings)
    drawn = draws(alone, "0")
    assert list(drawn) == [1, 2]
    for process in range(4):
        found = draws(four, str(process))
        for step in drawn:
            for name in ("cursors", "prompts", "tokens", "rewards"):
                assert found[step][name] == drawn[step][name], (process, step, name)
    states = [stored_state(output, 2) for output in (four, alone)]
    for key, value in states[0].items():
        np.testing.assert_allclose(value, states[1][key], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_stopped_in_every_phase_two_processes_are_bitwise_the_same_run(
    recipe: Path, calm: Path, tmp_path: Path
) -> None:
    """Both die in a rollout, and while rewards are exchanged; then the second in an update, the first while it saves.

    In between the second is asked to stop, and both do.
    """
    output = tmp_path / "run"
    counts = json.loads(Path(f"{calm}.notes0.counts").read_text())
    kill, both = {"signal": signal.SIGKILL}, [-signal.SIGKILL] * 2
    middle = lambda step, phase: {"step": step, "phase": phase, "event": counts[f"{step} {phase}"] // 2}  # noqa: E731
    assert several(recipe, output, **kill, **middle(1, "rollout")) == both
    assert several(recipe, output, **kill, **middle(2, "reward")) == both
    assert several(recipe, output, signal=signal.SIGTERM, **middle(1, "rollout"), process=1) == [42, 42]
    assert max(draws(output, "0")) < STEPS, "not at once, but soon"
    codes = several(recipe, output, **kill, **middle(3, "update"), process=1)
    assert codes == [42, -signal.SIGKILL], "the first hears nothing of the second any more, and ends"
    codes = several(recipe, output, **kill, **middle(4, "save"), process=0)
    assert codes[0] == -signal.SIGKILL and codes[1] in (-signal.SIGABRT, 42)
    assert several(recipe, output) == [0, 0]
    assert_same_run(output, calm, steps=STEPS, notes="0")
    assert draws(output, "0") == draws(output, "1")
