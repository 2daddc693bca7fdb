"""The figures that follow from a report's samples: speeds by category, BE, acceptance, MBSU, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgespec.bench_report import PLAIN, SPECULATIVE, Counted, ModelFacts, Report, Sample
from edgespec.samples import Spread, spread
from edgespec.spec import ABSORBING

ALL = "all"
SHORTEST = 8  # decoded tokens from which an answer's speed says anything
Key = tuple[str, int]


@dataclass(frozen=True)
class Figures:
    """One category's figures, or those of all prompts.

    `speedup` is plain decode time over speculative decode time of the same prompt in the same round, and
    `speedup_whole` the same with the prompt's time. BE = tokens decoded / verify calls, over all answers;
    gamma = draft calls / verify calls; MBSU = BE / (1 + c gamma). The VocabTrim paper (arXiv 2506.22694)
    takes parameters for c, embeddings included: `c_parameters`, `mbsu_parameters`. `acceptance[i]`: of the
    drafts judged at place i, the share that stood. A spread is None where no answer was long enough.
    """

    category: str
    prompts: int
    plain_tokens_per_s: Spread | None
    tokens_per_s: Spread | None
    speedup: Spread | None
    speedup_whole: Spread | None
    time_first_token_s: Spread | None
    block_efficiency: float
    block_efficiency_by_prompt: Spread | None
    c: float
    gamma: float
    mbsu: float
    c_parameters: float
    mbsu_parameters: float
    acceptance: tuple[float, ...]


@dataclass(frozen=True)
class Part:
    """A part of the time of speculative answers: all calls of one kind, or what is outside the graphs."""

    name: str
    calls: int
    time_s: float


def figures(report: Report) -> tuple[Figures, ...]:
    """A row for every category, in the suite's order, then one for all prompts."""
    names = dict.fromkeys(s.category for s in report.samples)
    ratio = c_parameters(report.bundle.models, report.counted)
    rows = [figures_of(name, [s for s in report.samples if s.category == name], ratio) for name in names]
    return (*rows, figures_of(ALL, report.samples, ratio))


def c_parameters(models: Sequence[ModelFacts], work: Sequence[Counted]) -> float:
    """The draft's parameters over the target's, embedding and head included; 0 without a draft."""
    found = {}
    by_name = {counted.facts["name"]: counted for counted in work}
    for facts in models:
        step = min(by_name[facts.name].steps, key=lambda s: (s.kind in ABSORBING, s.width))
        streamed = step.figures["ops_weights"] / (
            2 * step.width
        )  # every weight but the embedding's is multiplied once
        shared = facts.spec.tied and facts.head_rows == facts.spec.vocab
        found[facts.name] = streamed + (0 if shared else facts.spec.vocab * facts.spec.hidden)
    return found.get("draft", 0.0) / found["target"]


def figures_of(category: str, samples: Sequence[Sample], ratio: float) -> Figures:
    """The figures of plain and speculative samples together; `ratio` is c by parameters."""
    plain, ours = by_key(samples, PLAIN), by_key(samples, SPECULATIVE)
    verify = sum(s.verify_calls for s in ours.values())
    be = sum(s.tokens_decoded for s in ours.values() if s.verify_calls) / max(verify, 1)
    gamma = sum(s.draft_calls for s in ours.values()) / max(verify, 1)
    c = max((s.c for s in ours.values()), default=0.0)
    both = [(plain[key], s) for key, s in ours.items() if key in plain and _long(plain[key]) and _long(s)]
    return Figures(
        category,
        len({s.prompt for s in samples}),
        _spread(speed(s) for s in plain.values() if _long(s)),
        _spread(speed(s) for s in ours.values() if _long(s)),
        _spread(a.time_decode_s / b.time_decode_s for a, b in both),
        _spread(_whole(a) / _whole(b) for a, b in both),
        _spread(s.time_first_token_s for s in samples),
        be,
        _spread(s.tokens_decoded / s.verify_calls for s in ours.values() if s.verify_calls),
        c,
        gamma,
        be / (1 + c * gamma),
        ratio,
        be / (1 + ratio * gamma),
        acceptance(ours.values()),
    )


def by_key(samples: Iterable[Sample], way: str) -> dict[Key, Sample]:
    """The samples of one way by prompt and round."""
    return {(s.prompt, s.round): s for s in samples if s.way == way}


def speed(sample: Sample) -> float:
    """Decoded tokens a second."""
    return sample.tokens_decoded / sample.time_decode_s


def acceptance(samples: Iterable[Sample]) -> tuple[float, ...]:
    """The share of judged drafts that stood, by their place in the draft; ends where none was judged."""
    found = list(samples)
    places = max((len(s.drafted_by_position) for s in found), default=0)
    judged, stood = [0] * places, [0] * places
    for s in found:
        for i, (drafted, accepted) in enumerate(
            zip(s.drafted_by_position, s.accepted_by_position, strict=True)
        ):
            judged[i] += drafted
            stood[i] += accepted
    return tuple(a / b for a, b in zip(stood, judged, strict=True) if b)


def texts_different(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The prompts whose speculative text is not the plain one; greedy speculation must leave none."""
    plain, ours = by_key(samples, PLAIN), by_key(samples, SPECULATIVE)
    return tuple(
        dict.fromkeys(
            key[0] for key, s in ours.items() if key in plain and plain[key].text_sha256 != s.text_sha256
        )
    )


def memory_by_process(report: Report) -> dict[int, int]:
    """Peak bytes of each of the runtime's processes."""
    peaks: dict[int, int] = {}
    for s in report.samples:
        peaks[s.process] = max(peaks.get(s.process, 0), s.bytes_memory)
    return peaks


def parts(report: Report) -> tuple[Part, ...]:
    """Where the traced answers' time went, as measured; the largest part first."""
    calls: dict[str, list[float]] = {}
    for event in (event for traced in report.traces if not traced.device for event in traced.events):
        for model, kind, _, _, us in event.get("calls", ()):
            calls.setdefault(f"{model} {kind}", []).append(us * 1e-6)
    found = [Part(name, len(times), sum(times)) for name, times in calls.items()]
    traced = [s for s in report.samples if (s.way, s.round) == (SPECULATIVE, 0)]
    outside = sum(_whole(s) - s.time_graphs_s for s in traced)
    found.append(Part("outside the graphs", 0, max(outside, 0.0)))
    return tuple(sorted(found, key=lambda p: -p.time_s))


def _whole(sample: Sample) -> float:
    return sample.time_first_token_s + sample.time_decode_s


def _long(sample: Sample) -> bool:
    return sample.tokens_decoded >= SHORTEST and sample.time_decode_s > 0


def _spread(values: Iterable[float]) -> Spread | None:
    found = list(values)
    return spread(found) if found else None


def scaled(values: Spread, by: float) -> Spread:
    """A spread in another unit."""
    s = values
    return Spread(s.n, s.median * by, s.least * by, s.most * by, s.lower * by, s.upper * by)
