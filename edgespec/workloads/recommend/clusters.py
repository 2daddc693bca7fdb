"""Fans into clusters: scikit-learn's TF-IDF of a fan's words, its strongest directions (LSA), and K-means.

All of it is learned from a sample of fans, however many there are, and then applied to each. Words of two
languages never meet, so plain K-means finds languages first. Two things join them: an artist's mark is the
same word in both, and what follows from the share of a fan's words that are Korean is taken out of every
direction (a linear fit). K centres span K - 1 directions; with the mean and the language, which go, K
clusters are sought in K + 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.metrics import silhouette_score
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from edgespec.errors import InputError
from edgespec.files import replaced
from edgespec.workloads.recommend.artists import MARK
from edgespec.workloads.recommend.tokens import HANGUL

SAMPLE = 8_000  # fans that the clusters are learned from
VOCABULARY = 8_192  # words at most, the most used ones
SHARED = 2  # fans that must use a word: one fan's own says nothing of others
MOST_CLUSTERS = 15  # that are tried where nobody says how many
SPARE = 1  # directions more than clusters
JUDGED = 2_000  # fans that a silhouette is computed over
STARTS = 8  # of K-means, of which the best stays
ARRAYS = ("weights", "directions", "mean", "korean", "slope", "centres")
Words = dict[str, int]


@dataclass(frozen=True)
class Places:
    """Where fans stand: a word's weight [V], directions [D, V], the clusters' centres [K, D].

    What is taken out of a fan's directions: `mean` [D], and `slope` [D] times the Korean share of their words
    beyond `korean` []. `silhouettes`: what each number of clusters got, where it was chosen so.
    """

    vocabulary: tuple[str, ...]
    weights: np.ndarray
    directions: np.ndarray
    mean: np.ndarray
    korean: np.ndarray
    slope: np.ndarray
    centres: np.ndarray
    silhouettes: dict[int, float]

    def vectors(self, fans: Sequence[Words]) -> Any:
        """TF-IDF rows [n, V], sparse, of length 1; a fan without a known word has a row of zeros."""
        made = _vectorizer(vocabulary={word: i for i, word in enumerate(self.vocabulary)})
        made.idf_ = self.weights
        return made.transform(fans)

    def distances(self, fans: Sequence[Words], vectors: Any) -> np.ndarray:
        """From each fan to each centre [n, K]; `vectors` are theirs."""
        shares = np.array([korean_share(words) for words in fans])
        points = vectors @ self.directions.T - self.mean - np.outer(shares - self.korean, self.slope)
        return euclidean_distances(normalize(points), self.centres)

    def nearest(self, fans: Sequence[Words], vectors: Any) -> tuple[np.ndarray, np.ndarray]:
        """Each fan's cluster [n] and the distance to its centre [n], of fans and their vectors; -1 and 0
        where none of a fan's words is known.
        """
        distances = self.distances(fans, vectors)
        known = vectors.getnnz(axis=1) > 0
        return np.where(known, distances.argmin(axis=1), -1), np.where(known, distances.min(axis=1), 0.0)

    def save(self, path: Path) -> None:
        """Keep it as arrays of numbers and texts, whole or not at all."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ARRAYS}
        arrays |= {
            "vocabulary": np.array(self.vocabulary),
            "tried": np.array([*self.silhouettes], dtype=np.int64),
            "silhouettes": np.array([*self.silhouettes.values()], dtype=np.float64),
        }

        def fill(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)

        replaced(path, fill)

    @classmethod
    def load(cls, path: Path) -> Places:
        """What was saved."""
        with np.load(path, allow_pickle=False) as file:
            tried = dict(zip(file["tried"].tolist(), file["silhouettes"].tolist(), strict=True))
            arrays = {name: file[name] for name in ARRAYS}
            return cls(tuple(file["vocabulary"].tolist()), **arrays, silhouettes=tried)


def korean_share(words: Words) -> float:
    """Which part of a fan's words is Korean, artists left out; a half where there is no other word."""
    counts = [(n, bool(HANGUL.fullmatch(word))) for word, n in words.items() if not word.startswith(MARK)]
    total = sum(n for n, _ in counts)
    return sum(n for n, korean in counts if korean) / total if total else 0.5


def fit(fans: Iterable[Words], clusters: int) -> Places:
    """The clusters of these fans; as many as asked for, or (0) as give the largest silhouette."""
    shares: list[float] = []

    def watched() -> Iterator[Words]:
        for words in fans:
            shares.append(korean_share(words))
            yield words

    with threadpool_limits(limits=1):  # sums in one order: the same posts give the same clusters
        made = _vectorizer(min_df=SHARED, max_features=VOCABULARY)
        try:
            rows = made.fit_transform(watched())
        except ValueError:  # an empty vocabulary
            raise InputError(
                "the fans' posts have no word in common", "give posts of at least two users who share words"
            ) from None
        placed = rows.getnnz(axis=1) > 0
        rows, korean = rows[placed], np.array(shares)[placed]
        wanted = (clusters or MOST_CLUSTERS) + SPARE
        directions = _directions(rows, wanted)
        points = rows @ directions.T
        mean, slope = points.mean(axis=0), _slope(points, korean)
        points = points - mean - np.outer(korean - korean.mean(), slope)
        silhouettes, means = _chosen(points, clusters)
        order = np.argsort(-np.bincount(means.labels_, minlength=len(means.cluster_centers_)), kind="stable")
    used = means.n_features_in_
    return Places(
        tuple(made.get_feature_names_out().tolist()),
        made.idf_,
        directions[:used],
        mean[:used],
        korean.mean(),
        slope[:used],
        means.cluster_centers_[order],
        silhouettes,
    )


def _words(counts: Words) -> list[str]:
    return [word for word in Counter(counts).elements() if word not in ENGLISH_STOP_WORDS]


def _vectorizer(**how: Any) -> TfidfVectorizer:
    return TfidfVectorizer(analyzer=_words, sublinear_tf=True, **how)


def _directions(rows: Any, wanted: int) -> np.ndarray:
    """The strongest directions of the rows [D, V], at most as many as wanted; a single word is its own."""
    if rows.shape[1] == 1:
        return np.ones((1, 1))
    with np.errstate(invalid="ignore"):  # shares of a variance that may be 0, which nobody reads
        found: np.ndarray = TruncatedSVD(min(wanted, *rows.shape), random_state=0).fit(rows).components_
    return found


def _slope(points: np.ndarray, korean: np.ndarray) -> np.ndarray:
    """How each direction changes with the Korean share: least squares [D]; 0 where all shares are one."""
    apart = korean - korean.mean()
    spread = float(apart @ apart)
    return apart @ points / spread if spread > 1e-9 else np.zeros(points.shape[1])


def _means(points: np.ndarray, clusters: int) -> tuple[KMeans, np.ndarray]:
    """K-means of the fans in as many directions as so many clusters need, and the points it saw."""
    seen = normalize(points[:, : clusters + SPARE])
    return KMeans(clusters, n_init=STARTS, random_state=0).fit(seen), seen


def _chosen(points: np.ndarray, clusters: int) -> tuple[dict[int, float], KMeans]:
    """The silhouettes of what was tried, and the K-means that stays; InputError for too many clusters."""
    different = len(np.unique(normalize(points).round(6), axis=0))
    if clusters > different:
        raise InputError(
            f"{clusters} clusters are more than the {different} fans whose words differ",
            f"use --clusters {different}, or fewer",
        )
    if clusters:
        return {}, _means(points, clusters)[0]
    judged = np.random.default_rng(0).permutation(len(points))[:JUDGED]
    found: dict[int, float] = {}
    best, kept = -1.0, _means(points, 1)[0]
    for number in range(2, min(MOST_CLUSTERS, different, len(points) - 1) + 1):
        means, seen = _means(points, number)
        if 1 < len(set(means.labels_[judged].tolist())) < len(judged):
            found[number] = float(silhouette_score(seen[judged], means.labels_[judged]))
            if found[number] > best:
                best, kept = found[number], means
    return found, kept
