"""Several processes on this machine that know each other."""

import os
import socket
import subprocess
import sys
from subprocess import CompletedProcess, Popen


def start(*arguments: str, count: int = 2) -> list[Popen[str]]:
    """Starts `python ARGUMENTS` so often; the first is the coordinator."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # The device count of the tests would contradict that of the processes.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        Popen(
            [sys.executable, *arguments],
            env=environment | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def ends_of(started: list[Popen[str]]) -> list[CompletedProcess[str]]:
    """Waits for all."""
    ends = [process.communicate(timeout=300) for process in started]
    return [
        CompletedProcess(process.args, process.returncode, *end) for process, end in zip(started, ends, strict=True)
    ]


def together(*arguments: str, count: int = 2) -> list[CompletedProcess[str]]:
    """Runs processes that know each other, and returns their ends."""
    return ends_of(start(*arguments, count=count))
