"""Answers requests as their tasks say: a process that stands for one of `plan`'s."""

import json
import os
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
        case task:
            found = {"answer": {"task": task, "process": os.getpid()}}
    print(json.dumps(found), flush=True)
