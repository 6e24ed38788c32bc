"""A sandbox of each kind that is possible here, and programs that report what they got at."""

import os
import shutil
import time
from pathlib import Path

import pytest

from qwq_jax.config.rewards import CodeConfig
from qwq_jax.rl.rewards.sandbox import Enclosure, Lost, Sandbox, Style
from tests.rl.rewards.replies import all_end, own_descendants

ROOT = Path(__file__).parents[3]
CONFIG = CodeConfig(test_seconds=5.0, memory_mib=256, output_kib=64, scratch_mib=4, threads=8)
# For programs that are to be stopped by time.
HURRIED = CONFIG.model_copy(update={"test_seconds": 0.3})
# What a start and the killing may take, beside the time of the test, on a machine that has more to do.
AROUND = 2.0


def styles():
    if shutil.which("bwrap") is None:
        return []
    return [Style.OTHER_USER, Style.USER_NAMESPACE] if os.geteuid() == 0 else [Style.USER_NAMESPACE]


def each_style():
    """The one that is used by default, and the other in slow tests."""
    first, *more = styles() or [Style.USER_NAMESPACE]
    return [
        pytest.param(first, id=first.name),
        *(pytest.param(one, id=one.name, marks=pytest.mark.slow) for one in more),
    ]


def possible(style):
    """The enclosure of this style; the test is skipped where it cannot be."""
    if shutil.which("bwrap") is None:
        pytest.skip("bwrap is not installed")
    made = Enclosure(style, shutil.which("bwrap") or "", can_write=True)
    try:
        with Sandbox(made, CONFIG) as sandbox:
            sandbox.try_out()
    except Lost as lost:
        pytest.skip(f"no sandbox of this kind here: {lost}")
    return made


class Unfiltered(Enclosure):
    """Without the filter of system calls, to see that what lies behind it holds too."""

    def settings(self, config):
        return {**super().settings(config), "filter": ""}


def unfiltered(enclosure):
    return Unfiltered(enclosure.style, enclosure.bwrap, enclosure.can_write)


def run(enclosure, program, stdin="", config=CONFIG):
    """The report on one run; everything that was started must be gone afterwards, within the bound."""
    started, before = time.monotonic(), own_descendants()
    with Sandbox(enclosure, config) as sandbox:
        sandbox.ask({"do": "load", "program": program})
        below = own_descendants(before)
        try:
            report = sandbox.ask({"do": "run", "stdin": stdin})
        except Lost as lost:
            report = {"ended": "lost", "status": None, "output": "", "note": str(lost)}
    assert all_end(below, 2.0)
    assert time.monotonic() - started < config.test_seconds + AROUND
    return report


def attempts(*tries):
    """A program that makes each attempt, an expression, and prints one line of each: its value, or what it raised."""
    lines = ["import ctypes, errno, os, signal, socket, sys, threading, time"]
    for attempt in tries:
        lines += [f"try: print(repr({attempt}))", "except BaseException as error: print(type(error).__name__, error)"]
    return "\n".join(lines)


def outcomes(enclosure, *tries):
    report = run(enclosure, attempts(*tries))
    assert report["status"] == 0, report
    found = report["output"].splitlines()
    assert len(found) == len(tries)
    return found
