"""The native runtime over a model in parts: the text of the whole model, one record a step."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgespec.bundle import open_bundle
from edgespec.errors import BackendError, BundleError
from edgespec.runtime.build import binary
from edgespec.runtime.process import Process
from edgespec.runtime.session import Runtime, Settings

DRAFT: dict[str, Any] = {"draft": "layers", "draft_budget": 32, "draft_rows": 200, "context_rows": 16}
APPENDED: dict[str, Any] = {"policy": "h2o", "buckets": (16,), **DRAFT}
CELLS: list[dict[str, Any]] = [APPENDED, {"device": "npu", "weights": "fp16", **DRAFT}]
PROMPT = list(range(5, 75))


def told(runtime: Runtime, drafter: str) -> tuple[list[int], list[list[Any]]]:
    """The text, and the trace's calls without their times."""
    session, trace = runtime.session(), io.StringIO()
    how = Settings(max_new_tokens=40, drafter=drafter, stop_rule="fixed")
    for _ in session.stream(PROMPT, how, trace=trace):
        pass
    calls = [c[:4] for line in trace.getvalue().splitlines() for c in json.loads(line).get("calls", ())]
    return session.answer.tokens, calls


@pytest.mark.parametrize("cell", CELLS, ids=["append", "rows"])
def test_text_and_calls_are_those_of_the_whole_model(
    opened: Callable[..., Runtime], cell: dict[str, Any]
) -> None:
    whole, parts = opened(**cell), opened(parts=2, **cell)
    assert parts.bundle.model("target").parts == (1, 1) and parts.bundle.model("draft").parts == (2,)
    agree = [runtime.bundle.model("target").widths_agree for runtime in (whole, parts)]
    assert agree == [cell is APPENDED] * 2
    plain = told(parts, "none")
    assert plain == told(whole, "none")
    assert sum(call[:2] == ["target", "commit"] for call in plain[1]) >= 2
    drafted = told(parts, "both")
    assert drafted == told(whole, "both") and drafted[0] == plain[0]


EDITS: list[Callable[[dict[str, Any], dict[str, Any]], Any]] = [
    lambda model, last: model.update(parts=[2]),
    lambda model, last: model.update(parts=[1, 2]),
    lambda model, last: model.update(parts=[2, 0]),
    lambda model, last: model.update(parts=[]),
    lambda model, last: model["graphs"].remove(last),
    lambda model, last: model["graphs"].append({**last}),
    lambda model, last: last.update(part=0),
    lambda model, last: last.update(part=2),
    lambda model, last: last["inputs"][0].update(shape=[1, 4, 32]),
    lambda model, last: last["inputs"][0].update(name="tokens"),
    lambda model, last: last["outputs"][0].update(name="hidden_2"),
    lambda model, last: next(g for g in model["graphs"] if g["kind"] == "commit").update(part=1),
]


@pytest.mark.parametrize("number", range(len(EDITS)))
def test_manifests_of_parts_that_make_no_sense(
    opened: Callable[..., Runtime], tmp_path: Path, number: int
) -> None:
    folder = tmp_path / "b"
    shutil.copytree(opened(parts=2, **APPENDED).bundle.path, folder)
    data = json.loads((folder / "manifest.json").read_text())
    model = data["models"][0]
    last = next(g for g in model["graphs"] if g["kind"] == "verify" and g["width"] == 4 and g["part"] == 1)
    EDITS[number](model, last)
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"^error: manifest\.models\.target"):
        open_bundle(folder)
    with pytest.raises(BackendError, match="part"):
        Process([str(binary(print)), "--bundle", str(folder)])
