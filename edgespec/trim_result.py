"""What trimming a draft's head gives and costs at each size. Plain facts, no tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrimRow:
    """A head of `size` rows, on held-out answers.

    `coverage`: share of the answers' tokens that the head or the context rows hold. `acceptance`: how likely
    a drafted token is accepted. `mbsu` = block efficiency / (1 + c gamma), at the `gamma` drafts a round that
    make it largest; c = bytes of a draft call / bytes of a target call.
    """

    size: int
    context_rows: int
    coverage: float
    acceptance: float
    block_efficiency: float
    gamma: int
    c: float
    mbsu: float


@dataclass(frozen=True)
class TrimResult:
    """Every size tried, with and without context rows, and the one chosen; `by_corpus` the same sizes on each
    corpus alone. A corpus of weight 0 was judged and not counted. `texts`: they were counted as they stand,
    else the target's answers were.

    `measured_with`: the draft whose proposals were counted, or what stands for them.
    """

    target: str
    measured_with: str
    corpora: dict[str, float]
    tokens_counted: int
    tokens_held_out: int
    always_kept: int
    size: int
    chosen: str
    rows: tuple[TrimRow, ...]
    by_corpus: dict[str, tuple[TrimRow, ...]] = field(default_factory=dict)
    texts: bool = False

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON data."""
        return asdict(self)

    def curve(self, with_context: bool) -> list[TrimRow]:
        """The rows with or without context rows, by size."""
        return sorted((r for r in self.rows if (r.context_rows > 0) == with_context), key=lambda r: r.size)

    def apart(self) -> dict[str, list[TrimRow]]:
        """Of each corpus, the head of the chosen size without and with context rows, and the whole head."""
        largest = max(r.size for r in self.rows)
        wanted = {(self.size, False), (self.size, True), (largest, False)}
        return {
            name: [r for r in rows if (r.size, r.context_rows > 0) in wanted]
            for name, rows in self.by_corpus.items()
        }


def best(rows: list[TrimRow]) -> TrimRow:
    """The row of the largest MBSU, the smaller head of equals."""
    return min(rows, key=lambda r: (-r.mbsu, r.size))
