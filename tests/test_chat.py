"""`generate`, `chat` and `tune` over a scripted runtime: what is printed, and what ends what."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgespec.bundle import SCHEMA
from edgespec.cli import main
from edgespec.runtime import session
from tests.helpers.checkpoints import edit_json
from tests.helpers.fake_runtime import SAYS
from tests.helpers.talking import program, talking

ROOT = Path(__file__).parent.parent
SAID = "".join(chr(token - 3 + ord("!")) for token in SAYS)  # the tiny vocabulary: 3 controls, then letters


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(talking(tmp_path_factory.mktemp("chat") / "x.bundle").path)


@pytest.fixture
def speaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """Set how the runtime behaves and what is typed."""

    def set_up(how: str, typed: str = "") -> None:
        made = program(tmp_path / "runtime", how)
        monkeypatch.setattr(session, "binary", lambda note, form: made)
        typed_bytes = typed.encode("utf-8", "surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed_bytes), encoding="utf-8"))

    return set_up


def test_a_conversation_through_a_pipe(
    bundle: str, speaks: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    speaks("well", "hello\n\n/reset\nagain\n/quit\nnever said\n")
    assert main(["chat", bundle, "-q"]) == 0
    assert capsys.readouterr() == (f"{SAID}\n{SAID}\n", "")


def test_json_is_one_object_a_turn(
    bundle: str, speaks: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    speaks("well", "hello\nagain")
    assert main(["chat", bundle, "-q", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(a["text"], a["ended"]) for a in answers] == [(SAID, "length")] * 2


def test_a_line_that_is_no_text_is_told_and_the_talk_goes_on(
    bundle: str, speaks: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    speaks("well", "a\udcff\nhello\n")
    assert main(["chat", bundle, "-q"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{SAID}\n"
    assert err == "error: the text is not valid UTF-8\nhint:  type it in UTF-8\n"


@pytest.mark.parametrize("argv", [["chat", "{x}"], ["generate", "{x}", "hi"]], ids=["chat", "generate"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("dies", "error: the runtime ended with exit code 7: the last words\nhint:  run edgespec check"),
        ("killed", "error: the runtime was killed by signal 9\nhint:  not enough memory? try a smaller"),
    ],
)
def test_a_dead_runtime_ends_the_talk(
    bundle: str, speaks: Callable[..., None], capsys: pytest.CaptureFixture[str],
    argv: list[str], how: str, said: str,
) -> None:  # fmt: skip
    speaks(how, "hello\nagain\n")
    assert main([part.replace("{x}", bundle) for part in argv] + ["-q"]) == 2
    assert capsys.readouterr().err.startswith(said)


def test_a_refused_request_ends_generate_and_not_the_talk(
    bundle: str, speaks: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    refused = "error: not that\nhint:  something else\n"
    speaks("declines", "hello\nagain\n")
    assert main(["chat", bundle, "-q"]) == 0
    assert capsys.readouterr().err == refused * 2
    speaks("declines")
    assert main(["generate", bundle, "hi", "-q"]) == 2
    assert capsys.readouterr().err == refused


@pytest.mark.parametrize("command", [["chat"], ["generate", "hi"], ["tune"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda b: edit_json(b / "manifest.json", schema=99),
            f"was made by a newer edgespec (schema 99 > {SCHEMA})",
        ),
        (lambda b: os.truncate(b / "target.weights", 3), "target.weights has 3 bytes, not 14"),
        (
            lambda b: (b / "graphs/target_verify_2_8.onnx").replace(b / "graphs/target_verify_4_8.onnx"),
            "graphs/target_verify_2_8.onnx is missing",
        ),
        (
            lambda b: (b / "target.weights").write_text("Target.weights"),
            "target.weights does not match its checksum",
        ),
    ],
    ids=["newer", "cut", "renamed", "changed"],
)
def test_a_bundle_that_is_not_as_it_was_made(
    bundle: str, speaks: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    command: list[str], damage: Callable[[Path], Any], said: str,
) -> None:  # fmt: skip
    speaks("well")
    shutil.copytree(bundle, tmp_path / "b")
    damage(tmp_path / "b")
    assert main([command[0], str(tmp_path / "b"), *command[1:], "-q"]) == 2
    out, err = capsys.readouterr()
    assert said in err and "\nhint:  " in err and out == ""


@pytest.fixture
def talk(bundle: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    made = program(tmp_path / "runtime", "slow")
    code = (  # a shell that starts the tests in the background lets its children ignore SIGINT
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pathlib import Path; from edgespec.runtime import session\n"
        f"session.binary = lambda note, form: Path({str(made)!r})\n"
        "from edgespec.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "chat", bundle, "-q"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=environment) as process:
        yield process
        process.kill()


def interrupt(process: subprocess.Popen[str], number: int) -> None:
    """Say something, and signal the program once the answer has begun."""
    assert process.stdin and process.stdout
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.read(1) == SAID[0]
    process.send_signal(number)


def test_ctrl_c_ends_the_answer_and_not_the_talk(talk: subprocess.Popen[str]) -> None:
    assert talk.stdout
    for _ in range(2):
        interrupt(talk, signal.SIGINT)
        assert re.fullmatch(f"[{re.escape(SAID)}]* \\[interrupted]\n", talk.stdout.readline())
    out, err = talk.communicate("/quit\n", timeout=30)
    assert (out, err, talk.returncode) == ("", "", 0)


def test_a_kill_ends_the_talk(talk: subprocess.Popen[str]) -> None:
    """It was taken for a Ctrl-C."""
    interrupt(talk, signal.SIGTERM)
    assert talk.wait(30) == 130


def test_generate_streams_and_traces(
    bundle: str, speaks: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    speaks("well")
    trace = tmp_path / "t.jsonl"
    assert main(["generate", bundle, "hi", "-q", "--trace", str(trace)]) == 0
    assert capsys.readouterr() == (f"{SAID}\n", "")
    events = [json.loads(line)["event"] for line in trace.read_text().splitlines()]
    assert events == ["prompt", *["round"] * len(SAYS)]


def test_every_setting_reaches_the_runtime(
    bundle: str, speaks: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "max_new_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125,
        "repetition_penalty": 1.5, "seed": 8, "drafter": "ngram", "stop_rule": "fixed", "draft_tokens": 2,
    }  # fmt: skip
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    speaks("well")
    assert main(["generate", bundle, "hi", "-q", "--json", *flags]) == 0
    echo = json.loads(capsys.readouterr().out)["stats"]["echo"]
    assert {name: echo[name] for name in given} == given
    speaks("well")
    assert main(["generate", bundle, "hi", "-q", "--json", "--no-draft"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["echo"]["drafter"] == "none"


def test_generate_in_the_bundle_itself(
    bundle: str, speaks: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.` has no name to put a table's name behind."""
    speaks("well")
    monkeypatch.chdir(bundle)
    assert main(["generate", ".", "hi", "-q"]) == 0


@pytest.mark.parametrize(
    ("prompt", "flags", "said"),
    [
        (
            "hi",
            ["--trace", "{x}"],
            "error: {x} cannot be written: Is a directory\nhint:  give another file\n",
        ),
        ("a\udcff", [], "error: the text is not valid UTF-8\n"),
    ],
)
def test_what_generate_refuses(
    bundle: str, speaks: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    prompt: str, flags: list[str], said: str,
) -> None:  # fmt: skip
    speaks("well")
    assert main(["generate", bundle, prompt, "-q", *(f.replace("{x}", str(tmp_path)) for f in flags)]) == 2
    out, err = capsys.readouterr()
    assert said.replace("{x}", str(tmp_path)) in err and out == ""


def test_tune_writes_its_table_whatever_lies_there(
    bundle: str, speaks: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The runtime refused a table of other widths, and said to tune, which opened it with that table."""
    table = Path(f"{bundle}.tune.json")
    table.write_text("{}")
    speaks("well")
    started = tmp_path / "runtime"
    log = tmp_path / "arguments"
    started.write_text(started.read_text().replace("exec", f'echo "$@" >> {log}\nexec', 1))
    assert main(["tune", bundle, "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(table)
    written = json.loads(table.read_text())
    assert written["verify"] == {"1": 2.0} and written["threads"] == 1 and written["cpu"]
    assert main(["generate", bundle, "hi", "-q", "--threads", "2"]) == 0
    table.unlink()
    opened = [line.split() for line in log.read_text().splitlines()]
    assert opened == [["--bundle", bundle], ["--bundle", bundle, "--threads", "2", "--table", str(table)]]
