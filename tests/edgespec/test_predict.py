"""A report's traces replayed: the sums by hand, plain decoding, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from edgespec.bench_report import Traced, from_json
from edgespec.errors import InputError
from edgespec.latency import call_time
from edgespec.predict import counted, narrowest, parsed, plainly, predict, works
from edgespec.profiles import load
from edgespec.replay import replay_work
from edgespec.trace import Call
from tests.helpers.reports import report, traced

PHONE = load("snapdragon-8-elite")
REPORT = report(3)
WORKS = works(REPORT.counted)


def test_work_survives_a_report() -> None:
    back = works([from_json(type(c), json.loads(json.dumps(c, default=vars)), "x") for c in REPORT.counted])
    assert back == WORKS
    assert [counted(w).steps for w in WORKS.values()] == [c.steps for c in REPORT.counted]
    assert WORKS["target"].steps["verify", 2, 16].ops_weights == 180


def test_a_fact_of_another_type_is_refused() -> None:
    odd = replace(REPORT.counted[0], facts={**REPORT.counted[0].facts, "layers": "two"})
    with pytest.raises(InputError, match="counted facts of a report: layers: is a text, not int"):
        works([odd])


def test_a_prediction_is_the_sum_of_its_replays() -> None:
    (found,) = predict(REPORT.traces, WORKS, [PHONE])
    one = replay_work(parsed(traced("writing/1")), PHONE, WORKS)
    # Three equal prompts: 4 tokens each, of which one comes with the prompt.
    assert found.tokens_per_s == pytest.approx(3 / one.decode_s)
    assert found.time_first_token_s == one.ttft_s
    assert found.bytes_memory == one.memory.bytes_peak
    assert found.categories == {name: pytest.approx(3 / one.decode_s) for name in ("writing", "math", "qa")}
    assert sum(s.time_s for s in found.shares) == pytest.approx(3 * (one.prompt_s + one.decode_s))
    assert found.shares[0].time_s == max(s.time_s for s in found.shares)
    assert predict(REPORT.traces, WORKS, [PHONE, PHONE]) == (found, found)


def test_plain_decoding_is_one_narrow_call_a_token() -> None:
    trace = parsed(traced("qa/1"))
    one = narrowest([trace])
    assert one == Call("target", "decode", 1, 1, 0.0)
    plain = plainly(trace, one)
    assert [len(r.tokens) for r in plain.turns[0].rounds] == [1, 1, 1, 1]
    assert [c.kind for r in plain.turns[0].rounds for c in r.calls] == ["decode"] * 3
    (found,) = predict(REPORT.traces, WORKS, [PHONE])
    run = replay_work(plain, PHONE, WORKS)
    assert found.plain_tokens_per_s == pytest.approx(3 / run.decode_s)
    call = call_time(WORKS["target"].call("decode", 1, 16, 4, PHONE.bytes_float.value), PHONE).total_s
    assert run.decode_s == pytest.approx(3 * (call + PHONE.host_s.value), rel=1e-3)


def test_a_graph_with_more_bytes_is_slower_on_the_same_traces() -> None:
    target = WORKS["target"]
    steps = {k: replace(s, bytes_weights=s.bytes_weights * 10**6) for k, s in target.steps.items()}
    heavy = replace(target, steps=steps)
    (light,) = predict(REPORT.traces, WORKS, [PHONE])
    (slow,) = predict(REPORT.traces, {**WORKS, "target": heavy}, [PHONE])
    assert slow.tokens_per_s < light.tokens_per_s and slow.time_first_token_s > light.time_first_token_s


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"event": "round"}, "the trace of qa/1, line 1: a round stands before any prompt"),
        ({"event": "prompt", "tokens": -1, "calls": []}, "the trace of qa/1, line 1: tokens is -1"),
        (
            {"event": "prompt", "tokens": 4, "calls": [["target", "fly", 4, 4, 1.0]]},
            "the trace of qa/1, line 1: ['target', 'fly', 4, 4, 1.0] is no call",
        ),
    ],
)
def test_a_trace_without_sense_is_refused(event: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        predict([Traced("qa/1", "qa", (event,))], WORKS, [PHONE])
    assert caught.value.message.startswith(said)


def test_a_trace_of_graphs_that_are_missing_is_refused() -> None:
    wide = ({"event": "prompt", "tokens": 4, "calls": [["target", "prefill", 64, 4, 1.0]]},)
    with pytest.raises(InputError, match="the target has no prefill graph of width 64"):
        predict([Traced("qa/1", "qa", wide)], WORKS, [PHONE])
