"""Functions that tests give as rewards of the user's own."""

import os
import subprocess
import sys
import time

from qwq_jax.rl.types import Score


def words(task, reply):
    return len(reply.answer.split())


def polite(task, reply):
    return "please" in reply.answer


def modules(task, reply):
    return Score(1.0, note=" ".join(name for name in ("jax", "jaxlib", "flax", "torch") if name in sys.modules))


def process(task, reply):
    return Score(1.0, note=str(os.getpid()))


def not_finite(task, reply):
    return float("nan")


def text(task, reply):
    return "good"


def troubled(task, reply):
    """Hangs, dies, raises, prints or takes memory, as the reply says."""
    match reply.answer.strip():
        case "hang":
            time.sleep(1000)
        case "spin":
            _ = 9**9**9  # in one step of the interpreter, which no signal handler of Python's interrupts
        case "die":
            os._exit(3)
        case "crash":
            os.abort()
        case "raise":
            raise KeyError("missing")
        case "exit":
            sys.exit(0)
        case "print":
            print("a line to standard output", flush=True)
        case "memory":
            bytearray(10**12)
        case "child":
            subprocess.Popen(["sleep", "1000"])
            time.sleep(1000)
    return 1.0
