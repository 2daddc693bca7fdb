"""Proves a bundle: graphs well formed and fixed, widths equal bit by bit, numbers the source's.

Every finding is printed with its figures; a miss fails the check. Where no checkpoint can be found
the numbers are not compared, and the check says so and fails: nothing counts as proven that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tokenizers

from edgespec.bundle import Bundle
from edgespec.errors import InputError
from edgespec.exporters.checkpoint import DEMO, Checkpoint, open_checkpoint
from edgespec.exporters.compare import Figures, compare, compare_evicting
from edgespec.exporters.plan import shipped
from edgespec.exporters.self_draft import draft_of
from edgespec.exporters.widths import disagreements
from edgespec.spec import GraphSpec, ModelEntry

LARGEST_DIFFERENCE = 1e-4  # |Δlogit| of an fp32 graph against Transformers
PERPLEXITY_GATE = 0.03  # a quantised target's perplexity above fp32
PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that returns the n-th Fibonacci number, and explain its running time.",
    "안녕하세요! 서울에서 부산까지 어떻게 가는 것이 가장 빠른가요?",
)


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: what, whether it holds, and the figures or the reason."""

    name: str
    passed: bool
    detail: str
    figures: dict[str, float]


@dataclass(frozen=True)
class CheckResult:
    """Every finding of a check."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """True where everything holds."""
        return all(f.passed for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The verdict and the findings as JSON data."""
        return {"passed": self.passed, "findings": [asdict(f) for f in self.findings]}

    def lines(self) -> list[str]:
        """One line a finding."""
        return [f"{'pass' if f.passed else 'FAIL'}  {f.name}: {f.detail}" for f in self.findings]


def check(
    bundle: Bundle,
    engine: Callable[[Path, ModelEntry], Any],
    operators: frozenset[tuple[str, str]],
    source: str | None = None,
    text: str | None = None,
    self_only: bool = False,
    progress: Any = None,
) -> CheckResult:
    """Check an opened bundle (its checksums are verified by opening it).

    `engine` runs a model's graphs, `operators` are the (domain, type) pairs that the device has.
    `self_only` repeats the width test alone, on the machine at hand.
    """
    findings: list[Finding] = []
    tokenizer = tokenizers.Tokenizer.from_str(
        bundle.file(bundle.manifest.tokenizer.tokenizer).read_text("utf-8")
    )
    ids = lambda words: tokenizer.encode(words, add_special_tokens=False).ids  # noqa: E731
    if not self_only:
        with progress.stage("graphs"):
            for entry in bundle.manifest.models:
                findings += [check_graph(bundle, graph, operators) for graph in entry.graphs]
            findings = (
                [merged(findings)]
                if all(f.passed for f in findings)
                else [f for f in findings if not f.passed]
            )
    for entry in bundle.manifest.models:
        with progress.stage(f"{entry.name}: widths"):
            findings.append(
                check_widths(entry, engine(bundle.path, entry), [ids(prompt) for prompt in PROMPTS])
            )
    if not self_only:
        words = Path(text).read_text(encoding="utf-8") if text else shipped("wikitext")
        for entry in bundle.manifest.models:
            with progress.stage(f"{entry.name}: numbers") as advance:
                findings += check_numbers(bundle, entry, engine, ids(words), source, advance)
    return CheckResult(tuple(findings))


def merged(findings: Sequence[Finding]) -> Finding:
    """One line for all graphs that passed."""
    return Finding(
        "graphs",
        True,
        f"{len(findings)} are valid ONNX, fixed in every dimension, of the device's operators",
        {},
    )


def check_graph(bundle: Bundle, graph: GraphSpec, operators: frozenset[tuple[str, str]]) -> Finding:
    """A graph file: valid, of fixed shapes, with the manifest's tensors and only operators of the device."""
    path = bundle.file(graph.file)
    fail = lambda why: Finding(graph.file, False, why, {})  # noqa: E731
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # the checker raises its own kinds, protobuf others
        return fail(f"the ONNX checker refuses it: {str(error).strip().splitlines()[0]}")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if not size.HasField("dim_value") or size.dim_value < 1:
                return fail(f"{value.name} has a dimension that is not fixed")
    for have, want in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
        shapes = [(v.name, tuple(d.dim_value for d in v.type.tensor_type.shape.dim)) for v in have]
        if shapes != [(t.name, t.shape) for t in want]:
            return fail("its inputs or outputs are not the manifest's")
    foreign = sorted({(n.domain, n.op_type) for n in model.graph.node} - operators)
    if foreign:
        names = ", ".join(f"{domain}.{kind}" if domain else kind for domain, kind in foreign)
        return fail(f"has operators that the device lacks: {names}")
    return Finding(graph.file, True, "", {})


def check_widths(entry: ModelEntry, engine: Any, prompts: Sequence[Sequence[int]]) -> Finding:
    """All widths and buckets give a row the same bits; where they do not, the manifest must say so."""
    name, count = (
        f"{entry.name} widths",
        len({(g.width, g.bucket) for g in entry.graphs if g.kind != "commit"}),
    )
    for prompt in prompts:
        if found := disagreements(engine, prompt):
            first = found[0]
            detail = (
                f"{first.kind} of width {first.width} differs at position {first.position} "
                f"({first.what}, by up to {first.difference:.1e}); the bundle "
                f"{'claims they agree' if entry.widths_agree else 'decodes through verify'}"
            )
            return Finding(name, not entry.widths_agree, detail, {"difference": first.difference})
    return Finding(name, True, f"{count} graphs give the same bits on {len(prompts)} prompts", {})


def check_numbers(
    bundle: Bundle, entry: ModelEntry, engine: Any, tokens: list[int], source: str | None, advance: Any
) -> list[Finding]:
    """The graphs against the checkpoint that they came from."""
    name = f"{entry.name} numbers"
    checkpoint = find_source(bundle, entry, source)
    if checkpoint is None:
        if entry.name == "draft":
            return [Finding(name, True, f"not compared: {entry.source} is not here", {})]
        return [Finding(name, False, f"not compared: {entry.source} is not here; name it with --source", {})]
    ids = None
    if entry.head_ids:
        ids = np.frombuffer(bundle.file(entry.head_ids).read_bytes(), "<i4")
    exact = set(entry.precision.values()) == {"fp32"}
    figures = compare(entry, engine(bundle.path, entry), checkpoint.load_model(), tokens, ids, advance)
    findings = [judged(entry, figures, exact)]
    if exact and entry.cache.policy != "none":
        difference, evictions = compare_evicting(
            entry, engine(bundle.path, entry), checkpoint.load_model(), tokens, ids
        )
        detail = (
            f"|Δlogit| {difference:.1e} against a PyTorch cache over {evictions} evictions "
            f"(at most {LARGEST_DIFFERENCE})"
        )
        findings.append(
            Finding(
                f"{entry.name} eviction", difference <= LARGEST_DIFFERENCE, detail, {"difference": difference}
            )
        )
    return findings


def judged(entry: ModelEntry, f: Figures, exact: bool) -> Finding:
    """The verdict: fp32 by |Δlogit|, a quantised target by perplexity, a quantised draft by none."""
    rise = f.perplexity / f.perplexity_source - 1
    detail = (
        f"perplexity {f.perplexity:.2f} against {f.perplexity_source:.2f} in fp32 ({rise:+.1%}), "
        f"KL {f.kl:.4f} nats, argmax agrees {f.agreement:.1%}, "
        f"|Δlogit| up to {f.difference:.1e}, {f.tokens} tokens"
    )
    passed = True
    if exact:
        passed, detail = f.difference <= LARGEST_DIFFERENCE, f"{detail} (at most {LARGEST_DIFFERENCE})"
    elif entry.name == "target":
        passed, detail = rise <= PERPLEXITY_GATE, f"{detail} (at most {PERPLEXITY_GATE:+.0%})"
    return Finding(f"{entry.name} numbers", passed, detail, asdict(f))


def find_source(bundle: Bundle, entry: ModelEntry, source: str | None) -> Checkpoint | None:
    """The checkpoint of a bundle's model, if it is here and is the one exported.

    InputError if it is another.
    """
    produced = bundle.manifest.produced_by
    layers = produced.get("draft_layers", "")
    own = entry.name == "draft" and layers
    word = source if source is not None and (entry.name == "target" or own) else entry.source
    if word != DEMO and not Path(word).exists():
        return None
    checkpoint = open_checkpoint(word)
    if checkpoint.digest != produced.get(f"{entry.name}_sha256"):
        raise InputError(
            f"{word} is not the checkpoint that this bundle's {entry.name} came from",
            "name the right one with --source",
        )
    return draft_of(checkpoint, tuple(int(i) for i in layers.split(","))) if own else checkpoint
