"""The command line, in which one process sends itself a signal after it has written some tensors.

`python -m tests.multihost.convert_worker PROCESS TENSORS SIGNAL convert ...`
"""

import os
import sys

import numpy as np

from qwq_jax import __main__ as command_line
from qwq_jax import processes
from qwq_jax.checkpoint.manifest import TensorRecord
from qwq_jax.checkpoint.store import CheckpointWriter
from qwq_jax.jobs import conversion_team

victim, tensors, number = map(int, sys.argv[1:4])
written = 0
write = CheckpointWriter.write


def counted(self: CheckpointWriter, array: np.ndarray, record: TensorRecord) -> None:
    global written
    write(self, array, record)
    written += 1
    if written == tensors and int(os.environ["JAX_PROCESS_ID"]) == victim:
        os.kill(os.getpid(), number)


if __name__ == "__main__":
    processes.BEAT_SECONDS, processes.SILENCE_SECONDS = 1.0, 5.0
    conversion_team.PATIENCE_SECONDS = 3.0
    CheckpointWriter.write = counted
    sys.exit(command_line.main(sys.argv[4:]))
