"""Sessions over the native runtime: text is the model's own, through turns, cuts and snapshots."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgespec.bundle import Bundle
from edgespec.config import ExportConfig
from edgespec.errors import BackendError, InputError
from edgespec.exporters import export
from edgespec.exporters.checkpoint import open_checkpoint
from edgespec.progress import Progress
from edgespec.runtime.build import binary
from edgespec.runtime.engine import Engine
from edgespec.runtime.process import Process
from edgespec.runtime.session import Runtime, Settings
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory

TEXT = "the quick brown fox jumps over the lazy dog and the quick brown fox sleeps"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("session") / "model", tiny.model("llama"))


@pytest.fixture(scope="module")
def opened(source: Path) -> Iterator[Callable[..., Runtime]]:
    """Runtimes over bundles of the tiny model, one for each way of exporting."""
    binary(print)
    made: dict[str, Runtime] = {}

    def get(**more: Any) -> Runtime:
        name = "-".join(f"{k}={v}" for k, v in more.items()).replace("(", "").replace(")", "") or "plain"
        name = name.replace(", ", ".").replace(" ", "")
        if name not in made:
            given: dict[str, Any] = {"budget": 48, "block": 16, "widths": (2, 4), "weights": "fp32", **more}
            config = ExportConfig(
                str(source), str(source.parent / f"{name}.bundle"), sinks=2, recent=4, **given
            )
            export(config, Progress(quiet=True), Engine)
            made[name] = Runtime.open(config.output, threads=1)
        return made[name]

    yield get
    for runtime in made.values():
        runtime.close()


def say(runtime: Runtime, ids: list[int], **how: Any) -> list[int]:
    session = runtime.session()
    session.generate(ids, replace(Settings(max_new_tokens=40), **how))
    tokens = session.tokens
    session.close()
    return tokens[len(ids) :]


def cut(tokens: list[int], stops: set[int]) -> list[int]:
    at = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: at + 1]


def test_greedy_text_is_transformers_own(source: Path, opened: Callable[..., Runtime]) -> None:
    runtime = opened(policy="none", budget=96)
    model, stops = open_checkpoint(str(source)).load_model(), set(runtime.bundle.manifest.tokenizer.stop_ids)
    for prompt in ("hello there", "x", TEXT):
        ids = runtime.encode_raw(prompt)
        wanted = list(ids)
        with torch.no_grad():
            for _ in range(20):
                wanted.append(int(model(torch.tensor([wanted])).logits[0, -1].argmax()))
        for drafter in ("none", "ngram"):
            assert say(runtime, ids, drafter=drafter, max_new_tokens=20) == cut(wanted[len(ids) :], stops)


def oracle(bundle: Bundle, ids: list[int], count: int) -> list[int]:
    """Plain decoding by the engine that `check` compares with PyTorch."""
    engine, stops = Engine(bundle.path, bundle.model("target"), 1), set(bundle.manifest.tokenizer.stop_ids)
    out = [int(engine.prefill(ids).argmax())]
    while len(out) < count and out[-1] not in stops:
        out.append(engine.step(out[-1]))
    return out


SMALL: dict[str, Any] = {"draft": "demo", "draft_budget": 32, "draft_rows": 200}
CELLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"policy": "keydiff", **SMALL}, {"drafter": "both", "stop_rule": "cost"}),
    ({"policy": "keydiff", **SMALL}, {"drafter": "draft", "stop_rule": "fixed"}),
    ({"policy": "keydiff", **SMALL}, {"drafter": "draft", "stop_rule": "adaedl", "draft_tokens": 2}),
    ({"policy": "sinks", **SMALL}, {"drafter": "draft", "stop_rule": "confidence"}),
    ({"policy": "sinks", **SMALL}, {"drafter": "ngram", "stop_rule": "fixed"}),
    ({"policy": "keydiff", "weights": "int8", **SMALL}, {"drafter": "draft", "stop_rule": "fixed"}),
    ({"policy": "keydiff", "weights": "int8", **SMALL}, {"drafter": "ngram", "stop_rule": "fixed"}),
    ({"policy": "keydiff", "weights": "int4", **SMALL}, {"drafter": "both", "stop_rule": "fixed"}),
    ({"policy": "keydiff", "buckets": (16,), **SMALL}, {"drafter": "both", "stop_rule": "fixed"}),
    ({"policy": "none", "budget": 112, **SMALL}, {"drafter": "draft", "stop_rule": "fixed"}),
    ({"device": "npu", "weights": "fp16", **SMALL}, {"drafter": "draft", "stop_rule": "fixed"}),
    ({"device": "npu", "weights": "fp16", **SMALL}, {"drafter": "ngram", "stop_rule": "fixed"}),
]


@pytest.mark.parametrize(("bundle", "how"), CELLS, ids=lambda x: ",".join(map(str, x.values())))
def test_speculative_text_is_plain_text(
    opened: Callable[..., Runtime], bundle: dict[str, Any], how: dict[str, Any]
) -> None:
    runtime = opened(**bundle)
    for prompt in ("hello there", TEXT, TEXT[::-1], f"{TEXT} {TEXT[:30]}"):
        ids = runtime.encode_raw(prompt)[:80]
        plain = say(runtime, ids, drafter="none")
        assert say(runtime, ids, **how) == plain
        if runtime.bundle.model("target").widths_agree:
            assert plain == oracle(runtime.bundle, ids, 40)


def test_turns_cuts_and_snapshots(opened: Callable[..., Runtime], tmp_path: Path) -> None:
    runtime = opened(policy="keydiff", **SMALL)
    few = Settings(max_new_tokens=12)
    one = runtime.session()
    one.generate("first thing", few)
    first = list(one.tokens)
    one.snapshot(tmp_path / "a.snap")
    answer = one.generate("second thing", few)
    two = runtime.session()
    two.restore(tmp_path / "a.snap")
    assert two.tokens == first
    assert two.generate("second thing", few) == replace(answer, stats=two.answer.stats)
    assert two.messages == one.messages
    two.truncate(5)
    assert (
        say(runtime, two.tokens) == [*two.tokens, *two.generate([], Settings(max_new_tokens=40)).tokens][5:]
    )
    other = opened(policy="sinks", **SMALL).session()
    with pytest.raises(InputError, match="is of another bundle"):
        other.restore(tmp_path / "a.snap")
    content = bytearray((tmp_path / "a.snap").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.snap").write_bytes(content)
    with pytest.raises(InputError, match="checksum does not fit"):
        two.restore(tmp_path / "a.snap")


def test_an_early_reader_cancels_and_the_conversation_goes_on(opened: Callable[..., Runtime]) -> None:
    runtime = opened(policy="keydiff", **SMALL)
    session, ids = runtime.session(), runtime.encode_raw(TEXT)
    stream = session.stream(ids, Settings(max_new_tokens=5000))
    next(stream, None)
    stream.close()
    told = session.tokens[len(ids) :]
    session.generate([], Settings(max_new_tokens=20))
    rest = say(runtime, ids, max_new_tokens=len(told) + 20)
    assert session.tokens[len(ids) :] == rest


def test_stats_and_trace(opened: Callable[..., Runtime], tmp_path: Path) -> None:
    runtime = opened(policy="keydiff", **SMALL)
    session = runtime.session()
    with open(tmp_path / "t.jsonl", "w") as trace:
        how = Settings(max_new_tokens=30, drafter="draft", stop_rule="fixed")
        list(session.stream(TEXT, how, trace=trace))
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    stats = session.answer.stats
    rounds = [line for line in lines if line["event"] == "round"]
    assert lines[0]["event"] == "prompt" and lines[0]["tokens"] == stats["tokens_prompt"]
    assert sum(len(r["tokens"]) for r in rounds) == stats["tokens_new"]
    assert sum(r["drafted"] for r in rounds) == stats["tokens_drafted"] > 0
    assert sum(r["accepted"] for r in rounds) == stats["tokens_accepted"]
    calls = [c for line in lines for c in line["calls"]]
    assert sum(c[1] in ("verify", "decode") for c in calls if c[0] == "target") >= stats["verify_calls"]
    assert {c[1] for c in calls if c[0] == "draft"} <= {"prefill", "draft", "commit"}
    assert all(len(r["entropy"]) == r["drafted"] for r in rounds)
    assert sum(c[4] for c in calls) * 1e-6 == pytest.approx(stats["time_graphs_s"], rel=0.01)
    assert stats["tokens_new"] - 1 == pytest.approx(stats["block_efficiency"] * stats["verify_calls"])


def test_a_seed_repeats_and_another_differs(opened: Callable[..., Runtime]) -> None:
    runtime = opened(policy="keydiff", **SMALL)
    ids = runtime.encode_raw(TEXT)
    texts = [say(runtime, ids, temperature=1.0, top_p=0.95, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_p": 0.0}, "top_p must be from"),
        ({"temperature": -1.0}, "temperature must be from"),
        ({"drafter": "oracle"}, "drafter must be one of the words"),
        ({"max_new_tokens": -1}, "max_new_tokens must be from 0"),
    ],
)
def test_settings_are_refused_by_name(
    opened: Callable[..., Runtime], wrong: dict[str, Any], message: str
) -> None:
    session = opened(policy="keydiff", **SMALL).session()
    with pytest.raises(InputError, match=message):
        session.generate("hi", replace(Settings(), **wrong))
    assert session.generate("hi", Settings(max_new_tokens=3)).tokens
    assert [m["role"] for m in session.messages] == ["user", "assistant"]


def test_bad_prompts_leave_the_session(opened: Callable[..., Runtime]) -> None:
    runtime = opened(policy="none", budget=96)
    session = runtime.session()
    for ids, message in (
        ([], "the prompt is empty"),
        ([10**6], "outside the vocabulary"),
        ([-1], "list of token ids"),
        ([5] * 200, "200 tokens are more than the 112 slots of a cache without eviction"),
    ):
        with pytest.raises(InputError, match=message):
            session.generate(ids)
    assert session.tokens == []
    assert len(session.generate([5, 6], Settings(max_new_tokens=4)).tokens) > 0


def test_requests_that_make_no_sense_get_an_answer(opened: Callable[..., Runtime]) -> None:
    runtime = opened(policy="keydiff", **SMALL)
    process, name = runtime.process, runtime.session().name
    for op, fields, message in (
        ("fly", {}, "unknown op"),
        ("open", {}, "field session is missing"),
        ("open", {"session": 7}, "session must be a text"),
        ("open", {"session": "x", "colour": 1}, "unknown field"),
        ("generate", {"session": "nobody", "tokens": [1]}, "no session is called"),
        ("truncate", {"session": name, "tokens": 10**9}, "tokens must be"),
    ):
        with pytest.raises(InputError, match=message):
            process.ask(op, **fields)
    assert process.child.stdin
    for line in ("{", "[]", "7", '{"op":1}', '{"id":1.5,"op":"quit"}', "\x00\xff", "[" * 5000):
        process.child.stdin.write(f"\n{line}\n")
        process.child.stdin.flush()
        event = json.loads(process.lines.get(timeout=30) or "")
        assert (event["id"], event["event"]) == (None, "error")
    assert process.ask("sessions")["event"] == "done"


WORDS = ["open", "generate", "close", "truncate", "cancel", "sessions", "a", "session 1"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    LEAVES | st.text(max_size=8) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
FIELDS = st.sampled_from(["op", "session", "tokens", "seed", "top_p", "runs", "request", "stop_ids", "x"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.dictionaries(FIELDS, VALUES))
def test_fuzzed_requests_get_one_answer(opened: Callable[..., Runtime], junk: dict[str, Any]) -> None:
    if junk.get("op") in ("tune", "snapshot", "restore", "quit"):
        return
    process = opened(policy="sinks", **SMALL).process
    process.number += 1
    process._send(junk | {"id": process.number})
    while True:
        event = process._next()
        if event["id"] == process.number and event["event"] in ("done", "error"):
            break
    assert event["event"] == "done" or (event["error"] and event["hint"])


def test_a_killed_runtime_says_so(source: Path, opened: Callable[..., Runtime]) -> None:
    opened(policy="keydiff", **SMALL)
    path = next(source.parent.glob("policy=keydiff*.bundle"))
    with Runtime.open(path, threads=1) as runtime:
        session = runtime.session()
        threading.Timer(0.3, lambda: os.kill(runtime.process.child.pid, signal.SIGKILL)).start()
        with pytest.raises(BackendError, match="killed by signal 9"):
            while True:
                session.generate(runtime.encode_raw(TEXT), Settings(max_new_tokens=200))
                session.truncate(0)


def test_hostile_bundles(opened: Callable[..., Runtime], tmp_path: Path) -> None:
    """The runtime checks by itself: on a phone there is no Python before it."""
    good = opened(policy="keydiff", **SMALL).bundle.path
    program = str(binary(print))

    def refused(change: Callable[[Path], None]) -> str:
        folder = tmp_path / "b"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(BackendError) as caught:
            Process([program, "--bundle", str(folder)])
        return caught.value.message

    def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
        def act(folder: Path) -> None:
            manifest = json.loads((folder / "manifest.json").read_text())
            change(manifest)
            (folder / "manifest.json").write_text(json.dumps(manifest))

        return act

    def truncate(folder: Path) -> None:
        os.truncate(folder / "target.data", 1000)

    def swap(folder: Path) -> None:
        for name in ("target-decode.onnx", "target-verify-2.onnx"):
            (folder / name).rename(folder / f"{name}.old")
        (folder / "target-decode.onnx.old").rename(folder / "target-verify-2.onnx")
        (folder / "target-verify-2.onnx.old").rename(folder / "target-decode.onnx")

    assert "target.data has 1000 bytes" in refused(truncate)
    assert "bytes, not" in refused(swap)
    assert "has schema 2, this runtime reads 1" in refused(edit(lambda m: m.update(schema=2)))
    assert "absurdly large" in refused(edit(lambda m: m["models"][0]["spec"].update(layers=2**40)))
    assert "cache makes no sense" in refused(edit(lambda m: m["models"][0]["cache"].update(block=10**6)))
    assert "wrong shape" in refused(edit(lambda m: m["models"][0]["cache"].update(budget=64, buckets=[64])))
    assert "unsafe path" in refused(edit(lambda m: m["files"].update({"../x": {"bytes": 1}})))
    assert "is missing" in refused(lambda folder: (folder / "draft-draft.onnx").unlink())
    with pytest.raises(BackendError, match="cannot be read"):
        Process([program, "--bundle", str(tmp_path / "nowhere")])


def test_two_clients_have_each_their_own(opened: Callable[..., Runtime], source: Path) -> None:
    runtime = opened(policy="keydiff", **SMALL)
    ids = runtime.encode_raw(TEXT)
    wanted = say(runtime, ids)
    with Runtime.open(runtime.bundle.path, threads=1) as other:
        a, b = runtime.session(), other.session()
        a.generate(ids, Settings(max_new_tokens=10))
        b.generate(ids[:5], Settings(max_new_tokens=10))
        a.generate([], Settings(max_new_tokens=30))
        assert a.tokens[len(ids) :] == wanted
