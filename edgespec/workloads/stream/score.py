"""How well feedback agrees with what should have been said, and when: the T-F-score of Stream-VLM (arXiv
2407.08101).

Knows times and texts. ROUGE-L is rouge-score's with its stemmer; METEOR is NLTK's with exact and stemmed
matches only, since WordNet, which it looks synonyms up in, has to be loaded from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from edgespec.console import load

WINDOW_S = 1.5
Said = tuple[float, str]  # when, and what


@dataclass(frozen=True)
class Score:
    """Pooled over clips. `delay_s`: median of when feedback began less when it should have, of matched
    pairs; `rouge_l` and `meteor` are means over them, None where nothing matched.
    """

    wanted: int
    said: int
    matched: int
    precision: float
    recall: float
    f1: float
    rouge_l: float | None
    meteor: float | None
    delay_s: float | None

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON data."""
        return asdict(self)


def matches(
    wanted: Sequence[Said], said: Sequence[Said], window_s: float = WINDOW_S
) -> list[tuple[int, int]]:
    """Pairs of indices: in order of time, each said one goes to the first wanted one that is still free,
    lies behind the last pair's and is at most `window_s` away.
    """
    pairs, at = [], 0
    for i, (time, _) in enumerate(said):
        while at < len(wanted) and wanted[at][0] < time - window_s:
            at += 1
        if at < len(wanted) and wanted[at][0] <= time + window_s:
            pairs.append((at, i))
            at += 1
    return pairs


def score(clips: Sequence[tuple[Sequence[Said], Sequence[Said]]], window_s: float = WINDOW_S) -> Score:
    """The score of clips, each what was wanted and what was said, both in order of time."""
    pairs = [(wanted[a], said[b]) for wanted, said in clips for a, b in matches(wanted, said, window_s)]
    all_wanted, all_said = (sum(len(clip[i]) for clip in clips) for i in (0, 1))
    precision, recall = len(pairs) / max(1, all_said), len(pairs) / max(1, all_wanted)
    f1 = 2 * precision * recall / (precision + recall) if pairs else 0.0
    texts = [(right[1], given[1]) for right, given in pairs]
    rouge_l, meteor = (_rouge_l(texts), _meteor(texts)) if pairs else (None, None)
    delay = median(given[0] - right[0] for right, given in pairs) if pairs else None
    return Score(all_wanted, all_said, len(pairs), precision, recall, f1, rouge_l, meteor, delay)


def _rouge_l(texts: Sequence[tuple[str, str]]) -> float:
    scorer = load("rouge_score.rouge_scorer", "RougeScorer", extra="workloads")(["rougeL"], use_stemmer=True)
    return mean(scorer.score(right, given)["rougeL"].fmeasure for right, given in texts)


class _NoSynonyms:
    """In the place of WordNet."""

    @staticmethod
    def synsets(word: str) -> list[Any]:
        return []


def _meteor(texts: Sequence[tuple[str, str]]) -> float:
    meteor = load("nltk.translate.meteor_score", "single_meteor_score", extra="workloads")
    words = load("nltk.tokenize", "wordpunct_tokenize", extra="workloads")
    return mean(meteor(words(right), words(given), wordnet=_NoSynonyms()) for right, given in texts)
