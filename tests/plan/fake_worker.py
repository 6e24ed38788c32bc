"""Answers requests as their tasks say: a process that stands for one of `plan`'s."""

import json
import os
import signal
import sys
from pathlib import Path

for line in sys.stdin:
    request = json.loads(line)
    with Path(request["job"]["log"]).open("a") as log:
        log.write(request["task"] + "\n")
    print("noise of a compiler", file=sys.stderr)
    match request["task"]:
        case "refused":
            found = {"refused": "rows do not divide"}
        case "broken":
            print("Traceback\nKeyError: 'rows'", file=sys.stderr)
            sys.exit(1)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "garbage":
            print("a warning where an answer should be", flush=True)
            continue
        case task:
            (Path(sys.argv[1]) / "dump").write_text(task)
            found = {"answer": {"task": task, "process": os.getpid()}}
    print(json.dumps(found), flush=True)
