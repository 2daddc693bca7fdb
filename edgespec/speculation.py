"""How good a bundle's drafts are: every drafter and stop rule at every temperature, beside plain decoding.

Decides the ways and puts their figures in rows; the answers come from the benchmark's loop (bench).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgespec.bench_figures import ALL, Figures, figures_of, texts_different
from edgespec.bench_report import PLAIN, SPECULATIVE, Sample
from edgespec.bench_table import spread_cell
from edgespec.rendering import grid, printed

LENGTHS = (1, 2, 4)  # drafts of one length, the plainest rule, for comparison
NGRAM = ("ngram", "cost", 0)


@dataclass(frozen=True)
class Way:
    """One way to answer: who drafts, when a draft ends, its length if fixed, and the temperature."""

    drafter: str
    stop_rule: str
    draft_tokens: int
    temperature: float

    @property
    def name(self) -> str:
        """As `draft fixed 4 at 0.7`."""
        length = f" {self.draft_tokens}" if self.draft_tokens else ""
        return f"{self.drafter} {self.stop_rule}{length} at {self.temperature:g}"


@dataclass(frozen=True)
class SpeculationRow:
    """A bundle's figures of a way in one category, or in all; `texts_different`: greedy answers that are not
    plain's.
    """

    bundle: str
    way: Way
    figures: Figures
    texts_different: int

    def to_json(self) -> dict[str, Any]:
        """One flat object with the figures' own names."""
        more = {"texts_different": self.texts_different, **asdict(self.figures)}
        return {"bundle": self.bundle, **asdict(self.way), **more}


@dataclass(frozen=True)
class Ratio:
    """MBSU of the bundle over that of the one beside it, of a way in one category, or in all."""

    way: Way
    category: str
    mbsu: float
    mbsu_beside: float

    @property
    def ratio(self) -> float:
        """Above 1 where the bundle is better."""
        return self.mbsu / self.mbsu_beside

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        more = {"category": self.category, "mbsu": self.mbsu, "mbsu_beside": self.mbsu_beside}
        return {**asdict(self.way), **more, "ratio": self.ratio}


ASSISTED = Way("transformers", "confidence", 0, 0.0)  # the baseline: another engine, its texts its own


def plain(temperature: float) -> Way:
    """Decoding without drafts."""
    return Way("none", "cost", 0, temperature)


def ways_of(has_draft: bool, temperatures: Sequence[float], most: int) -> list[Way]:
    """Every way, plain decoding first; without a draft model only prompt lookup drafts. `most` tokens fit a
    call."""
    kinds = [NGRAM]
    if has_draft:
        lengths = [n for n in LENGTHS if n < most]
        kinds += [("draft", rule, 0) for rule in ("cost", "adaedl", "confidence")]
        kinds += [("draft", "fixed", n) for n in (*lengths, most)]
        kinds += [("both", "cost", 0)]
    return [w for t in temperatures for w in (plain(t), *(Way(*kind, t) for kind in kinds))]


def rows(
    bundle: str, samples: Sequence[Sample], ways: Sequence[Way], c_parameters: float
) -> list[SpeculationRow]:
    """A row for every way but plain: all prompts first, then each category."""
    categories = list(dict.fromkeys(s.category for s in samples))
    found = []
    for way in ways:
        if way == plain(way.temperature):
            continue
        names = {plain(way.temperature).name: PLAIN, way.name: SPECULATIVE}
        both = [replace(s, way=names[s.way]) for s in samples if s.way in names]
        for category in (ALL, *categories):
            some = [s for s in both if category in (ALL, s.category)]
            wrong = 0 if way.temperature else len(texts_different(some))  # sampled texts differ by right
            found.append(SpeculationRow(bundle, way, figures_of(category, some, c_parameters), wrong))
    return found


def ratios(found: Sequence[SpeculationRow], beside: Sequence[SpeculationRow]) -> list[Ratio]:
    """MBSU of two bundles wherever the draft model drafts."""
    theirs = {(r.way, r.figures.category): r.figures.mbsu for r in beside}
    return [
        Ratio(r.way, r.figures.category, r.figures.mbsu, theirs[r.way, r.figures.category])
        for r in found
        if r.way.drafter in ("draft", "both")
    ]


def named(way: Way) -> tuple[str, str, str]:
    """A way's cells: as `draft`, `fixed 4` and `0.7`."""
    return way.drafter, f"{way.stop_rule} {way.draft_tokens or ''}".strip(), f"{way.temperature:g}"


def to_table(
    found: Sequence[SpeculationRow],
    facts: Mapping[str, Any],
    beside: Sequence[SpeculationRow] = (),
) -> str:
    """The rows over all prompts, a line each, then BE and speed of each category under the default rule.

    With rows of a bundle `beside`: these too, and MBSU of both.
    """
    head = (
        "bundle",
        "drafter",
        "rule",
        "T",
        "BE",
        "gamma",
        "c",
        "MBSU",
        "by parameters",
        "speed-up",
        "acceptance",
    )
    lines: list[tuple[str, ...]] = []
    for row in (r for r in (*found, *beside) if r.figures.category == ALL):
        way, f = row.way, row.figures
        speed = spread_cell(f.speedup, ".2f")
        places = " ".join(f"{a:.0%}" for a in f.acceptance)
        cells = (f"{f.block_efficiency:.2f}", f"{f.gamma:.2f}", f"{f.c:.3f}", f"{f.mbsu:.2f}")
        lines.append((row.bundle, *named(way), *cells, f"{f.mbsu_parameters:.2f}", speed, places))
    shown: list[Any] = [grid(head, lines, range(len(head)))]
    if beside:
        shown += ["\nMBSU of both", _of_both(found, beside)]
    first = ("draft" if any(r.way.drafter == "draft" for r in found) else "ngram", "cost", 0)
    parts: list[tuple[str, ...]] = []
    for row in found:
        if (row.way.drafter, row.way.stop_rule, row.way.draft_tokens) == first and row.way.temperature == 0:
            f = row.figures
            speed = "-" if f.speedup is None else f"{f.speedup.median:.2f}"
            parts.append((f.category, str(f.prompts), f"{f.block_efficiency:.2f}", f"{f.mbsu:.2f}", speed))
    if parts:
        title = f"\n{first[0]} {first[1]} at 0, by category"
        shown += [title, grid(("category", "prompts", "BE", "MBSU", "speed-up"), parts, range(5))]
    wrong = sum(r.texts_different for r in (*found, *beside) if r.figures.category == ALL)
    shown.append(f"\ngreedy texts that differ from plain decoding's: {wrong}")
    return printed([*shown, *(f"{name}: {value}" for name, value in facts.items())])


def _of_both(found: Sequence[SpeculationRow], beside: Sequence[SpeculationRow]) -> Any:
    """MBSU of two bundles over all prompts, a line a way."""
    lines = [
        (*named(r.way), *(format(x, ".3f") for x in (r.mbsu, r.mbsu_beside, r.ratio)))
        for r in ratios(found, beside)
        if r.category == ALL
    ]
    return grid(("drafter", "rule", "T", found[0].bundle, beside[0].bundle, "ratio"), lines, range(3))
