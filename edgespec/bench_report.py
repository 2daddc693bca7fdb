"""A benchmark's report as JSON: facts of the machine and the bundle, every raw sample, the traces.

Measured figures are not in it: they follow from the samples (bench_figures), so none can contradict them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgespec.bundle import Bundle
from edgespec.errors import BundleError, InputError
from edgespec.files import written_whole
from edgespec.plain import from_json
from edgespec.spec import CacheSpec, ModelSpec

SCHEMA = "edgespec.report/4"
PLAIN, SPECULATIVE = "plain", "speculative"
DEVICE = "profile "  # how a trace's table of call costs begins that was predicted for a device
AGAIN = "make it again: edgespec bench BUNDLE -o {}"


@dataclass(frozen=True)
class Environment:
    """The machine and its software; `governor` is empty, the temperature None where they cannot be read."""

    cpu: str
    cores: int
    threads: int
    system: str
    governor: str
    load_start: float
    temperature_start_c: float | None
    packages: dict[str, str]


@dataclass(frozen=True)
class ModelFacts:
    """What makes a model's figures comparable, and what identifies its weights."""

    name: str
    spec: ModelSpec
    cache: CacheSpec
    precision: dict[str, str]
    head_rows: int
    bytes_weights: int
    weights_sha256: str


@dataclass(frozen=True)
class BundleFacts:
    """Which bundle: `manifest_sha256` identifies all of it, graphs included."""

    name: str
    device: str
    manifest_sha256: str
    models: tuple[ModelFacts, ...]


@dataclass(frozen=True)
class CountedStep:
    """What a call of a step graph reads and computes: the fields of the latency model's Step by name."""

    kind: str
    width: int
    bucket: int
    figures: dict[str, int]


@dataclass(frozen=True)
class CountedPolicy:
    """The numbers that one layer of a policy's graph takes and gives."""

    kind: str
    bucket: int
    numbers: int


@dataclass(frozen=True)
class Counted:
    """A ModelWork in a report: graph by graph, what a replay needs. `facts` are its other fields."""

    facts: dict[str, Any]
    steps: tuple[CountedStep, ...]
    policy: tuple[CountedPolicy, ...]


@dataclass(frozen=True)
class Share:
    """A part of an answer's time on a device."""

    name: str
    time_s: float


@dataclass(frozen=True)
class Prediction:
    """A device's figures by replay of the traces: speeds over all prompts and by category, the median time
    to the first token, where the time goes. `kind` is the profile's, npu or cpu; `plain_tokens_per_s` of the
    same tokens, one a call; `fits`: the memory is within the device's limits (None: unknown).
    """

    profile: str
    kind: str
    tokens_per_s: float
    plain_tokens_per_s: float
    time_first_token_s: float
    bytes_memory: float
    fits: bool | None
    energy_j_per_token: float | None
    decided_by: str
    categories: dict[str, float]
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class BenchSettings:
    """How it was measured; `prompts_sha256` is over the prompts' texts, `costs` what the cost rule used."""

    suite: str
    prompts: int
    prompts_sha256: str
    tokens: int
    rounds: int
    warm_up: int
    threads: int
    drafter: str
    stop_rule: str
    draft_tokens: int
    costs: str


@dataclass(frozen=True)
class Sample:
    """One prompt answered once. `text_sha256` is over the answer's token ids; `c` the draft's bytes a call
    over the target's; `process` which of its contender's processes answered, `bytes_memory` its peak so far.
    """

    prompt: str
    category: str
    round: int
    process: int
    way: str
    tokens_prompt: int
    tokens_new: int
    verify_calls: int
    draft_calls: int
    drafted_by_position: tuple[int, ...]
    accepted_by_position: tuple[int, ...]
    time_first_token_s: float
    time_decode_s: float
    time_graphs_s: float
    c: float
    bytes_memory: int
    load: float
    temperature_c: float | None
    text_sha256: str

    @property
    def tokens_decoded(self) -> int:
        """Tokens after the first, which the prompt's last call gives."""
        return self.tokens_new - 1


@dataclass(frozen=True)
class Traced:
    """What the runtime recorded of one speculative answer: its prompt's calls, then every round's."""

    prompt: str
    category: str
    events: tuple[dict[str, Any], ...]

    @property
    def device(self) -> str:
        """The device whose predicted call costs ended its drafts; empty where the runtime's own did."""
        table = str(self.events[0].get("table", "")) if self.events else ""
        return table.removeprefix(DEVICE) if table.startswith(DEVICE) else ""


@dataclass(frozen=True)
class Report:
    """Everything a benchmark found. Reports with the same `run` were measured in turns, prompt by prompt."""

    run: str
    made: str
    environment: Environment
    bundle: BundleFacts
    counted: tuple[Counted, ...]
    settings: BenchSettings
    left_out: tuple[str, ...]
    predicted: tuple[Prediction, ...]
    samples: tuple[Sample, ...]
    traces: tuple[Traced, ...]


def bundle_facts(bundle: Bundle, digest: str) -> BundleFacts:
    """What a report says of a bundle."""
    files = bundle.manifest.files
    models = tuple(
        ModelFacts(
            m.name, m.spec, m.cache, m.precision, m.head_rows, files[m.weights].bytes, files[m.weights].sha256
        )
        for m in bundle.manifest.models
    )
    return BundleFacts(bundle.path.name, bundle.manifest.device, digest, models)


def write(report: Report, path: Path | str) -> None:
    """The report as JSON, a line for each sample and each trace; whole or not at all."""
    try:
        written_whole(Path(path), "\n".join(_lines(to_json(report))) + "\n")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}", "choose another with -o") from None


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain data."""
    return {"schema": SCHEMA, **asdict(report)}


def _lines(data: dict[str, Any]) -> Iterator[str]:
    yield "{"
    for i, (name, value) in enumerate(data.items()):
        end = "," if i < len(data) - 1 else ""
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            yield f" {json.dumps(name)}: ["
            for j, item in enumerate(value):
                yield f"  {json.dumps(item, allow_nan=False)}{',' if j < len(value) - 1 else ''}"
            yield f" ]{end}"
        else:
            yield f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}{end}"
    yield "}"


def read(path: Path | str) -> Report:
    """A report from its file; InputError for one that is damaged, of another schema, or without figures."""
    hint = AGAIN.format(path)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_nan)
    except OSError as error:
        raise InputError(f"report {path} cannot be read: {error.strerror}", hint) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"report {path} is no JSON: {error}", hint) from None
    schema = data.pop("schema", None) if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise InputError(f"report {path} is of schema {schema!r}, not {SCHEMA!r}", hint)
    try:
        report: Report = from_json(Report, data, "report")
    except BundleError as error:
        raise InputError(f"{path}: {error.message}", hint) from None
    check(report, str(path))
    return report


def check(report: Report, path: str) -> None:
    """InputError where a report holds nothing to compare, or a figure that cannot be."""
    hint = AGAIN.format(path)
    if not report.samples:
        raise InputError(f"report {path} holds no sample", hint)
    empty = next((t.prompt for t in report.traces if not t.events), None if report.traces else "any prompt")
    if empty:
        raise InputError(f"report {path} holds an empty trace of {empty}", hint)
    for s in report.samples:
        for name in ("time_first_token_s", "time_decode_s", "time_graphs_s", "load"):
            value = getattr(s, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"report {path}: {name} of prompt {s.prompt} is {value}", hint)


def _refuse_nan(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")
