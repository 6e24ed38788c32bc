"""Answers a request as its task says: a process that stands for one of `plan`'s."""

import json
import sys
from pathlib import Path

request = json.load(sys.stdin)
with Path(request["job"]["log"]).open("a") as log:
    log.write(request["task"] + "\n")
match request["task"]:
    case "refused":
        print("noise of a compiler\nrows do not divide", file=sys.stderr)
        sys.exit(2)
    case "broken":
        print("Traceback\nKeyError: 'rows'", file=sys.stderr)
        sys.exit(1)
    case task:
        print("noise of a compiler")
        print(json.dumps({"task": task}))
