"""The command line, in which one process sends itself a signal after some steps of the engine.

`python -m tests.multihost.generate_worker PROCESS STEPS SIGNAL HEARTBEAT generate ...`
"""

import os
import sys

import jax

from qwq_jax import __main__ as command_line
from qwq_jax import runtime
from qwq_jax.engine.engine import Engine, StepOutput

victim, steps, number, heartbeat = map(int, sys.argv[1:5])
taken = 0
step = Engine.step


def counted(self: Engine) -> StepOutput:
    global taken
    output = step(self)
    taken += 1
    if taken == steps and jax.process_index() == victim:
        os.kill(os.getpid(), number)
    return output


if __name__ == "__main__":
    runtime._HEARTBEAT_SECONDS = heartbeat
    Engine.step = counted
    sys.exit(command_line.main(sys.argv[5:]))
