"""The command line, in which one process sends itself a signal after some steps of the engine.

`python -m tests.multihost.generate_worker PROCESS STEPS SIGNAL SILENCE generate ...`; INDEX in a word is that of the
process.
"""

import os
import sys

import jax

from qwq_jax import __main__ as command_line
from qwq_jax import processes
from qwq_jax.engine.engine import Engine, StepOutput
from qwq_jax.jobs import shared_output

victim, steps, number, silence = map(int, sys.argv[1:5])
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
    processes.BEAT_SECONDS, processes.SILENCE_SECONDS = 1.0, float(silence)
    Engine.step = counted
    shared_output.PATIENCE_SECONDS = 1.0
    index = os.environ["JAX_PROCESS_ID"]
    sys.exit(command_line.main([word.replace("INDEX", index) for word in sys.argv[5:]]))
