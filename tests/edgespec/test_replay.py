"""A trace replayed: clocks and caches by hand, the same bytes every time, and traces that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgespec.errors import InputError
from edgespec.latency import call_time, copy_time
from edgespec.replay import replay_work, walk
from edgespec.trace import parse_trace, read_trace
from tests.helpers.latency import BLOCK, BUDGET, device, models

PROMPT = {"event": "prompt", "tokens": 10, "stop_rule": "cost", "table": "default", "temperature": 0.0}
PROMPT["calls"] = [["target", "prefill", 8, 8, 5.0], ["target", "prefill", 8, 2, 5.0]]
FIRST = {"event": "round", "tokens": [7], "drafted": 0, "accepted": 0, "calls": []}
ROUND = {
    "event": "round",
    "tokens": [1, 2],
    "drafted": 3,
    "accepted": 1,
    "drafter": "draft",
    "stop": "cap",
    "calls": [
        ["draft", "prefill", 8, 8, 1.0],
        ["draft", "draft", 2, 2, 1.0],
        ["draft", "draft", 2, 1, 1.0],
        ["draft", "draft", 2, 1, 1.0],
        ["target", "verify", 4, 4, 1.0],
    ],
}
LAST = {
    "event": "round",
    "tokens": [3],
    "drafted": 0,
    "accepted": 0,
    "calls": [["target", "decode", 1, 1, 1.0]],
}


def lines(*events: dict[str, Any]) -> list[str]:
    return [json.dumps(event) for event in events]


def trace(*events: dict[str, Any]) -> Any:
    return parse_trace(lines(*events))


def test_clocks_by_hand() -> None:
    profile, both = device(), models()
    run = replay_work(trace(PROMPT, FIRST, ROUND, LAST), profile, both)

    def seconds(kind: str, width: int, name: str = "target") -> float:
        return call_time(both[name].call(kind, width, BUDGET, 0, 2), profile).total_s

    row = copy_time(1, both["target"], profile).total_s
    assert run.ttft_s == pytest.approx(2 * seconds("prefill", 8) + 10 * row + 1e-4)
    drafted = seconds("prefill", 8, "draft") + 3 * seconds("draft", 2, "draft") + 12 * row
    decode = drafted + seconds("verify", 4) + 2 * row + 1e-4 + seconds("decode", 1) + row + 1e-4
    assert run.decode_s == pytest.approx(decode)
    assert run.tokens_per_s == pytest.approx(3 / decode)
    assert (run.tokens_prompt, run.tokens_new, run.rounds, run.tokens_drafted, run.tokens_accepted) == (
        10,
        4,
        2,
        3,
        1,
    )
    assert run.block_efficiency == 1.5
    assert sum(run.resources.values()) == pytest.approx(run.ttft_s + run.decode_s)
    assert sum(part.time_s for part in run.parts) == pytest.approx(run.ttft_s + run.decode_s)
    assert run.energy_j is None


def test_caches_are_followed() -> None:
    """What is refused does not stay: the draft falls back to one token behind the text."""
    works = walk(trace(PROMPT, FIRST, ROUND, LAST, ROUND), device(), models(appends=True))
    rows = [(call.model, call.kind, int(work.bytes_kv / 128)) for call, work in works]
    assert rows[:2] == [("target", "prefill", 8), ("target", "prefill", 16)]
    assert rows[2:6] == [
        ("draft", "prefill", 8), ("draft", "draft", 10), ("draft", "draft", 12), ("draft", "draft", 13)
    ]  # fmt: skip
    assert rows[6:8] == [("target", "verify", 14), ("target", "decode", 13)]
    assert rows[8] == ("draft", "prefill", 12 + 8)  # 13 tokens are known, 12 of them stay absorbed


def test_a_commit_empties_the_cache_to_its_budget() -> None:
    full = {"event": "prompt", "tokens": BUDGET + BLOCK, "calls": [["target", "prefill", 8, 8, 1.0]] * 3}
    full["calls"] = [*full["calls"], ["target", "commit", 8, 16, 9.0], ["target", "decode", 1, 1, 1.0]]
    works = walk(trace(full), device(), models(appends=True))
    assert [int(work.bytes_kv / 128) for call, work in works if call.kind != "commit"] == [
        8,
        16,
        24,
        BUDGET + 1,
    ]
    run = replay_work(trace(full), device(), models())
    assert [p.calls for p in run.parts if p.kind == "commit"] == [1]


def test_a_commit_of_a_cache_that_is_not_full_is_refused() -> None:
    early = PROMPT | {"calls": [["target", "prefill", 8, 8, 1.0], ["target", "commit", 8, 16, 1.0]]}
    with pytest.raises(InputError, match="commits the target's cache at 8 rows, which is full at 24"):
        replay_work(trace(early), device(), models())


def test_what_was_taken_back_is_absorbed_again() -> None:
    """Rows since the last commit come off the end; for more, the cache is emptied."""
    again = PROMPT | {"known": 6, "tokens": 3, "calls": [["target", "verify", 4, 4, 1.0]]}
    works = walk(trace(PROMPT | {"known": 0}, FIRST, LAST, again), device(), models(appends=True))
    assert int(works[-1][1].bytes_kv / 128) == 5 + 4
    full = {"event": "prompt", "tokens": 24, "calls": [["target", "prefill", 8, 8, 1.0]] * 3}
    full["calls"] = [*full["calls"], ["target", "commit", 8, 16, 9.0]]
    anew = {"event": "prompt", "known": 6, "tokens": 2, "calls": [["target", "prefill", 8, 8, 1.0]]}
    works = walk(trace(full, anew), device(), models(appends=True))
    assert int(works[-1][1].bytes_kv / 128) == 8


def test_the_same_inputs_give_the_same_bytes() -> None:
    texts = {
        json.dumps(replay_work(trace(PROMPT, FIRST, ROUND, LAST), device(), models()).to_json())
        for _ in range(3)
    }
    assert len(texts) == 1


def test_who_decided_is_said() -> None:
    def decided(table: str, rule: str, *more: dict[str, Any]) -> str:
        prompt = PROMPT | {"table": table, "stop_rule": rule}
        return replay_work(trace(prompt, FIRST, *more), device(), models()).decided_by

    assert decided("default", "cost", ROUND) == "another table: default"
    assert decided("profile toy", "cost", ROUND) == "this profile"
    assert decided("default", "fixed", ROUND) == "the rule fixed, whatever calls cost"
    assert decided("default", "cost", LAST) == "nobody: nothing was drafted"
    old = {name: value for name, value in PROMPT.items() if name not in ("table", "stop_rule")}
    assert replay_work(trace(old, FIRST, ROUND), device(), models()).decided_by == "another table: unknown"


def test_turns_have_a_first_token_each() -> None:
    one = replay_work(trace(PROMPT, FIRST, LAST), device(), models())
    two = replay_work(trace(PROMPT, FIRST, LAST, PROMPT, FIRST, LAST), device(), models())
    assert two.ttft_s == one.ttft_s and two.prompt_s == pytest.approx(2 * one.prompt_s)
    assert two.tokens_per_s == pytest.approx(one.tokens_per_s)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.jsonl is empty: it holds no prompt"),
        ("{", "t.jsonl, line 1 is not JSON"),
        ('{"event": "prompt", "tokens": NaN, "calls": []}', "line 1 is not JSON: NaN is not a number"),
        ("[1]", "t.jsonl, line 1 is no event of a trace"),
        (json.dumps(FIRST), "t.jsonl, line 1: a round stands before any prompt"),
        (json.dumps(PROMPT | {"tokens": -1}), "line 1: tokens is -1, no count"),
        (json.dumps(PROMPT | {"calls": None}), "line 1 has no calls"),
        (json.dumps(PROMPT | {"calls": [["target", "fly", 1, 1, 1.0]]}), "is no call"),
        (json.dumps(PROMPT | {"calls": [["target", "decode", 1, 0, 1.0]]}), "is no call"),
        (json.dumps(PROMPT | {"calls": [["target", "decode", 1, 1, -1.0]]}), "a call took -1.0 microseconds"),
        (json.dumps(PROMPT | {"temperature": "hot"}), "temperature is 'hot'"),
        (json.dumps(PROMPT) + "\n" + json.dumps(ROUND | {"accepted": 4}), "4 tokens accepted of 3 drafted"),
        (json.dumps(PROMPT) + "\n" + json.dumps(ROUND | {"tokens": [-1]}), "tokens are no list of ids"),
    ],
)
def test_a_trace_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert message in caught.value.message
    assert caught.value.hint == "record it again: edgespec generate BUNDLE PROMPT --trace FILE"


def test_a_trace_of_another_bundle_is_refused() -> None:
    with pytest.raises(InputError, match="the target has no verify graph of width 6") as caught:
        wide = LAST | {"calls": [["target", "verify", 6, 1, 1.0]]}
        replay_work(trace(PROMPT, FIRST, wide), device(), models())
    assert caught.value.hint == "replay a trace with the bundle that it was recorded with"
    with pytest.raises(InputError, match="the trace calls a draft, which the bundle lacks"):
        replay_work(trace(PROMPT, FIRST, ROUND), device(), models(draft=False))
