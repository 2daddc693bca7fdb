"""A scripted edgespec-runtime that says the same to every prompt; its argument is how it misbehaves."""

from __future__ import annotations

import json
import os
import sys
import time

SAYS = [10, 11, 12, 13]


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def main(how: str) -> None:
    if how == "refuses":
        say(error="the bundle is odd", hint="make another")
        sys.exit(2)
    if how == "old":
        say(event="ready", protocol=0)
    else:
        say(event="ready", protocol=1)
    for line in sys.stdin:
        request = json.loads(line)
        number, op = request["id"], request["op"]
        if op == "generate" and how == "dies":
            say(id=number, event="round", tokens=SAYS[:1], drafted=0, accepted=0)
            print("the last words", file=sys.stderr, flush=True)
            os._exit(7)
        if op == "generate" and how == "killed":
            os.kill(os.getpid(), 9)
        if op == "generate" and how == "hangs":
            time.sleep(60)
        if op == "generate" and how == "babbles":
            print("no JSON", flush=True)
        if op == "generate" and how == "declines":
            say(id=number, event="error", error="not that", hint="something else")
            continue
        if op == "generate":
            say(id=number, event="prompt", tokens=len(request["tokens"]), time_s=0.0)
            for token in SAYS:
                say(id=number, event="round", tokens=[token], drafted=0, accepted=0)
            say(id=number, event="done", reason="length", stats={"echo": request})
        else:
            say(id=number, event="done", sessions=[])


if __name__ == "__main__":
    main(sys.argv[1])
