"""The width test that ends every export: it finds a width that rounds otherwise, one open graph at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgespec.bundle import Bundle
from edgespec.config import ExportConfig
from edgespec.exporters import export
from edgespec.exporters.widths import disagreements, marked, sample_tokens
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("widths")
    source = write_directory(folder / "source", tiny.model("llama"))
    flags: dict[str, Any] = dict(weights="int8", widths=(2, 4), budget=16, block=8, sinks=2, recent=4)
    return export(ExportConfig(str(source), str(folder / "bundle"), **flags), Progress(quiet=True), Engine)


class OtherAtFour(Engine):
    """An engine whose verify graph of width 4 gives the logits of position 9 another last bit."""

    def call(self, kind: str, tokens: Any, width: int | None = None) -> dict[str, np.ndarray]:
        out = super().call(kind, tokens, width)
        if (kind, width) == ("verify", 4) and self.position == 8:
            out["logits"][0, 1, 0] = np.nextafter(out["logits"][0, 1, 0], np.float32(np.inf))
        return out


class CountingOpen(Engine):
    """An engine that remembers the most graphs it held at once."""

    most = 0

    def _session(self, graph: Any) -> Any:
        session = super()._session(graph)
        self.most = max(self.most, len(self.sessions))
        return session


def test_int8_agrees_and_no_two_step_graphs_are_open_at_once(bundle: Bundle) -> None:
    """A 3B model's width test once held five copies of its weights: 18 GiB."""
    entry = bundle.model("target")
    engine = CountingOpen(bundle.path, entry, threads=1)
    assert entry.widths_agree
    assert disagreements(engine, sample_tokens(entry.spec.vocab)) == []
    assert engine.sessions == {}
    assert engine.most == 2  # a step graph, and the small commit graph


def test_a_closed_engine_opens_its_graphs_again(bundle: Bundle) -> None:
    engine = Engine(bundle.path, bundle.model("target"), threads=1)
    first = engine.prefill([3, 4, 5])
    second = engine.step(6)
    engine.close()
    engine.reset()
    assert np.array_equal(engine.prefill([3, 4, 5]), first)
    engine.close()  # the caches stay
    assert engine.step(6) == second


def test_one_bit_at_one_width_is_found_and_named(bundle: Bundle) -> None:
    entry = bundle.model("target")
    engine = OtherAtFour(bundle.path, entry, threads=1)
    (found,) = disagreements(engine, sample_tokens(entry.spec.vocab))
    assert (found.kind, found.width, found.position, found.what) == ("verify", 4, 9, "logits")
    assert 0 < found.difference < 1e-5
    assert not marked(entry, engine).widths_agree
