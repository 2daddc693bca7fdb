"""What is measured of a machine, against a made-up machine whose calls take what its figures say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgespec import measure as module
from edgespec.latency import call_time
from edgespec.measure import measure
from edgespec.profiles.profile import parse, to_toml
from edgespec.progress import Progress
from edgespec.shape import PRECISIONS, Shape
from edgespec.work import of_shape
from tests.helpers.latency import device

SHAPE = Shape("llama", 30, 576, 9, 3, 64, 1536, 49152, True)
STEPS = (("prefill", 128), ("decode", 1), ("verify", 2), ("verify", 8))
MODELS = {"target": of_shape(SHAPE, PRECISIONS["int8"], STEPS, 1024, 128, appends=True)}
TRUTH = device(
    bandwidth_peak_bytes_per_s=2e10,
    bandwidth_weights_bytes_per_s=1.2e10,
    bandwidth_kv_bytes_per_s=4e9,
    bandwidth_activations_bytes_per_s=1.5e9,
    dispatch_s=2e-4,
    ops_int8_per_s=2e11,
    bytes_float=4,
)


def microseconds(kind: str, width: int, filled: int) -> float:
    work = MODELS["target"].call(kind, width, 1024, filled, 4)
    return call_time(work, TRUTH).total_s * 1e6


class FakeSession:
    """Absorbs a prompt block by block and decodes plainly; a round takes 50 microseconds beside its call."""

    def stream(self, tokens: list[int], settings: Any, trace: Any) -> Any:
        filled, calls, spent = 0, [], 0.0
        while filled < len(tokens):
            rows = min(128, len(tokens) - filled)
            calls.append(["target", "prefill", 128, rows, microseconds("prefill", 128, filled)])
            filled += rows
        events: list[dict[str, Any]] = [
            {"event": "prompt", "tokens": len(tokens), "known": 0, "calls": calls}
        ]
        events.append({"event": "round", "tokens": [1], "drafted": 0, "accepted": 0, "calls": []})
        for _ in range(settings.max_new_tokens - 1):
            us = microseconds("decode", 1, filled)
            call = ["target", "decode", 1, 1, us]
            events.append({"event": "round", "tokens": [1], "drafted": 0, "accepted": 0, "calls": [call]})
            filled, spent = filled + 1, spent + us * 1e-6 + 5e-5
        trace.writelines(json.dumps(event) + "\n" for event in events)
        rounds = settings.max_new_tokens - 1
        self.answer = SimpleNamespace(stats={"time_decode_s": spent, "rounds": rounds})
        yield ""

    def close(self) -> None:
        """Nothing to give back."""


def tune(op: str, runs: int) -> dict[str, Any]:
    kinds = {"1": "decode", "2": "verify", "8": "verify"}
    return {"table": {"verify": {w: microseconds(kind, int(w), 1024 // 4) for w, kind in kinds.items()}}}


def test_figures_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "of_bundle", lambda bundle: MODELS)
    monkeypatch.setattr(module, "peak_bandwidth", lambda threads: 2e10)
    monkeypatch.setattr(module, "copy_bandwidth", lambda: 8e9)
    process = SimpleNamespace(ready={"threads": 1}, ask=tune)
    runtime = SimpleNamespace(process=process, session=FakeSession)
    bundle: Any = SimpleNamespace(path=Path("toy.bundle"))
    found = measure(bundle, runtime, lambda **how: SimpleNamespace(**how), 20, "a toy", Progress(quiet=True))
    assert found.name == "this-machine" and found.kind == "cpu"
    assert found.bandwidth_weights_bytes_per_s.value == pytest.approx(1.2e10, rel=0.05)
    assert found.bandwidth_kv_bytes_per_s.value == pytest.approx(4e9, rel=0.2)
    assert found.value("ops_int8_per_s") == pytest.approx(1e11, rel=0.05)  # 2e11 at an efficiency of a half
    assert found.host_s.value == pytest.approx(5e-5, rel=0.01)
    assert found.bandwidth_weights_bytes_per_s.basis == "measured" and found.ops_float_per_s is None
    for kind, width, filled in (("decode", 1, 500), ("verify", 8, 500), ("prefill", 128, 128)):
        work = MODELS["target"].call(kind, width, 1024, filled, 4)
        assert call_time(work, found).total_s * 1e6 == pytest.approx(
            microseconds(kind, width, filled), rel=0.05
        )
    assert parse(to_toml(found), "x").name == "this-machine"
