"""Ten thousand tokens in one session, cut back again and again: memory stays what it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from edgespec.config import ExportConfig
from edgespec.exporters import export
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.runtime.session import Runtime
from tests.helpers.running import PLAIN

TOKENS = 10_000
SANITIZED = os.environ.get("EDGESPEC_SANITIZE") == "1"


def flat(runtime: Runtime, prompt: list[int], turn: int) -> None:
    """Resident memory after every turn; the first turns touch what is there to be touched."""
    process, made, resident = runtime.process, 0, []
    process.ask("open", session="long")
    while made < TOKENS:
        process.ask("truncate", session="long", tokens=0)
        drafter = ("draft", "ngram", "both", "none")[len(resident) % 4]
        how = {"drafter": drafter, "stop_rule": "fixed", "stop_ids": [], "max_new_tokens": turn}
        done = process.ask("generate", session="long", tokens=prompt, **how)
        made += done["stats"]["tokens_new"]
        resident.append(done["stats"]["bytes_rss"])
    assert made >= TOKENS and len(resident) > 12
    settled = max(resident[:8])
    assert resident[-1] <= settled * 1.01, [r >> 10 for r in resident]


@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps what was freed, in quarantine")
def test_ten_thousand_tokens_of_a_tiny_model(opened: Callable[..., Runtime]) -> None:
    flat(opened(**PLAIN), [5, 6, 7, 8] * 20, 160)


@pytest.fixture
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    output = str(tmp_path_factory.mktemp("long") / "bundle")
    config = ExportConfig("demo", output, draft="demo", budget=256, block=64, draft_budget=64)
    export(config, Progress(quiet=True), Engine)
    with Runtime.open(output, threads=1) as runtime:
        yield runtime


@pytest.mark.slow
def test_ten_thousand_tokens_of_the_demo(demo: Runtime) -> None:
    flat(demo, demo.encode_raw("The lighthouse keeper saw a whale. ") * 4, 600)
