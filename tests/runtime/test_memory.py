"""The binary with too little memory: it says so, ends or goes on, and loses no session."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgespec.errors import InputError
from edgespec.runtime.session import Runtime
from tests.helpers.running import PLAIN, driven, start, text, told

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's prlimit and /proc"),
    pytest.mark.skipif(
        os.environ.get("EDGESPEC_SANITIZE") == "1",
        reason="AddressSanitizer's shadow takes more addresses than a limit leaves",
    ),
]

SIGNALS = (-signal.SIGABRT, -signal.SIGSEGV)


def test_too_little_memory_to_open(opened: Callable[..., Runtime]) -> None:
    """A thread that could not be started was a bug's 101, a library's initialiser that failed a signal.

    One limit in fifty still ends in a signal: glibc and ONNX Runtime abort where they cannot unwind for
    want of memory (of 448 limits, 64 kB apart). The driver tells that as every other end by a signal.
    """
    bundle, codes = opened(**PLAIN).bundle.path, []
    for megabytes in (*range(40, 64, 2), 400):
        limit = megabytes << 20
        with start(
            bundle, preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        ) as process:
            out, err = process.communicate(timeout=60)
        codes.append(process.returncode)
        if process.returncode == 2:
            said = told(out)[0]["error"]
            assert said.startswith(("not enough memory to open the bundle", "the machine refuses a thread"))
            assert f"error: {said}\nhint:  ".encode() in err
        else:
            assert process.returncode in (0, 127, *SIGNALS)  # 127: the system cannot load the libraries
    assert codes.count(2) > len(codes) / 2 and codes[-1] == 0
    assert sum(code in SIGNALS for code in codes) <= 2


@pytest.mark.parametrize("more", [PLAIN, {"policy": "none", "budget": 500}], ids=["small", "large"])
def test_too_little_memory_for_another_session(opened: Callable[..., Runtime], more: dict[str, Any]) -> None:
    """It was killed: the library's destructors need memory to end what failed for want of it."""
    with driven(opened(**more).bundle.path) as process:
        for name in ("first", "second"):
            process.ask("open", session=name)
        wanted, longer = text(process, "first", [5, 6, 7]), text(process, "first", [9] * 300 + [5], 5)
        used = int(Path(f"/proc/{process.child.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(process.child.pid, resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
        count = 0
        with pytest.raises(InputError, match="not enough memory") as caught:
            while True:
                process.ask("open", session=str(count))
                count += 1
        assert caught.value.hint == "close a session, or use a bundle with a smaller budget"
        for length in range(300, 330):  # whatever fails for want of memory is told
            try:
                text(process, "second", [9] * length)
            except InputError as error:
                assert error.message == "not enough memory"
        assert len(process.ask("sessions")["sessions"]) == count + 2
        for number in range(count):
            process.ask("close", session=str(number))
        resource.prlimit(process.child.pid, resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))
        assert text(process, "first", [5, 6, 7]) == wanted
        assert text(process, "second", [9] * 300 + [5], 5) == longer
        process.ask("open", session="again")
        process._send({"op": "sessions", "id": 0, "x": "y" * (20 << 20)})
        answer = process._next()  # that memory lacks, or that the line is too long for what there is
        assert (answer["id"], answer["event"]) == (None, "error")
        assert text(process, "again", [5, 6, 7]) == wanted
    assert process.child.returncode == 0
