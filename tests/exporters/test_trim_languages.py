"""Why a bilingual model's draft is trimmed by both languages: on the real vocabulary of 128,256 tokens."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from edgespec.exporters.head import always_kept
from edgespec.exporters.tokenizer import Tokenizer
from edgespec.exporters.trim import Corpus, curve, judged, ranked, scores
from edgespec.exporters.trim_run import as_read
from edgespec.trim_result import TrimRow
from tests.helpers import vocabularies

VOCAB, SIZE = 128256, 4096
LETTERLESS = ["12:30 👍🏽 😂😂 3.14% ...", "010-1234-5678!! ~^^", "→ ₩5,000 / #1 @ 2026.11.27", "🇰🇷 2:1 🇯🇵"]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(vocabularies.llama3().to_str().encode(), "", (128009,), 128000)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Corpus, Corpus]]:
    """Of each language, what is counted and what is held out."""
    file = tmp_path_factory.mktemp("texts") / "letterless.txt"
    file.write_text("\n".join(LETTERLESS * 8), encoding="utf-8")
    files = {
        "english": vocabularies.DATA / "text" / "gpteacher_roleplay.json",
        "korean": vocabularies.DATA / "korean" / "ChatbotData.csv",
        "letterless": file,
    }
    return {
        name: Corpus(name, 1, as_read(tokenizer(), Path(path), 300)).split() for name, path in files.items()
    }


def trimmed(corpora: dict[str, tuple[Corpus, Corpus]], *counted: str) -> dict[str, TrimRow]:
    """A head of SIZE rows by these languages, judged on each."""
    kept = always_kept(tokenizer().tokenizer_json, tokenizer().stop_ids, "", VOCAB)
    order = ranked(scores([corpora[name][0] for name in counted], VOCAB), kept)
    found = {}
    for name, (_, held) in corpora.items():
        figures = judged(held, order, (SIZE,), (0,), None, lambda _: None)
        (found[name],) = curve(figures, (SIZE,), (0,), lambda size, rows: 0.05 + 0.3 * size / VOCAB)
    return found


def test_an_english_trim_fails_korean_and_a_bilingual_one_repairs_it(
    corpora: dict[str, tuple[Corpus, Corpus]],
) -> None:
    english, both = trimmed(corpora, "english"), trimmed(corpora, "english", "korean")
    assert english["korean"].coverage < 0.7 * english["english"].coverage
    assert english["korean"].block_efficiency < 0.7 * english["english"].block_efficiency
    assert both["korean"].coverage > english["korean"].coverage + 0.25
    assert both["korean"].mbsu > 1.3 * english["korean"].mbsu
    assert both["english"].coverage > english["english"].coverage - 0.05


def test_texts_without_a_letter_are_counted_like_any(corpora: dict[str, tuple[Corpus, Corpus]]) -> None:
    found = trimmed(corpora, "letterless")["letterless"]
    assert found.coverage == 1 and found.block_efficiency > 3


def test_what_a_text_is_read_as(tmp_path: Path) -> None:
    """A record's question with its answer; nothing that a model saw."""
    file = tmp_path / "ko.csv"
    file.write_text("Q,A,label\n안녕?,그래요.,0\n,,1\n", encoding="utf-8")
    (only,) = as_read(tokenizer(), file, 9)
    assert tokenizer().encoder.decode(only.tokens.tolist()) == "안녕?\n\n그래요."
    assert only.prompt == 1 and only.top_ids.shape == only.top_logp.shape == (len(only.tokens) - 1, 0)
    assert np.array_equal(np.unique(only.tokens) < VOCAB, np.ones(len(np.unique(only.tokens)), bool))
