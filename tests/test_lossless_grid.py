"""Greedy speculative text is plain text on SmolLM2 as it ships, over every pair of the ways to decode.

`scripts/lossless_grid` does the same over 60 prompts, and over every cell.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from edgespec.errors import InputError
from edgespec.exporters import export
from edgespec.exporters.plan import shipped
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.runtime.session import Runtime, Settings
from tests.helpers.grid import BLOCK, Cell, export_config, pairs, pairwise, whole

TOKENS = 20
ARTICLE = shipped("wikitext")[5000:6800]
PROMPTS = (
    "Explain how a refrigerator works.",
    "List the numbers from 1 to 40, one a line.",
    f"{ARTICLE}\nSummarise the text above.",  # about 420 tokens
    f"Repeat this text word for word.\n{ARTICLE[:1300]}",  # about 300
)


def test_the_array_is_small_and_covers_every_pair() -> None:
    cells = pairwise()
    assert len(cells) <= 16
    assert set().union(*map(pairs, cells)) == set().union(*map(pairs, whole()))


@pytest.mark.parametrize(
    "key", sorted({cell.bundle for cell in pairwise()}), ids=lambda k: "-".join(map(str, k))
)
def test_text_is_that_of_plain_decoding(key: tuple[str, int, str], tmp_path: Path) -> None:
    cells = [cell for cell in pairwise() if cell.bundle == key]
    export(export_config(key, str(tmp_path / "bundle")), Progress(quiet=True), Engine)
    compared = evicted = 0
    with Runtime.open(tmp_path / "bundle", 1) as runtime:
        for prompt in PROMPTS:
            ids = runtime.encode([{"role": "user", "content": prompt}])
            evicted += len(ids) > key[1] + BLOCK
            if key[0] == "none" and len(ids) > key[1] + BLOCK:
                with pytest.raises(InputError, match="slots of a cache without eviction"):
                    say(runtime, ids, None)
                continue
            plain = say(runtime, ids, None)
            for cell in cells:
                assert say(runtime, ids, cell) == plain, (str(cell), prompt[:40])
                compared += 1
    assert compared >= 2 * len(cells)
    assert (evicted > 0) == (key[1] == 256)


def say(runtime: Runtime, ids: list[int], cell: Cell | None) -> list[int]:
    session = runtime.session()
    session.generate(ids, cell.settings(TOKENS) if cell else Settings(TOKENS, drafter="none"))
    session.close()
    return session.tokens[len(ids) :]
