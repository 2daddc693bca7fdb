"""The binary among ended pipes, full disks, spoilt graphs and signals.

Every request gets its answer, or the program ends with a code and words that say why; no session is lost.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgespec.errors import InputError
from edgespec.runtime.build import binary
from edgespec.runtime.session import Runtime
from tests.helpers import tiny
from tests.helpers.running import LIST, OPEN, PLAIN, SAY, driven, lines, start, text, tokens, told

BAD = 200  # a token
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /dev/full and /proc")


@pytest.fixture
def bundle(opened: Callable[..., Runtime]) -> Path:
    return opened(**PLAIN).bundle.path


def spoilt(bundle: Path, to: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(bundle, to)
    return to


def admit(folder: Path) -> None:
    """Let the manifest list the sizes that the files have now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry["bytes"] = (folder / name).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_input_that_ends(bundle: Path) -> None:
    """What was asked is answered first, the last line too where it has no end."""
    with start(bundle) as process:
        out, err = process.communicate(lines(OPEN, SAY, LIST).rstrip(), timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert [e["id"] for e in told(out) if e["event"] == "done"] == [1, 2, 4]


def test_output_that_nobody_reads_any_more(bundle: Path) -> None:
    with start(bundle) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(lines(OPEN, SAY, *[{**SAY, "id": 3, "tokens": [5], "max_new_tokens": 2000}] * 50))
        process.stdin.flush()
        while json.loads(process.stdout.readline())["event"] != "round":
            pass
        process.stdout.close()
        assert process.wait(60) == 0  # its input is still open
        assert process.stderr.read() == b""


@linux
def test_output_that_cannot_be_written(bundle: Path) -> None:
    """The exit code was 0."""
    with open("/dev/full", "wb") as full, start(bundle, stdout=full) as process:
        _, err = process.communicate(lines(OPEN), timeout=60)
    assert process.returncode == 2
    assert err.startswith(b"error: the output cannot be written: No space left on device\nhint:  ")


@pytest.mark.parametrize(("closed", "code"), [("<&-", 0), (">&-", 2), ("<&- >&- 2>&-", 2)])
def test_streams_that_were_never_open(bundle: Path, closed: str, code: int) -> None:
    """The manifest was opened as the missing input, whose reader took some of it."""
    command = f'exec "$0" --bundle "$1" {closed}'
    done = subprocess.run(["sh", "-c", command, binary(print), bundle], capture_output=True, timeout=60)
    assert done.returncode == code
    assert [e["event"] for e in told(done.stdout)] == (["ready"] if code == 0 else [])


def gone(number: int) -> bool:
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@linux
def test_a_killed_driver_leaves_no_runtime(bundle: Path) -> None:
    code = (
        "import os, signal, sys; from edgespec.runtime.process import Process\n"
        "process = Process(sys.argv[1:]); process.ask('open', session='a')\n"
        "events = process.events('generate', session='a', tokens=[5], max_new_tokens=2000)\n"
        "next(events); print(process.child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code, str(binary(print)), "--bundle", str(bundle)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == -signal.SIGKILL
    for _ in range(600):
        if gone(int(done.stdout)):
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


def test_a_full_disk_keeps_the_old_snapshot_and_the_session(bundle: Path, tmp_path: Path) -> None:
    """A file too large killed it (SIGXFSZ)."""
    path, limit = tmp_path / "a.snap", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    keep = {"op": "snapshot", "session": "a", "path": str(path)}
    more = {**SAY, "id": 5, "tokens": []}
    with start(bundle) as process:
        whole = told(process.communicate(lines(OPEN, SAY, more), timeout=60)[0])
    path.write_bytes(b"old")
    with start(bundle, preexec_fn=limit) as process:
        requests = lines(OPEN, SAY, {**keep, "id": 3}, more, {**keep, "id": 6, "path": f"{tmp_path}/no/x"})
        events = told(process.communicate(requests, timeout=60)[0])
    errors = {e["id"]: (e["error"], e["hint"]) for e in events if e["event"] == "error"}
    assert errors[3] == (
        f"{path} cannot be written: File too large",
        "free some space, or choose another path",
    )
    assert errors[6][0] == f"{tmp_path}/no/x cannot be written: No such file or directory"
    assert process.returncode == 0 and tokens(events) == tokens(whole)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.snap": b"old"}


def test_a_pipe_is_no_file(bundle: Path, tmp_path: Path) -> None:
    """It waited for somebody to write into it."""
    os.mkfifo(tmp_path / "pipe")
    with start(bundle) as process:
        restore = {"op": "restore", "id": 3, "session": "a", "path": str(tmp_path / "pipe")}
        events = told(process.communicate(lines(OPEN, restore, SAY), timeout=60)[0])
    assert [e["error"] for e in events if "error" in e] == [f"{tmp_path}/pipe cannot be read"]
    assert events[-1]["event"] == "done" and process.returncode == 0
    folder = spoilt(bundle, tmp_path / "b")
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with start(folder) as process:
        out, _ = process.communicate(timeout=60)
    assert told(out)[0]["error"] == f"{folder}/manifest.json cannot be read" and process.returncode == 2


def test_killed_while_it_writes_a_snapshot(bundle: Path, tmp_path: Path) -> None:
    """The file is the whole old one or the whole new one."""
    path = tmp_path / "a.snap"
    for after in (0, 1, 7):
        with start(bundle) as process:
            keep = {"op": "snapshot", "id": 3, "session": "a", "path": str(path)}
            assert process.stdin and process.stdout
            process.stdin.write(lines(OPEN, SAY, *[keep] * 1000))
            process.stdin.flush()
            kept = 0
            while kept <= after:
                kept += json.loads(process.stdout.readline()).get("id") == 3
            process.kill()
        assert process.returncode == -signal.SIGKILL
        with start(bundle) as process:
            restore = {"op": "restore", "id": 3, "session": "a", "path": str(path)}
            events = told(process.communicate(lines(OPEN, restore), timeout=60)[0])
        assert events[-1] == {"id": 3, "event": "done", "tokens": 33}


def refusal(folder: Path) -> str:
    """Why the program does not start over this bundle."""
    with start(folder) as process:
        out, err = process.communicate(timeout=60)
    words = told(out)[0]
    assert err.decode().endswith(f"error: {words['error']}\nhint:  {words['hint']}\n")
    assert process.returncode == 2
    return words["error"]


def test_a_graph_cut_short(bundle: Path, tmp_path: Path) -> None:
    """Where the sizes are as the manifest has them; else that is said first."""
    folder = spoilt(bundle, tmp_path / "b")
    whole = (folder / "target-decode.onnx").read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (folder / "target-decode.onnx").write_bytes(whole[:size])
        assert f"target-decode.onnx has {size} bytes, not {len(whole)}" in refusal(folder)
        admit(folder)
        said = refusal(folder)
        assert "target-decode.onnx" in said or said == "a graph file is damaged"
        shutil.copy(bundle / "manifest.json", folder)


def swapped(bundle: Path, folder: Path, one: str, two: str) -> Path:
    spoilt(bundle, folder)
    shutil.copy(bundle / one, folder / two)
    shutil.copy(bundle / two, folder / one)
    admit(folder)
    return folder


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (
            "target-decode.onnx",
            "target-verify-2.onnx",
            "run a graph: Got invalid dimensions for input: tokens",
        ),
        (
            "target-verify-4.onnx",
            "draft-prefill.onnx",
            "run a graph: Got invalid dimensions for input: tokens",
        ),
        ("target-prefill.onnx", "target-commit.onnx", "bind tokens: Failed to find input name"),
    ],
)
def test_swapped_graphs_of_the_listed_sizes(
    bundle: Path, tmp_path: Path, one: str, two: str, message: str
) -> None:
    """Told by each request that needs the graph; never a wrong text."""
    with driven(swapped(bundle, tmp_path / "b", one, two)) as process:
        process.ask("open", session="a")
        for _ in range(2):
            with pytest.raises(InputError, match=f"ONNX Runtime cannot {message}") as caught:
                text(process, "a", [5, 6, 7] * 30)
            assert caught.value.hint == "run edgespec check on the bundle"
        assert len(process.ask("sessions")["sessions"]) == 1
    assert process.child.returncode == 0


def test_swapped_weights_of_the_listed_sizes(bundle: Path, tmp_path: Path) -> None:
    said = refusal(swapped(bundle, tmp_path / "b", "target.data", "draft.data"))
    assert said.endswith(" does not lie inside target.data")


@pytest.mark.parametrize("more", [{}, {"device": "npu", "weights": "fp16"}], ids=["append", "rows"])
def test_not_a_number(opened: Callable[..., Runtime], tmp_path: Path, more: dict[str, Any]) -> None:
    """One token's embedding is NaN: what contains it is refused, and leaves nothing behind in the cache."""
    bundle = opened(family="qwen2", policy="keydiff", **more).bundle.path
    folder = spoilt(bundle, tmp_path / "b")
    table = tiny.model("qwen2").get_input_embeddings().weight.detach().numpy().T
    for form in (table.astype(np.float32), table.astype(np.float16)):
        bad = form.copy()
        bad[:, BAD] = np.nan
        data = (folder / "target.data").read_bytes().replace(form.tobytes(), bad.tobytes())
        (folder / "target.data").write_bytes(data)
    with driven(folder) as process, driven(bundle) as other:
        for each in (process, other):
            each.ask("open", session="a")
        wanted = text(other, "a", [5, 6, 7])
        assert text(process, "a", [5, 6, 7]) == wanted and BAD not in wanted
        for sampling, count in (({}, 2), ({"temperature": 0.8}, 60)):  # before and after a commit
            with pytest.raises(InputError, match="a logit that is not a number") as caught:
                process.ask("generate", session="a", tokens=[BAD, 5] * count, **sampling)
            assert caught.value.hint == "run edgespec check on the bundle"
            assert text(process, "a", [5, 6, 7]) == wanted
    assert process.child.returncode == 0
