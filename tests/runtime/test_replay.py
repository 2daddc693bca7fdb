"""Traces of the native runtime replayed: caches are followed through commits and what was taken back."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgespec.profiles import load
from edgespec.replay import replay, walk
from edgespec.runtime.session import Runtime, Settings
from edgespec.table import predicted_table
from edgespec.trace import Trace, parse_trace
from edgespec.work import of_bundle

SMALL: dict[str, Any] = {"draft": "layers", "draft_budget": 32, "draft_rows": 200}
TEXT = "the quick brown fox jumps over the lazy dog and the quick brown fox sleeps"


def recorded(runtime: Runtime, turns: int, **how: Any) -> Trace:
    """A conversation of some turns, the second of which takes back what the first had said."""
    session, lines = runtime.session(), io.StringIO()
    for turn in range(turns):
        if turn == 1:
            session.truncate(len(session.tokens) - 9)
        ids = runtime.encode_raw(TEXT)
        list(session.stream(ids, Settings(max_new_tokens=70, **how), trace=lines))
    session.close()
    return parse_trace(lines.getvalue().splitlines())


@pytest.mark.parametrize("policy", ["keydiff", "h2o"])
@pytest.mark.parametrize("drafter", ["draft", "ngram", "none"])
def test_caches_are_followed(opened: Callable[..., Runtime], policy: str, drafter: str) -> None:
    """A commit is refused where the replay's cache is not full: that it passes shows that both agree."""
    runtime = opened(policy=policy, **SMALL)
    trace = recorded(runtime, 3, drafter=drafter, stop_rule="fixed")
    profile, models = load("snapdragon-8-gen-3-cpu"), of_bundle(runtime.bundle)
    calls = [call for call, _ in walk(trace, profile, models)]
    assert sum(call.kind == "commit" and call.model == "target" for call in calls) >= 3
    run = replay(trace, load("snapdragon-8-elite"), runtime.bundle)
    assert run.tokens_new == sum(len(r.tokens) for turn in trace.turns for r in turn.rounds)
    assert sum(part.calls for part in run.parts if part.model != "host") == len(calls)
    again = replay(trace, load("snapdragon-8-elite"), runtime.bundle)
    assert json.dumps(run.to_json()) == json.dumps(again.to_json())


def test_the_cost_rule_reads_a_devices_predicted_costs(
    opened: Callable[..., Runtime], tmp_path: Path
) -> None:
    runtime = opened(policy="keydiff", **SMALL)
    profile = load("snapdragon-8-elite")
    table = predicted_table(runtime.bundle, of_bundle(runtime.bundle), profile)
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(table))
    with Runtime.open(runtime.bundle.path, threads=1, costs=path) as other:
        trace = recorded(other, 1, drafter="draft")
    assert (trace.table, trace.stop_rule) == ("profile snapdragon-8-elite", "cost")
    assert replay(trace, profile, runtime.bundle).decided_by in (
        "this profile",
        "nobody: nothing was drafted",
    )
    assert recorded(runtime, 1, drafter="draft").table != trace.table
    for name in (7, "x" * 300):
        path.write_text(json.dumps(table | {"name": name}))
        with pytest.raises(Exception, match="has a name that is no short text"):
            Runtime.open(runtime.bundle.path, threads=1, costs=path)
