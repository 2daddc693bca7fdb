"""A scripted edgespec-runtime that says the same to every prompt; its argument is how it misbehaves."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from typing import Any

SAYS = [10, 11, 12, 13]
ENDLESS = 10_000  # rounds of a slow answer that nobody cancels


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def read(lines: queue.Queue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        lines.put(json.loads(line))
    lines.put(None)


def misbehave(how: str, number: object) -> bool:
    """Whether that was the whole answer."""
    if how == "dies":
        say(id=number, event="round", tokens=SAYS[:1], drafted=0, accepted=0)
        print("the last words", file=sys.stderr, flush=True)
        os._exit(7)
    if how == "panics":
        say(error="a bug of edgespec-runtime", hint="report it")
        os._exit(101)
    if how == "killed":
        os.kill(os.getpid(), 9)
    if how == "hangs":
        time.sleep(60)
    if how == "babbles":
        print("no JSON", flush=True)
    if how == "declines":
        say(id=number, event="error", error="not that", hint="something else")
    return how == "declines"


def generate(how: str, request: dict[str, Any], lines: queue.Queue[dict[str, Any] | None]) -> None:
    number = request["id"]
    if misbehave(how, number):
        return
    say(id=number, event="prompt", tokens=len(request["tokens"]), time_s=0.0)
    if how != "slow":
        for token in SAYS:
            say(id=number, event="round", tokens=[token], drafted=0, accepted=0)
        return say(id=number, event="done", reason="length", stats={"echo": request})
    for i in range(ENDLESS):
        say(id=number, event="round", tokens=[SAYS[i % len(SAYS)]], drafted=0, accepted=0)
        time.sleep(0.01)
        if not lines.empty() and (cancel := lines.queue[0]) and cancel.get("request") == number:
            say(id=lines.get()["id"], event="done")
            return say(id=number, event="done", reason="cancelled", stats={"echo": request})


def main(how: str) -> None:
    if how == "refuses":
        say(error="the bundle is odd", hint="make another")
        sys.exit(2)
    if how == "greets":
        print("Welcome to this machine", flush=True)
    say(event="ready", protocol=0 if how == "old" else 1)
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=read, args=(lines,), daemon=True).start()
    seen: list[dict[str, Any]] = []
    while request := lines.get():
        if request["op"] == "seen":
            say(id=request["id"], event="done", requests=seen)
            continue
        seen.append(request)
        if request["op"] == "generate":
            generate(how, request, lines)
        else:
            say(id=request["id"], event="done", table={"verify": {"1": 2.0}, "threads": 1})


if __name__ == "__main__":
    main(sys.argv[1])
