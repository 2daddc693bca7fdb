"""Proves a bundle: graphs well formed and fixed, widths equal bit by bit, numbers the source's.

Every finding is printed with its figures; a miss fails the check. Where no checkpoint can be found
the numbers are not compared, and the check says so and fails: nothing counts as proven that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tokenizers

from edgespec.bundle import Bundle
from edgespec.errors import InputError
from edgespec.exporters.checkpoint import DEMO, Checkpoint, open_checkpoint
from edgespec.exporters.compare import (
    Figures,
    compare,
    compare_evicting,
    context_likeness,
    context_tokens,
    misplaced,
)
from edgespec.exporters.draft_checkpoint import OWN, open_draft
from edgespec.exporters.findings import CheckResult, Finding
from edgespec.exporters.plan import shipped
from edgespec.exporters.widths import disagreements
from edgespec.spec import STEPS, VISION, GraphSpec, ModelEntry

NEAR = 0.1  # nats between two widths whose kernels round otherwise (seen: 0.025, with 8-bit activations)
LEAST_LIKENESS = 0.98  # cosine of a context row and the checkpoint's; int4 has 0.99, another token's about 0
LARGEST_DIFFERENCE = 1e-4  # |Δlogit| of an fp32 graph against Transformers, or, of large logits,
LARGEST_SHARE = 1e-5  # of the largest one (`allowed` says why)
PERPLEXITY_GATE = 0.03  # a quantised target's perplexity above fp32
# What puts an image's tokens back in their places; a step graph writes nothing.
ENCODING = frozenset({("", "ScatterElements")})
PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that returns the n-th Fibonacci number, and explain its running time.",
    "안녕하세요! 서울에서 부산까지 어떻게 가는 것이 가장 빠른가요?",
)


def check(
    bundle: Bundle,
    engine: Callable[[Path, ModelEntry], Any],
    operators: frozenset[tuple[str, str]],
    source: str | None = None,
    text: str | None = None,
    self_only: bool = False,
    progress: Any = None,
    draft_source: str | None = None,
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
            stored = [(m.name, m.weights) for m in bundle.manifest.models]
            weights = dict(stored + [(VISION, v.weights) for v in bundle.manifest.vision])
            for part, graphs in bundle.manifest.parts.items():
                if bundle.manifest.format == "executorch":
                    findings += check_program(bundle, graphs, weights[part])
                else:
                    known = operators | (ENCODING if part == VISION else frozenset())
                    findings += [check_graph(bundle, graph, known) for graph in graphs]
            findings = (
                [merged(findings, bundle.manifest.format)]
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
        checkpoint: Checkpoint | None = None
        found: dict[str, Checkpoint | None] = {}
        for entry in bundle.manifest.models:
            named = draft_source if entry.name == "draft" else source
            checkpoint = find_source(bundle, entry, named, checkpoint)
            with progress.stage(f"{entry.name}: commit"):
                findings += check_commit(entry, engine(bundle.path, entry), ids(words))
            with progress.stage(f"{entry.name}: numbers") as advance:
                findings += check_numbers(bundle, entry, engine, ids(words), checkpoint, advance)
            found[entry.name] = checkpoint
        target = found["target"]
        if bundle.manifest.vision and target is not None:
            with progress.stage("vision: numbers"):
                from edgespec.exporters.check_images import check_images

                draft, entry = found.get("draft"), bundle.model("target")
                adapter = draft.adapter if draft else None
                findings += check_images(bundle, engine(bundle.path, entry), target, ids(words), adapter)
    return CheckResult(tuple(findings))


def merged(findings: Sequence[Finding], form: str) -> Finding:
    """One line for all graphs that passed."""
    what = "valid ONNX, fixed in every dimension, of the device's operators"
    if form == "executorch":
        what = "methods of ExecuTorch programs, with the manifest's tensors"
    return Finding("graphs", True, f"{len(findings)} are {what}", {})


def check_program(bundle: Bundle, own: Sequence[GraphSpec], weights: str) -> list[Finding]:
    """The ExecuTorch programs of these graphs: they open, and have the manifest's methods and tensors."""
    from edgespec.exporters.executorch_file import tensors

    findings = []
    for file in sorted({graph.file for graph in own}):
        try:
            found = tensors(bundle.file(file), bundle.file(weights))
        except RuntimeError as error:
            why = f"ExecuTorch refuses it: {str(error).strip().splitlines()[0]}"
            findings.append(Finding(file, False, why, {}))
            continue
        graphs = [graph for graph in own if graph.file == file]
        for graph in graphs:
            wanted = tuple([(t.dtype, t.shape) for t in side] for side in (graph.inputs, graph.outputs))
            same = found.get(graph.method) == wanted
            why = "" if same else f"the inputs or outputs of {graph.method} are not the manifest's"
            findings.append(Finding(file, same, why, {}))
        if odd := sorted(set(found) - {graph.method for graph in graphs}):
            findings.append(Finding(file, False, f"has the method {odd[0]}, which the manifest lacks", {}))
    return findings


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
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    defined = {(f.domain, f.name) for f in model.functions}
    foreign = sorted({(n.domain, n.op_type) for n in nodes} - operators - defined)
    if foreign:
        names = ", ".join(f"{domain}.{kind}" if domain else kind for domain, kind in foreign)
        return fail(f"has operators that the device lacks: {names}")
    return Finding(graph.file, True, "", {})


def check_widths(entry: ModelEntry, engine: Any, prompts: Sequence[Sequence[int]]) -> Finding:
    """All widths and buckets give a row the same bits.

    Where they do not, the manifest must say so, and the graphs must still be one model's: every one near the
    reference, which is the one whose numbers are compared.
    """
    name = f"{entry.name} widths"
    count = sum(g.kind in STEPS for g in entry.graphs)
    found = [d for prompt in prompts for d in disagreements(engine, prompt)]
    if not found:
        return Finding(name, True, f"{count} graphs give the same bits on {len(prompts)} prompts", {})
    worst = max(found, key=lambda d: (d.kl, d.difference) if d.kl == d.kl else (np.inf, np.inf))
    near = worst.kl <= NEAR
    detail = (
        f"{worst.kind} of width {worst.width} differs from position {worst.position} on "
        f"({worst.what}, by up to {worst.difference:.1e}, KL {worst.kl:.1e}, at most {NEAR}); the bundle "
        f"{'claims they agree' if entry.widths_agree else 'gives every call one width'}"
    )
    figures = {"difference": worst.difference, "kl": worst.kl}
    return Finding(name, near and not entry.widths_agree, detail, figures)


def check_commit(entry: ModelEntry, engine: Any, tokens: Sequence[int]) -> list[Finding]:
    """The commit graph keeps the rows that the same rule keeps on PyTorch tensors, on keys of a real text.

    Rows whose scores are within rounding of each other may change places.
    """
    if entry.cache.policy == "none" or all(entry.spec.windows):
        return []
    missed = compared = 0
    for layer, (given, kept) in enumerate(engine.commits(tokens)):
        if entry.spec.windows[layer]:
            continue
        missed += misplaced(given, kept, entry)
        compared += kept.size
    detail = f"{compared - missed} of {compared} rows are those that PyTorch keeps by {entry.cache.policy}"
    return [Finding(f"{entry.name} commit", missed == 0, detail, {"missed": float(missed)})]


def check_numbers(
    bundle: Bundle,
    entry: ModelEntry,
    engine: Any,
    tokens: list[int],
    checkpoint: Checkpoint | None,
    advance: Any,
) -> list[Finding]:
    """The graphs against the checkpoint that they came from."""
    name = f"{entry.name} numbers"
    if checkpoint is None:
        flag = "--source" if entry.name == "target" else "--draft-source"
        return [
            Finding(
                name, False, f"not compared: its source {entry.source} is not here; name it with {flag}", {}
            )
        ]
    ids = None
    if entry.head_ids:
        ids = np.frombuffer(bundle.file(entry.head_ids).read_bytes(), "<i4")
    exact = set(entry.precision.values()) == {"fp32"}
    runner, model, all_ids = engine(bundle.path, entry), checkpoint.load_model(), ids
    findings = []
    if ids is not None and entry.context_rows:
        given = context_tokens(tokens, ids, entry.context_rows)
        runner.fill_context(given)
        all_ids = np.concatenate([ids, given])
        findings.append(likened(context_likeness(runner, model), entry.context_rows))
    figures = compare(entry, runner, model, tokens, all_ids, advance)
    findings.append(judged(entry, figures, exact))
    if exact and entry.cache.policy != "none":
        difference, largest, evictions = compare_evicting(
            entry, engine(bundle.path, entry), checkpoint.load_model(), tokens, ids
        )
        detail = (
            f"|Δlogit| {difference:.1e} against a PyTorch cache over {evictions} evictions "
            f"(at most {allowed(largest):.1e})"
        )
        passed = difference <= allowed(largest)
        findings.append(Finding(f"{entry.name} eviction", passed, detail, {"difference": difference}))
    return findings


def likened(likeness: float, rows: int) -> Finding:
    """The verdict on context rows: each is the checkpoint's head row of its token."""
    detail = f"{rows} are the checkpoint's, least cosine {likeness:.4f} (at least {LEAST_LIKENESS})"
    return Finding("draft context rows", likeness >= LEAST_LIKENESS, detail, {"likeness": likeness})


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
        limit = allowed(f.largest)
        passed, detail = f.difference <= limit, f"{detail} (at most {limit:.1e})"
    elif entry.name == "target":
        passed, detail = rise <= PERPLEXITY_GATE, f"{detail} (at most {PERPLEXITY_GATE:+.0%})"
    return Finding(f"{entry.name} numbers", passed, detail, asdict(f))


def allowed(largest: float) -> float:
    """How far an fp32 graph's logits may be from logits of up to this size.

    Both round. Against fp64 with exact angles, which our tables hold, SmolLM2's graphs (logits to 41) are off
    by up to 1.0e-4, at position 313, and Transformers in fp32 by 2.4e-4, at 983: its angles are fp32.
    """
    return max(LARGEST_DIFFERENCE, LARGEST_SHARE * largest)


def find_source(
    bundle: Bundle, entry: ModelEntry, source: str | None, target: Checkpoint | None
) -> Checkpoint | None:
    """The checkpoint of a bundle's model, if it is here and is the one exported; InputError if it is another.

    `source` names it, else the manifest does. A draft needs its `target`'s, which comes before it.
    """
    first = entry.name == bundle.manifest.models[0].name
    word = entry.source if source is None else source
    if word not in ((DEMO,) if first else (DEMO, OWN)) and not Path(word).exists():
        return None
    if first:
        return same(bundle, entry, word, open_checkpoint(word))
    return None if target is None else same(bundle, entry, word, open_draft(word, target))


def same(bundle: Bundle, entry: ModelEntry, word: str, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, or InputError where the bundle's model came from another."""
    if checkpoint.digest != bundle.manifest.produced_by.get(f"{entry.name}_sha256"):
        raise InputError(
            f"{word} is not the checkpoint that this bundle's {entry.name} came from",
            f"name the right one with {'--source' if entry.name == 'target' else '--draft-source'}",
        )
    return checkpoint
