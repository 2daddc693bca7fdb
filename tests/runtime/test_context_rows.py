"""Context rows in the native runtime: they change proposals, never the text; a seed repeats its trace."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgespec.errors import BackendError
from edgespec.runtime.build import binary
from edgespec.runtime.process import Process
from edgespec.runtime.session import Runtime, Session, Settings

# The draft of a two-layer model is the model itself: what its head holds is accepted, nearly always.
SMALL: dict[str, Any] = {"draft": "layers", "draft_budget": 48, "draft_rows": 200}
PROMPTS = ([5, 270, 9, 281, 266, 4, 287, 30], list(range(100, 150)), [*range(258, 288), 17])
WAYS = [("cost", "both", 0), ("fixed", "draft", 3), ("adaedl", "draft", 1), ("confidence", "both", 3)]


def say(session: Session, ids: list[int], **how: Any) -> list[int]:
    before = len(session.tokens) + len(ids)
    session.generate(ids, Settings(40, **how))
    return session.tokens[before:]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"policy": "h2o", "draft_policy": "snapkv"},
        {"device": "npu", "weights": "fp16"},
        {"weights": "int8", "buckets": (16,)},
    ],
    ids=["keydiff", "queries", "npu", "int8"],
)
def test_text_is_plain_text_and_more_of_it_is_drafted(
    opened: Callable[..., Runtime], more: dict[str, Any]
) -> None:
    with_rows, without = (opened(**SMALL, **more, context_rows=rows) for rows in (16, 0))
    assert with_rows.bundle.model("draft").context_rows == 16
    efficiency = {}
    for runtime in (with_rows, without):
        emitted = calls = 0
        for prompt in PROMPTS:
            plain = say(runtime.session(), prompt, drafter="none")
            for rule, drafter, most in WAYS:
                session = runtime.session()
                assert say(session, prompt, stop_rule=rule, drafter=drafter, draft_tokens=most) == plain
                emitted += len(plain)
                calls += session.answer.stats["verify_calls"]
        efficiency[runtime] = emitted / calls
    assert efficiency[with_rows] > efficiency[without]


def test_a_seed_repeats_its_trace_however_the_text_came(
    opened: Callable[..., Runtime], tmp_path: Path
) -> None:
    runtime = opened(**SMALL, context_rows=16)
    prompt = PROMPTS[2] + PROMPTS[0] * 3
    how = Settings(40, temperature=1.0, seed=3, drafter="draft", stop_rule="fixed")

    def traced(session: Session, ids: list[int]) -> list[Any]:
        told = io.StringIO()
        for _ in session.stream(ids, how, trace=told):
            pass
        rounds = [json.loads(line) for line in told.getvalue().splitlines()]
        return [
            [r["tokens"], r["drafted"], r["accepted"], r["entropy"]] for r in rounds if r["event"] == "round"
        ]

    wanted = traced(runtime.session(), prompt)
    assert sum(drafted for _, drafted, _, _ in wanted) > 20
    chunks = runtime.session()
    for start in range(0, len(prompt) - 1, 7):
        chunks.generate(prompt[start : min(start + 7, len(prompt) - 1)], Settings(9, drafter="draft"))
        chunks.truncate(min(start + 7, len(prompt) - 1))
    chunks.snapshot(tmp_path / "s")
    assert traced(chunks, prompt[-1:]) == wanted
    restored = runtime.session()
    restored.generate(PROMPTS[1], Settings(9, drafter="draft"))
    restored.restore(tmp_path / "s")
    assert traced(restored, prompt[-1:]) == wanted


def test_two_sessions_have_each_their_own(opened: Callable[..., Runtime]) -> None:
    runtime = opened(**SMALL, context_rows=16)
    how: dict[str, Any] = {"temperature": 1.0, "drafter": "draft", "stop_rule": "fixed"}
    alone = []
    for prompt in PROMPTS[:2]:
        session = runtime.session()
        alone.append([say(session, prompt, **how) for _ in range(3)])
    a, b = runtime.session(), runtime.session()
    turns = [(say(a, PROMPTS[0], **how), say(b, PROMPTS[1], **how)) for _ in range(3)]
    assert [list(texts) for texts in zip(*turns, strict=True)] == alone


def test_what_is_counted(opened: Callable[..., Runtime]) -> None:
    """c counts the context rows, and the trace their lookups: a row is looked up once."""
    runtime = opened(**SMALL, context_rows=16)
    entries = {m.name: m for m in runtime.bundle.manifest.models}
    files = runtime.bundle.manifest.files
    session, told = runtime.session(), io.StringIO()
    for _ in session.stream(
        [270, 281, 5, 270], Settings(1 + 2, drafter="draft", stop_rule="fixed"), trace=told
    ):
        pass
    read = files[entries["draft"].weights].bytes + 4 * 16 * entries["draft"].spec.hidden
    assert session.answer.stats["c"] == pytest.approx(read / files[entries["target"].weights].bytes)
    calls = [call for line in told.getvalue().splitlines() for call in json.loads(line)["calls"]]
    looked_up = [call[:4] for call in calls if call[1] == "context"]
    own = set(range(258))
    lacked = {t for t in session.tokens[: len(session.tokens) - 1] if t not in own}
    assert looked_up and all(call[:3] == ["draft", "context", 4] for call in looked_up)
    assert 2 <= sum(call[3] for call in looked_up) <= len(lacked)


EDITS: list[Callable[[dict[str, Any], dict[str, Any]], Any]] = [
    lambda draft, target: draft.update(context_rows=17),
    lambda draft, target: draft.update(context_rows=0),
    lambda draft, target: draft.update(context_rows=10**6),
    lambda draft, target: draft["graphs"].pop(),
    lambda draft, target: draft["graphs"].append({**draft["graphs"][-1]}),
    lambda draft, target: draft["graphs"][-1].update(width=8),
    lambda draft, target: draft["graphs"][-1]["outputs"][0].update(shape=[1, 4, 10**5]),
    lambda draft, target: draft["graphs"][-1]["inputs"][0].update(dtype="float32"),
    lambda draft, target: draft["spec"].update(hidden=128),
    lambda draft, target: target["spec"].update(hidden=128),
    lambda draft, target: target.update(context_rows=3),
    lambda draft, target: [
        t.update(shape=[1, 16]) for g in draft["graphs"] for t in g["inputs"] if t["name"] == "context"
    ],
    lambda draft, target: [
        t.update(shape=[1]) for g in draft["graphs"] for t in g["inputs"] if t["name"] == "context_ids"
    ],
]


def test_manifests_that_make_no_sense(opened: Callable[..., Runtime], tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(opened(**SMALL, context_rows=16).bundle.path, folder)
    whole = (folder / "manifest.json").read_text()
    for edit in EDITS:
        data = json.loads(whole)
        draft, target = (next(m for m in data["models"] if m["name"] == n) for n in ("draft", "target"))
        edit(draft, target)
        (folder / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(BackendError, match=r"context rows make no sense|context has the wrong shape"):
            Process([str(binary(print)), "--bundle", str(folder)])
