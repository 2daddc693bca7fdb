"""Sessions over the native runtime: text is the model's own, through turns, cuts and snapshots."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgespec.bundle import SCHEMA, Bundle
from edgespec.errors import BackendError, InputError
from edgespec.exporters.checkpoint import open_checkpoint
from edgespec.runtime.build import binary
from edgespec.runtime.engine import Engine
from edgespec.runtime.process import Process
from edgespec.runtime.session import Runtime, Settings
from tests.helpers.operators import opener

TEXT = "the quick brown fox jumps over the lazy dog and the quick brown fox sleeps"


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
    engine, stops = (
        Engine(bundle.path, bundle.model("target"), 1, opener),
        set(bundle.manifest.tokenizer.stop_ids),
    )
    out = [int(engine.prefill(ids).argmax())]
    while len(out) < count and out[-1] not in stops:
        out.append(engine.step(out[-1]))
    return out


SMALL: dict[str, Any] = {"draft": "layers", "draft_budget": 32, "draft_rows": 200}
CELLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"policy": "h2o", "draft_policy": "caote(snapkv)", **SMALL}, {"drafter": "both", "stop_rule": "fixed"}),
    ({"policy": "lru", "draft_policy": "h2o", **SMALL}, {"drafter": "draft", "stop_rule": "fixed"}),
    ({"policy": "keydiff", "positions": "compact", **SMALL}, {"drafter": "both", "stop_rule": "fixed"}),
    ({"policy": "caote(h2o)", "positions": "compact", "weights": "int8", **SMALL}, {"drafter": "draft"}),
    ({"policy": "keydiff", **SMALL}, {"drafter": "both", "stop_rule": "cost"}),
    ({"policy": "keydiff", **SMALL}, {"drafter": "draft", "stop_rule": "fixed"}),
    ({"policy": "keydiff", **SMALL}, {"drafter": "draft", "stop_rule": "adaedl", "draft_tokens": 2}),
    ({"policy": "sinks", **SMALL}, {"drafter": "draft", "stop_rule": "confidence"}),
    ({"policy": "sinks", **SMALL}, {"drafter": "ngram", "stop_rule": "fixed"}),
    ({"policy": "keydiff", "weights": "int8", **SMALL}, {"drafter": "draft", "stop_rule": "fixed"}),
    ({"policy": "keydiff", "weights": "int8", **SMALL}, {"drafter": "ngram", "stop_rule": "fixed"}),
    ({"policy": "keydiff", "weights": "int4", **SMALL}, {"drafter": "both", "stop_rule": "fixed"}),
    (
        {"policy": "keydiff", "weights": "int8", "draft_weights": "int4", **SMALL},
        {"drafter": "draft", "stop_rule": "fixed"},
    ),
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


@pytest.mark.parametrize("drafter", ["draft", "both"])
def test_a_text_goes_on_past_the_trained_positions(opened: Callable[..., Runtime], drafter: str) -> None:
    """Under compact positions, speculative, plain, and by the engine: the same tokens, twice as many."""
    runtime = opened(policy="keydiff", positions="compact", **SMALL)
    trained = runtime.bundle.model("target").spec.positions
    ids, count = runtime.encode_raw(TEXT)[:40], 2 * trained
    said: dict[str, list[int]] = {}
    for how in ("none", drafter):
        how_long = {"max_new_tokens": count, "stop_ids": []}
        runtime.process.ask("open", session=how)
        events = runtime.process.events("generate", session=how, tokens=ids, drafter=how, **how_long)
        said[how] = [token for event in events if event["event"] == "round" for token in event["tokens"]]
        runtime.process.ask("close", session=how)
    assert len(said["none"]) == count > trained
    assert said[drafter] == said["none"]
    engine = Engine(runtime.bundle.path, runtime.bundle.model("target"), 1, opener)
    plain = [int(engine.prefill(ids).argmax())]
    while len(plain) < count:
        plain.append(engine.step(plain[-1]))
    assert plain == said["none"]


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
    assert {c[1] for c in calls if c[0] == "draft"} <= {"prefill", "draft", "commit", "context"}
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
    empty, session, few = runtime.session(), runtime.session(), Settings(max_new_tokens=4)
    with pytest.raises(InputError, match="the prompt is empty"):
        empty.generate([])
    session.generate([5, 6], few)
    known = list(session.tokens)
    for ids, message, hint in (
        ([288], "token 288 is outside the vocabulary of 288", "encode with the bundle's tokenizer"),
        ([7, 10**6], "outside the vocabulary", "encode with the bundle's tokenizer"),
        ([-1], "list of token ids", "--help"),
        ([2**31], "list of token ids", "--help"),
        ([2**64], "list of token ids", "--help"),
        ([5] * 111, f"{111 + len(known)} tokens are more than the 112 slots of a cache without eviction",
         "--policy keydiff, or with a larger --budget"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message) as caught:
            session.generate(ids)
        assert hint in caught.value.hint
    assert (empty.tokens, session.tokens) == ([], known)
    assert empty.generate([5, 6], few).tokens
    session.generate([7], few)
    assert session.tokens[len(known) :] == [7, *say(runtime, [*known, 7], max_new_tokens=4)]


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


def test_a_killed_runtime_says_so_and_its_snapshot_goes_on(
    opened: Callable[..., Runtime], tmp_path: Path
) -> None:
    living = opened(policy="keydiff", **SMALL)
    ids, few = living.encode_raw(TEXT), Settings(max_new_tokens=10)
    with Runtime.open(living.bundle.path, threads=1) as runtime:
        session = runtime.session()
        session.generate(ids, few)
        session.snapshot(tmp_path / "a.snap")
        threading.Timer(0.3, lambda: os.kill(runtime.process.child.pid, signal.SIGKILL)).start()
        with pytest.raises(BackendError, match="killed by signal 9") as caught:
            while True:
                session.generate([], Settings(max_new_tokens=200))
                session.truncate(len(ids) + 10)
        assert caught.value.hint == "not enough memory? try a smaller --budget"
        with pytest.raises(BackendError, match="killed by signal 9"):
            session.generate("hello")
    with Runtime.open(living.bundle.path, threads=1) as runtime:
        session = runtime.session()
        session.restore(tmp_path / "a.snap")
        session.generate([], Settings(max_new_tokens=30))
    assert session.tokens[len(ids) :] == say(living, ids)


def test_hostile_bundles(opened: Callable[..., Runtime], tmp_path: Path) -> None:
    """The runtime checks by itself: on a phone there is no Python before it."""
    good = opened(policy="keydiff", **SMALL).bundle.path
    program = str(binary(print))

    def refused(change: Callable[[Path], None]) -> str:
        folder = tmp_path / "b"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        change(folder)
        done = subprocess.run(
            [program, "--bundle", folder], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        words = json.loads(done.stdout)
        assert done.stderr == f"error: {words['error']}\nhint:  {words['hint']}\n"
        assert done.returncode == 2
        return words["error"]

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

    def nest(folder: Path) -> None:
        deep = "[" * 10**6 + "]" * 10**6
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace('"layers"', f'"deep": {deep}, "layers"'))

    assert "target.data has 1000 bytes" in refused(truncate)
    assert "bytes, not" in refused(swap)
    assert f"has schema {SCHEMA + 1}, this runtime reads {SCHEMA}" in refused(
        edit(lambda m: m.update(schema=SCHEMA + 1))
    )
    assert "absurdly large" in refused(edit(lambda m: m["models"][0]["spec"].update(layers=2**40)))
    assert "cache makes no sense" in refused(edit(lambda m: m["models"][0]["cache"].update(block=10**6)))
    assert "of no bucket" in refused(edit(lambda m: m["models"][0]["cache"].update(budget=64, buckets=[64])))
    assert "wrong shape" in refused(edit(lambda m: m["models"][0]["spec"].update(head_dim=32)))
    for dtype, contract, message in (
        ("int8", "rows", "wrong shape or type"), ("int8", "append", "cache makes no sense"),
        ("int32", "append", "cache makes no sense"), ("int4", "append", "dtype is unknown"),
    ):  # fmt: skip
        cached = {"dtype": dtype, "contract": contract}
        assert message in refused(edit(lambda m, c=cached: m["models"][0]["cache"].update(c)))
    wide = edit(lambda m: m["models"][0]["graphs"][0]["outputs"][0].update(dtype="int8"))
    assert "wrong shape or type" in refused(wide)  # less memory than is read
    assert "unsafe path" in refused(edit(lambda m: m["files"].update({"../x": {"bytes": 1}})))
    assert "is missing" in refused(lambda folder: (folder / "draft-draft.onnx").unlink())
    assert "no JSON object" in refused(nest)
    with pytest.raises(BackendError, match="cannot be read"):
        Process([program, "--bundle", str(tmp_path / "nowhere")])


def test_two_clients_have_each_their_own(opened: Callable[..., Runtime]) -> None:
    """Two processes over one bundle at the same time, and in each two conversations in turns."""
    living = opened(policy="keydiff", **SMALL)
    prompts = [living.encode_raw(text) for text in (TEXT, TEXT[::-1])]
    wanted = [say(living, ids, max_new_tokens=31) for ids in prompts]
    heard: list[list[int]] = []

    def talk() -> None:
        with Runtime.open(living.bundle.path, threads=1) as runtime:
            sessions = [runtime.session() for _ in prompts]
            for session, ids in zip(sessions, prompts, strict=True):
                session.generate(ids, Settings(max_new_tokens=1))
            for _ in range(10):
                for session in sessions:
                    session.generate([], Settings(max_new_tokens=3))
            heard.extend(s.tokens[len(ids) :] for s, ids in zip(sessions, prompts, strict=True))

    threads = [threading.Thread(target=talk) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == [*wanted, *wanted]
