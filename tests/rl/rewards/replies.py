"""Tasks and replies for tests of rewards, and a look at processes."""

import functools
import os
import time
from pathlib import Path

from qwq_jax.chat import split_thinking
from qwq_jax.config.rewards import CodeConfig, Isolation
from qwq_jax.rl.rewards.sandbox import Enclosure
from qwq_jax.rl.types import Reply, Task


def task(source="", **judge):
    return Task("t-1", ({"role": "user", "content": "?"},), source, judge)


def reply(text, *, opened=False, tokens=10, truncated=False):
    """A reply as the loop makes it of what was generated; `opened` says that the prompt ended in <think>."""
    thought, answer = split_thinking(text, opened)
    return Reply(text, thought, answer, tokens, truncated)


def code(program):
    return reply(f"<think>hm</think>\n\n```python\n{program}\n```\n")


def processes():
    """The parent, and the moment of its start, of each process; both together name it for good."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                found[int(entry.name)] = (int(fields[1]), fields[19])
    return found


def descendants(pid):
    """Processes below `pid`, by number and start."""
    every = processes()
    below, waiting = {}, [pid]
    while waiting:
        parent = waiting.pop()
        for child, (its_parent, start) in every.items():
            if its_parent == parent and child not in below:
                below[child] = start
                waiting.append(child)
    return below


def all_end(pids, seconds):
    """Whether all of `descendants` are gone, at the latest after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        every = processes()
        if not any(pid in every and every[pid][1] == start for pid, start in pids.items()):
            return True
        time.sleep(0.02)
    return False


def own_descendants(before=()):
    """Processes below this one, but for those that were there before."""
    return {pid: start for pid, start in descendants(os.getpid()).items() if pid not in before}


@functools.cache
def isolation():
    """A sandbox where there can be one, for tests that do not depend on it."""
    try:
        Enclosure.find(CodeConfig())
    except ValueError:
        return Isolation.NONE
    return Isolation.BUBBLEWRAP
