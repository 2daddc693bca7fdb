"""The native binary as a bare process: requests in, events out."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from edgespec.runtime.build import binary
from edgespec.runtime.process import Process

PLAIN: dict[str, Any] = {"policy": "keydiff", "draft": "layers", "draft_budget": 32, "draft_rows": 200}
OPEN = {"op": "open", "id": 1, "session": "a"}
SAY = {"op": "generate", "id": 2, "session": "a", "tokens": [5, 6, 7], "max_new_tokens": 30}
LIST = {"op": "sessions", "id": 4}


def lines(*requests: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def start(bundle: Path, **how: Any) -> subprocess.Popen[bytes]:
    """The binary with pipes; `how` changes Popen's arguments."""
    command = [str(binary(print)), "--bundle", str(bundle), "--threads", "1"]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen(command, **{**pipes, **how})


def driven(bundle: Path) -> Process:
    """The binary under its driver."""
    return Process([str(binary(print)), "--bundle", str(bundle), "--threads", "1"])


def told(out: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def tokens(events: list[dict[str, Any]]) -> list[int]:
    return [token for event in events if event["event"] == "round" for token in event["tokens"]]


def text(process: Process, session: str, prompt: list[int], count: int = 20) -> list[int]:
    """What a session says to a prompt, from its beginning."""
    process.ask("truncate", session=session, tokens=0)
    return tokens(list(process.events("generate", session=session, tokens=prompt, max_new_tokens=count)))
