"""The command line as a table: what is typed, the exit code, and what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgespec.cli
import edgespec.console
from edgespec.cli import main
from edgespec.config import InspectConfig
from edgespec.errors import MismatchError
from tests.helpers.bundles import make

ROOT = Path(__file__).parent.parent

TABLE = [
    ([], 2, "error: the following arguments are required: COMMAND\nhint:  see edgespec --help\n"),
    (["fly"], 2, "error: argument COMMAND: invalid choice: 'fly'"),
    (
        ["export"],
        2,
        "are required: TARGET, -o/--output\nhint:  see edgespec export --help\n",
    ),
    (["export", "demo", "-o", "{x}", "--extra", "1"], 2, "error: unrecognized arguments: --extra 1\n"),
    (["export", "demo", "-o", "{x}", "--budg", "64"], 2, "error: unrecognized arguments: --budg 64\n"),
    (
        ["export", "demo", "-o", "{x}", "--budget", "many"],
        2,
        "error: argument --budget: invalid int value: 'many'",
    ),
    (["export", "demo", "-o", "{x}", "--widths", "2,x"], 2, "'2,x' is not a list of numbers such as 2,4,8\n"),
    (["export", "demo", "-o", "{x}", "--weights", "int3"], 2, "argument --weights: invalid choice: 'int3'"),
    (
        ["export", "demo", "-o", "{x}", "--block", "2048"],
        2,
        "error: block 2048 is larger than budget 1024\nhint:  use --block 512, or --budget 2048\n",
    ),
    (
        ["export", "demo", "-o", "{x}", "--widths", "2,256"],
        2,
        "error: width 256 is larger than block 128\nhint:  use --block 256 or more, or narrower --widths\n",
    ),
    (
        ["export", "/nowhere", "-o", "{x}"],
        2,
        "error: target '/nowhere' does not exist\nhint:  give a model folder, a .gguf file",
    ),
    (
        ["export", "demo", "-o", "{x}/deep/y"],
        2,
        "where the bundle should go, is not a folder\nhint:  mkdir -p ",
    ),
    (["inspect", "{x}"], 2, "error: no bundle at {x}\nhint:  make one: edgespec export TARGET -o {x}\n"),
    (["check", "{x}"], 2, "error: no bundle at {x}\n"),
    (["check", "{x}", "--npu", "tpu"], 2, "argument --npu: invalid choice: 'tpu'"),
    (
        ["check", "{x}", "--soc", "8-elite"],
        2,
        "error: soc 8-elite is given without npu\nhint:  add --npu qualcomm\n",
    ),
    (
        ["check", "{x}", "--npu", "qualcomm", "--soc", "8-elite,888"],
        2,
        "error: unknown soc '888'\nhint:  use one of: 8-gen-2, 8-gen-3, 8-elite, 8-elite-gen-5\n",
    ),
    (["eval", "{x}"], 2, "are required: -o/--output\nhint:  see edgespec eval --help\n"),
    (["eval", "{x}", "-o", "{x}.out"], 2, "error: no bundle at {x}\n"),
    (
        ["eval", "{x}", "-o", "{x}.out", "--policies", "keydiff,fly"],
        2,
        "error: unknown policy 'fly'\nhint:  use one of: ",
    ),
    (
        ["eval", "{x}", "-o", "{x}.out", "--tasks", "fly"],
        2,
        "error: unknown task 'fly'\nhint:  use one of: text, ",
    ),
    (["eval", "{x}", "-o", "{x}.out", "--budgets", "0"], 2, "error: budgets 0 is not 1 to 99\n"),
    (["bench", "{x}"], 2, "are required: -o/--output\nhint:  see edgespec bench --help\n"),
    (["bench", "{x}", "-o", "{x}.json"], 2, "error: no bundle at {x}\n"),
    (
        ["bench", "{x}", "-o", "{x}/no/r.json"],
        2,
        "error: {x}/no, where output should go, is not a folder\nhint:  mkdir -p {x}/no\n",
    ),
    (
        ["bench", "{x}", "-o", "{x}.json", "--profile", "snapdragon-8-elit"],
        2,
        "error: no profile is called 'snapdragon-8-elit'\nhint:  did you mean snapdragon-8-elite or ",
    ),
    (["bench", "{x}", "-o", "{x}.json", "--rounds", "0"], 2, "error: rounds 0 is not 1 to 1000\n"),
    (["bench", "{x}", "-o", "{x}.json", "--prompts", "{x}"], 2, "error: prompts '{x}' is not a file\n"),
    (["bench", "{x}", "-o", "{x}.json", "--suite", "fly"], 2, "argument --suite: invalid choice: 'fly'"),
    (["compare", "{x}"], 2, "are required: NEW\nhint:  see edgespec compare --help\n"),
    (
        ["compare", "{x}", "{x}"],
        2,
        "error: report {x} cannot be read: No such file or directory\nhint:  make it again: edgespec bench",
    ),
    (
        ["recommend", "{x}"],
        2,
        "are required: --artists, --bundle, -o/--output\nhint:  see edgespec recommend --help\n",
    ),
    (
        ["recommend", "{x}", "--artists", "{x}", "--bundle", "{x}", "-o", "{x}.out"],
        2,
        "error: posts '{x}' is not a file\nhint:  give a file of JSON lines\n",
    ),
    (["generate", "{x}", "hello"], 2, "error: no bundle at {x}\n"),
    (["generate", "{x}", ""], 2, "error: the prompt is empty\n"),
    (
        ["generate", "{x}", "a", "--max-new-tokens", "0"],
        2,
        "error: max_new_tokens 0 is not 1 to 1048576\nhint:  use another --max-new-tokens\n",
    ),
]


@pytest.mark.parametrize(
    ("argv", "code", "said"), TABLE, ids=[" ".join(row[0]) or "nothing" for row in TABLE]
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, said: str
) -> None:
    x = str(tmp_path / "x")
    assert main([part.replace("{x}", x) for part in argv]) == code
    out, err = capsys.readouterr()
    assert said.replace("{x}", x) in err
    assert out == ""
    error, hint = err.splitlines()[-2:]
    assert error.startswith("error: ") and hint.startswith("hint:  ") and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from edgespec.cli import main\n"
        "try: main(['export', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "heavy = {'torch', 'transformers', 'onnx', 'numpy', 'rich', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)  # the files hold no graphs: count from the manifest alone
    bundle = make(tmp_path / "x.bundle")
    assert main(["inspect", str(bundle.path), "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert found["schema"] == "edgespec.inspect/1"
    target, draft = found["models"]
    # 2 parts x 2 layers x 2 heads x (16 + 4 + 3) rows x 8 x 4 bytes; the draft 1 layer, 15 rows.
    assert (target["bytes_kv"], draft["bytes_kv"]) == (2 * 2 * 2 * 23 * 8 * 4, 2 * 1 * 2 * 15 * 8 * 4)
    assert (target["bytes_weights"], draft["bytes_weights"]) == (len("target.weights"), len("draft.weights"))
    verify = next(g for g in found["graphs"] if (g["kind"], g["width"], g["bucket"]) == ("verify", 4, 8))
    assert verify["bytes_kv"] == 2 * 2 * 2 * 15 * 8 * 4
    # tokens 4, position, count; logits 4 x 100, argmax 4; all of 4 bytes.
    assert verify["bytes_io"] == 4 * (4 + 1 + 1 + 400 + 4)
    assert (verify["nodes"], verify["ops"], verify["bytes_weights"]) == (None, None, None)
    assert found["bytes_disk"] == sum(entry.bytes for entry in bundle.manifest.files.values())
    graphs = sum(entry.bytes for name, entry in bundle.manifest.files.items() if name.startswith("graphs/"))
    weights = len("target.weights") + len("draft.weights")
    caches = target["bytes_kv"] + draft["bytes_kv"]
    assert found["bytes_memory"] == weights + graphs + caches + found["bytes_io"]

    assert main(["inspect", str(bundle.path)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{bundle.path} for cpu\n")
    assert out.count("verify") == 4 and "int4" in out
    assert err.endswith(f"next: edgespec check {bundle.path}\n")


def test_inspect_of_a_file_that_is_no_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    bundle = make(tmp_path / "x.bundle")
    assert main(["inspect", str(bundle.path), "-q"]) == 2
    assert "is not an ONNX graph" in capsys.readouterr().err


def run_as(monkeypatch: pytest.MonkeyPatch, fault: BaseException) -> int:
    """The exit code of a command that ends so."""

    def command(*args: object) -> int:
        raise fault

    monkeypatch.setattr(edgespec.cli, "COMMANDS", ((command, InspectConfig),))
    return main(["command", "x"])


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_as(monkeypatch, MismatchError("they differ", "look")) == 1
    assert capsys.readouterr().err == "error: they differ\nhint:  look\n"
    assert run_as(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.startswith("error: interrupted\n")
    assert run_as(monkeypatch, ZeroDivisionError("oops")) == 101
    assert "error: ZeroDivisionError: oops (a bug of edgespec)\nhint:  report it" in capsys.readouterr().err


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    bundle = make(tmp_path / "x.bundle")
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; sys.modules['onnx'] = None; from edgespec.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "inspect", str(bundle.path), "-q"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make(tmp_path / "x.bundle")

    def load(name: str, *args: object, **more: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(edgespec.console, "import_module", load)
    assert main(["check", str(bundle.path), "-q"]) == 2
    assert capsys.readouterr().err == "error: torch is not installed\nhint:  pip install 'edgespec[export]'\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["check", "{x}", "--npu", "qualcomm"],
        ["export", "demo", "-o", "{y}", "--device", "npu", "--soc", "8-elite"],
    ],
)
def test_a_missing_compiler_is_named_before_any_slow_step(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    bundle = make(tmp_path / "x.bundle", "npu")
    for name in [n for n in sys.modules if n.startswith("edgespec.exporters.") and n.endswith("qualcomm")]:
        monkeypatch.delitem(sys.modules, name)
    if package := sys.modules.get("edgespec.exporters"):  # which holds what it imported, too
        monkeypatch.delattr(package, "qualcomm", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    places = {"{x}": str(bundle.path), "{y}": str(tmp_path / "y.bundle")}
    assert main([places.get(word, word) for word in argv] + ["-q"]) == 2
    said = "error: onnxruntime_qnn is not installed\nhint:  pip install 'edgespec[qnn]'\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "y.bundle").exists()
