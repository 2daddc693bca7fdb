"""`edgespec bench` and `compare` on a tiny bundle through the native runtime, as a user types them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import edgespec.bench
from edgespec import console
from edgespec.bench_report import PLAIN, SPECULATIVE, read, write
from edgespec.cli import main
from edgespec.config import ExportConfig
from edgespec.exporters import export
from edgespec.progress import Progress
from edgespec.runtime.build import binary
from edgespec.runtime.engine import Engine
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory

PROMPTS = ["hello hello hello", "well well well well", "a b c a b c a b c", "help"]
DEVICES = ["snapdragon-8-elite", "tensor-g5"]
LIMITS = ["--tokens", "12", "--threads", "1", "--profile", ",".join(DEVICES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles of one model, and a file of prompts; the second bundle has a wider verify graph too."""
    made = tmp_path_factory.mktemp("bench")
    source = str(write_directory(made / "model", tiny.model("llama")))
    binary(print)
    for name, widths in (("a", (2, 4)), ("b", (2, 4, 8))):
        config = ExportConfig(
            source, str(made / f"{name}.bundle"), draft=source, weights="fp32", budget=48, block=16,
            draft_budget=32, widths=widths, sinks=2, recent=4,
        )  # fmt: skip
        export(config, Progress(quiet=True), Engine)
    lines = [json.dumps({"prompt": text, "category": "xy"[i % 2]}) for i, text in enumerate(PROMPTS)]
    (made / "prompts.jsonl").write_text("\n".join(lines))
    return made


def bench(folder: Path, output: Path, *more: str) -> int:
    words = ["bench", str(folder / "a.bundle"), "--prompts", str(folder / "prompts.jsonl"), *LIMITS]
    return main([*words, "-o", str(output), *more])


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """A report of the first bundle."""
    assert bench(folder, folder / "base.json", "--rounds", "1", "-q") == 0
    return folder / "base.json"


def test_a_report_holds_what_was_measured(base: Path) -> None:
    report = read(base)
    assert [(s.prompt, s.way) for s in report.samples[:4]] == [
        ("x/1", PLAIN), ("x/1", SPECULATIVE), ("y/1", SPECULATIVE), ("y/1", PLAIN),
    ]  # fmt: skip
    assert len(report.samples) == 4 * 2
    assert [t.device for t in report.traces] == [*[""] * 4, *DEVICES[:1] * 4, *DEVICES[1:] * 4]
    assert report.settings.prompts == 4 and report.settings.suite == "prompts.jsonl"
    assert {s.tokens_new for s in report.samples} == {12}
    texts: dict[str, set[str]] = {}
    for s in report.samples:
        texts.setdefault(s.prompt, set()).add(s.text_sha256)
        assert s.time_decode_s > 0 and s.time_first_token_s > 0 and s.bytes_memory > 2**20
    assert all(len(found) == 1 for found in texts.values())
    assert [(p.profile, p.decided_by) for p in report.predicted] == [(n, "this profile") for n in DEVICES]
    assert all(p.tokens_per_s > 0 and set(p.categories) == {"x", "y"} for p in report.predicted)
    prompt, *rounds = report.traces[0].events
    assert (prompt["event"], prompt["stop_rule"], prompt["known"]) == ("prompt", "cost", 0)
    assert sum(len(r["tokens"]) for r in rounds) == 12
    assert not base.with_name("base.json.part").exists()


def test_a_report_compares_with_itself(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(base), str(base)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[-1].startswith("passed: ") and "unchanged" in lines[-1] and "regression" not in out


def test_a_run_that_was_stopped_goes_on(
    folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, real, left = folder / "stopped.json", edgespec.bench.answer, [7]

    def answer(*words: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*words)

    monkeypatch.setattr(edgespec.bench, "answer", answer)
    assert bench(folder, output, "--rounds", "2", "-q") == 130
    capsys.readouterr()
    part = output.with_name("stopped.json.part")
    head, *entries = part.read_text().splitlines()
    assert len(entries) == 2 and not output.exists()  # of 7 answers, 2 warmed up and one was half of a pair
    part.write_text("\n".join([head, *entries, entries[0][:40]]))  # a killed run's last line
    assert bench(folder, output, "--rounds", "3", "-q") == 2
    assert capsys.readouterr().err == (
        f"error: {part}, of a benchmark that was stopped, has another rounds: 2, not 3\n"
        f"hint:  remove {part}, or choose another output with -o\n"
    )
    left[0] = 10**6
    assert bench(folder, output, "--rounds", "2", "-q") == 0
    # What lacked, a warm-up of both ways each round, and once for each device.
    assert 10**6 - left[0] == 4 * 2 * 2 - 4 + 2 * 2 + 2 * 4
    report = read(output)
    assert report.run == json.loads(head)["run"] and len(report.samples) == 16
    assert [s.round for s in report.samples] == [0] * 8 + [1] * 8
    assert not part.exists()
    assert report.traces == tuple(
        replace(t, events=a.events) for t, a in zip(read(base).traces, report.traces, strict=True)
    )


def test_a_damaged_record_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = folder / "damaged.json.part"
    part.write_text("{}\n")
    assert bench(folder, folder / "damaged.json", "-q") == 2
    assert f"error: {part} is damaged: 'schema'\nhint:  remove {part}" in capsys.readouterr().err


def test_two_bundles_take_turns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, html = folder / "new.json", folder / "new.html"
    against = ["--against", str(folder / "b.bundle"), "--rounds", "1", "--html", str(html)]
    assert bench(folder, output, *against) == 0
    out, err = capsys.readouterr()
    assert "Predicted, by replay of the traces" in out and "tensor-g5" in out
    assert err.splitlines()[-1] == f"next: edgespec compare {folder / 'new.base.json'} {output}"
    base, new = read(folder / "new.base.json"), read(output)
    assert base.run == new.run and base.bundle.name == "b.bundle" and new.bundle.name == "a.bundle"
    assert len(base.samples) == len(new.samples) == 8
    assert html.read_text().count("<svg") == 6
    # The new bundle lacks the base's widest graph: another bundle.
    assert main(["compare", str(folder / "new.base.json"), str(output)]) == 2
    assert (
        "graph target verify 8, budget 48 is there in the base and missing in the new one"
        in capsys.readouterr().err
    )
    # The other way round a graph was added, which nothing is measured against.
    assert main(["compare", str(output), str(folder / "new.base.json"), "--json"]) in (0, 1)
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == "edgespec.verdict/1"
    measured = [r for r in data["rows"] if r["metric"].endswith("s/token")]
    assert {r["reason"] for r in measured} == {"1 pairs, fewer than 8"}


def test_a_base_with_a_binary_of_its_own(folder: Path) -> None:
    program = str(binary(print))
    assert bench(folder, folder / "own.json", "--against-binary", program, "--rounds", "1", "-q") == 0
    assert read(folder / "own.json").run == read(folder / "own.base.json").run


def test_the_gate_replays_on_the_devices_asked_for(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(base), str(base), "--json"]
    for more, devices in (
        ([], {"snapdragon-8-elite", "tensor-g5"}),
        (["--profile", "exynos-2400"], {"exynos-2400"}),
    ):
        assert main([*words, *more]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert {r["metric"].split(":")[0] for r in rows if r["kind"] == "predicted"} == devices


def test_a_device_that_is_unknown_here_is_left_out(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = read(base)
    write(replace(report, predicted=(replace(report.predicted[0], profile="my-phone"),)), tmp_path / "x.json")
    assert main(["compare", str(tmp_path / "x.json"), str(base)]) == 0
    assert capsys.readouterr().err == (
        "my-phone is left out: no profile is called 'my-phone'; give its file to --profile\n"
    )


def heavier(base: Path, path: Path) -> None:
    """The report of a bundle whose decode graph reads one byte more."""
    report = read(base)
    target, *rest = report.counted
    steps = tuple(
        replace(s, figures={**s.figures, "bytes_weights": s.figures["bytes_weights"] + (s.kind == "decode")})
        for s in target.steps
    )
    write(replace(report, counted=(replace(target, steps=steps), *rest)), path)


def test_a_byte_more_fails_the_gate_in_every_rendering(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new, summary = tmp_path / "new.json", tmp_path / "summary.md"
    heavier(base, new)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    files = ["--markdown", str(tmp_path / "x.md"), "--junit", str(tmp_path / "x.xml")]
    assert main(["compare", str(base), str(new), "--github", *files]) == 1
    out, _ = capsys.readouterr()
    first = out.splitlines()[0]
    assert first.startswith("::error title=edgespec regression::target decode 1, budget 48: weights a call: ")
    assert all(line.startswith("::") for line in out.splitlines())
    assert summary.read_text() == (tmp_path / "x.md").read_text()
    assert summary.read_text().startswith("### edgespec: failed: ")
    suite = ElementTree.parse(tmp_path / "x.xml").getroot()
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert "target decode 1, budget 48: weights a call" in failed
    # The same bytes on a phone: plain decoding of the base's own trace became slower.
    assert "tensor-g5: plain decoding" in failed and f"{len(failed)}" == suite.get("failures")
    assert main(["compare", str(new), str(base), "-q"]) == 0  # a byte less is an improvement
    assert "improvement" in capsys.readouterr().out


REFUSED = [
    (["--fail-over", "much"], "error: fail_over 'much' is no percentage\nhint:  write a percentage such as"),
    (["--fail-over", "300%"], "error: fail_over 300% is more than 100 %\n"),
    (
        ["--markdown", "{x}/no/y.md"],
        "error: {x}/no, where markdown should go, is not a folder\nhint:  mkdir -p",
    ),
    (["--junit", "{x}"], "error: junit '{x}' is a folder\nhint:  give a file to --junit\n"),
]


@pytest.mark.parametrize(("more", "said"), REFUSED, ids=[r[0][0] + r[0][1] for r in REFUSED])
def test_bad_usage_exits_with_2(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    x = str(tmp_path)
    assert main(["compare", str(base), str(base), *(word.replace("{x}", x) for word in more)]) == 2
    assert said.replace("{x}", x) in capsys.readouterr().err


def test_prompts_that_do_not_fit_are_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "hello"}\n{"prompt": "%s"}\n' % ("word " * 400))
    words = ["bench", str(folder / "a.bundle"), "--prompts", str(path), "--rounds", "1", *LIMITS]
    assert main([*words, "-o", str(tmp_path / "x.json"), "-q"]) == 0
    (left_out,) = read(tmp_path / "x.json").left_out
    assert left_out.startswith("long/2 is left out: ") and "positions" in left_out
    path.write_text('{"prompt": "%s"}\n' % ("word " * 400))
    assert main([*words, "-o", str(tmp_path / "y.json"), "-q"]) == 2
    assert "error: no prompt could be answered: long/1 is left out" in capsys.readouterr().err
    assert not (tmp_path / "y.json").exists()


def test_eval_of_drafts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A draft that is its target is always right: every rule of one length emits what it can."""
    words = ["eval", str(folder / "b.bundle"), "--speculation", "--prompts", str(folder / "prompts.jsonl")]
    words += ["--tokens", "13", "--threads", "1", "-q", "--temperatures", "0,1", "-o", str(tmp_path / "out")]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {(r["drafter"], r["stop_rule"], r["draft_tokens"], r["temperature"], r["category"]): r
            for r in told["rows"]}  # fmt: skip
    assert {key[:3] for key in rows} == {
        ("ngram", "cost", 0), ("both", "cost", 0), ("draft", "cost", 0), ("draft", "adaedl", 0),
        ("draft", "confidence", 0), *(("draft", "fixed", n) for n in (1, 2, 4, 7)),
    }  # fmt: skip
    assert {key[3:] for key in rows} == {(t, c) for t in (0.0, 1.0) for c in ("all", "x", "y")}
    for n in (1, 2, 4):
        row = rows["draft", "fixed", n, 0.0, "all"]
        assert row["acceptance"][0] > 0.9 and n <= row["block_efficiency"] <= n + 1
        assert row["mbsu"] == pytest.approx(row["block_efficiency"] / (1 + row["c"] * row["gamma"]))
    assert all(row["texts_different"] == 0 for row in rows.values())
    before = (tmp_path / "out" / "speculation.jsonl").read_text()
    assert main(words) == 0  # nothing is left to answer; the table from the record
    assert (tmp_path / "out" / "speculation.jsonl").read_text() == before
    text = capsys.readouterr().out
    assert (
        "greedy texts that differ from plain decoding's: 0" in text and "draft cost at 0, by category" in text
    )
    saved = json.loads((tmp_path / "out" / "speculation.json").read_text())
    assert saved["rows"] == told["rows"] and saved["schema"] == "edgespec.speculation/1"


def test_the_same_draft_with_its_whole_head_beside(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are measured in turns; a whole head accepts all, a trimmed one reads less."""
    source = str(folder / "model")
    given = dict(weights="fp32", budget=48, block=16, sinks=2, recent=4, widths=(2, 4))
    for name, more in (
        ("trimmed", {"draft_rows": 262, "context_rows": 0}),
        ("other", {"draft_budget": 48, "block": 8}),
    ):
        how = {**given, "draft": source, "draft_budget": 32, **more}
        export(ExportConfig(source, str(tmp_path / f"{name}.bundle"), **how), Progress(quiet=True), Engine)  # type: ignore[arg-type]
    words = ["eval", str(tmp_path / "trimmed.bundle"), "--prompts", str(folder / "prompts.jsonl")]
    words += ["--speculation", "--temperatures", "0", "--tokens", "13", "--threads", "1", "-q"]
    both = [*words, "--beside", str(folder / "b.bundle"), "-o", str(tmp_path / "out")]
    assert main([*both, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {(r["bundle"], r["drafter"], r["stop_rule"], r["draft_tokens"]): r
            for r in told["rows"] if r["category"] == "all"}  # fmt: skip
    trimmed, whole = (rows[f"{name}.bundle", "draft", "fixed", 2] for name in ("trimmed", "b"))
    assert whole["acceptance"][0] > trimmed["acceptance"][0] and whole["c"] > trimmed["c"]
    assert all(r["texts_different"] == 0 for r in told["rows"])
    (ratio,) = (
        r for r in told["ratios"] if (r["category"], r["stop_rule"], r["draft_tokens"]) == ("all", "fixed", 2)
    )
    assert (ratio["mbsu"], ratio["mbsu_beside"]) == (trimmed["mbsu"], whole["mbsu"])
    assert ratio["ratio"] == pytest.approx(trimmed["mbsu"] / whole["mbsu"])
    assert {r["drafter"] for r in told["ratios"]} == {"draft", "both"}
    assert main(both) == 0  # from the record
    table = capsys.readouterr().out
    assert "MBSU of both" in table and f"{ratio['ratio']:.3f}" in table
    for name, message in (
        ("other", "has another target than"),
        ("trimmed", "both bundles are named"),
        ("none", "no bundle at"),
    ):
        assert main([*words, "--beside", str(tmp_path / f"{name}.bundle"), "-o", str(tmp_path / "no")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "no").exists()


BESIDE = [
    "--speculation",
    "--baseline",
    "transformers",
    "--tokens",
    "13",
    "--threads",
    "1",
    "--temperatures",
    "0",
]


def test_the_baseline_stands_in_the_same_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(folder / "b.bundle"), "--prompts", str(folder / "prompts.jsonl"), *BESIDE]
    words += ["--source", str(folder / "model"), "--draft-source", str(folder / "model")]
    words += ["-o", str(tmp_path / "out"), "-q"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    theirs = {r["category"]: r for r in told["rows"] if r["drafter"] == "transformers"}
    ours = next(r for r in told["rows"] if (r["drafter"], r["stop_rule"]) == ("draft", "confidence"))
    assert {*theirs} == {"all", "x", "y"} and {*theirs["all"]} == {*ours}
    row = theirs["all"]
    assert (row["prompts"], row["c"], row["stop_rule"], row["temperature"]) == (4, ours["c"], "confidence", 0)
    assert row["mbsu"] == pytest.approx(row["block_efficiency"] / (1 + row["c"] * row["gamma"]))
    # The draft is the target: all that it drafts is accepted.
    assert row["acceptance"][0] == 1 and row["block_efficiency"] == pytest.approx(1 + row["gamma"])
    assert "at most 20 drafts, confidence 0.4" in told["facts"]["transformers"]
    before = (tmp_path / "out" / "transformers.jsonl").read_text()
    assert main(words) == 0
    assert (tmp_path / "out" / "transformers.jsonl").read_text() == before
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("b.bundle  transformers")]
    assert f"{row['block_efficiency']:.2f}" in line


def test_a_baseline_without_its_checkpoints(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", str(folder / "b.bundle"), *BESIDE, "-o", str(tmp_path / "out"), "-q"]
    here = ["--source", str(folder / "model")]
    other = str(write_directory(tmp_path / "other", tiny.model("llama", 1)))
    for more, error, hint in (
        ([], "the target's checkpoint model is not here", "name it with --source"),
        (here, "the draft's checkpoint model is not here", "name it with --draft-source"),
        (["--source", other], "is not the checkpoint that this bundle's target came from", "--source"),
        (["--source", str(tmp_path / "none")], "source", ""),
    ):
        assert main([*words, *more]) == 2
        told = capsys.readouterr().err
        assert error in told and hint in told and len(told.splitlines()) == 2, told
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(console, "import_module", missing_torch)
    assert main(words) == 2 and not (tmp_path / "out").exists()
    assert "error: torch is not installed\nhint:  pip install 'edgespec[export]'" in capsys.readouterr().err
    assert main(["eval", str(folder / "b.bundle"), *BESIDE[1:], "-o", str(tmp_path / "out"), "-q"]) == 2
    assert "hint:  add --speculation" in capsys.readouterr().err


def missing_torch(name: str) -> None:
    raise ModuleNotFoundError(f"No module for {name}", name="torch")


@pytest.mark.parametrize("given", ["0,0", "hot", "-1", "nan"])
def test_temperatures_that_are_none(folder: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    words = ["eval", str(folder / "b.bundle"), "--speculation", f"--temperatures={given}"]
    assert main([*words, "-o", str(folder / "no"), "-q"]) == 2
    assert f"temperatures {given} are no numbers from 0 to 100" in capsys.readouterr().err
    assert not (folder / "no").exists()
