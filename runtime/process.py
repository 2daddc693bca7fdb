"""The native runtime as a process: requests and events as JSON lines over its standard streams.

Knows the protocol (`edgespec-runtime --help`) and nothing of text. The command may be a remote shell's.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from edgespec.errors import BackendError, InputError

LAST_WORDS = 20  # lines of stderr that are kept
ANSWERS = 600.0  # seconds without any event after which the runtime counts as hung


class Process:
    """A running edgespec-runtime; `ready` is its first event.

    One request runs at a time; `cancel` may come from another thread. BackendError where the process dies or
    says nothing for `timeout` seconds, InputError for a request that it refuses.
    """

    def __init__(self, command: Sequence[str], timeout: float = ANSWERS) -> None:
        self.timeout, self.number, self.running = timeout, 0, False
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.words: deque[str] = deque(maxlen=LAST_WORDS)
        self.writing = threading.Lock()
        try:
            self.child = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BackendError(
                f"{command[0]} cannot be started: {error.strerror}", "edgespec build"
            ) from error
        self.readers = [threading.Thread(target=read, daemon=True) for read in (self._out, self._err)]
        for reader in self.readers:
            reader.start()
        try:
            self.ready = self._next()
            if self.ready.get("protocol") != 1:
                raise BackendError("the runtime speaks another protocol", "build it again: edgespec build")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    def events(self, op: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Send a request; its events, the last of them `done`. A reader that leaves early cancels it."""
        if self.running:  # its reader is elsewhere: do not wait for all of it
            self.cancel()
        self.number += 1
        number = self.number
        self._send({"op": op, "id": number, **fields})
        self.running = True
        try:
            while self.running:
                event = self._next()
                if event.get("id") not in (number, None):
                    continue  # of a request whose reader left early
                self.running = event["event"] not in ("done", "error")
                if event["event"] == "error":
                    raise InputError(event["error"], event["hint"])
                yield event
                if self.number != number:
                    raise InputError(
                        f"another request began before the {op} was over", "read an answer to its end first"
                    )
        finally:
            if self.running and self.number == number:
                with suppress(BackendError):
                    self.cancel()

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request that has one answer."""
        return list(self.events(op, **fields))[-1]

    def cancel(self) -> None:
        """End the request that runs, after its present round."""
        self._send({"op": "cancel", "id": f"cancel {self.number}", "request": self.number})

    def close(self) -> None:
        """End the process; what it was still generating is cancelled."""
        if self.running:
            with suppress(BackendError):
                self.cancel()
        if self.child.stdin and not self.child.stdin.closed:
            with suppress(OSError):
                self.child.stdin.close()
        try:
            self.child.wait(5)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        for reader in self.readers:
            reader.join(5)
        for reader, stream in zip(self.readers, (self.child.stdout, self.child.stderr), strict=True):
            if stream and not reader.is_alive():  # a grandchild may hold the other end: closing would wait
                stream.close()

    def _send(self, request: dict[str, Any]) -> None:
        try:
            with self.writing:
                assert self.child.stdin
                self.child.stdin.write(json.dumps(request) + "\n")
                self.child.stdin.flush()
        except (OSError, ValueError):
            raise self._death() from None

    def _next(self) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=self.timeout)
        except queue.Empty:
            self.child.kill()
            self.running = False
            raise BackendError(
                f"the runtime has said nothing for {self.timeout:g} s",
                "run it again; report it if it stays so",
            ) from None
        if line is None:
            raise self._death()
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict) and "error" in event:
            event.setdefault("hint", "run edgespec check on the bundle")
        if isinstance(event, dict) and "error" in event and "event" not in event:  # its last words
            self.running = False
            raise BackendError(str(event["error"]), str(event["hint"]))
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise BackendError(f"the runtime's output makes no sense: {line[:200]!r}", "edgespec build")
        return event

    def _death(self) -> BackendError:
        self.running = False
        code = self.child.wait()
        for reader in self.readers:
            reader.join(5)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        words = "; ".join(self.words)
        hint = (
            "not enough memory? try a smaller --budget" if code == -9 else "run edgespec check on the bundle"
        )
        return BackendError(f"the runtime {how}" + (f": {words}" if words else ""), hint)

    def _out(self) -> None:
        assert self.child.stdout
        for line in self.child.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _err(self) -> None:
        assert self.child.stderr
        for line in self.child.stderr:
            self.words.append(line.rstrip("\n"))
