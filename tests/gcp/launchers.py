"""Launchers as processes that are forked from one that has imported everything; each dies a death of its own.

Reads orders, a line of JSON each, from standard input; answers with the process id, and then with its exit code.
"""

import json
import os
import sys

from gcp import tpu


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.chdir(order["directory"])
            os.environ.update(order["environment"])
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os._exit(tpu.main(order["arguments"]))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
