"""Proves that an npu bundle runs on Qualcomm's NPUs: every graph compiles whole, and emulated steps give what
the same graph gives in float32 on this machine's CPU (which `check` compares with the checkpoint).

The emulator computes as the NPU does, in fp16: angles that fp16 cannot hold show far into a text, so steps
are emulated at the first position, at 1,000 and at the last one that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from edgespec.bundle import Bundle
from edgespec.errors import BundleError, InputError
from edgespec.exporters import qualcomm
from edgespec.exporters.compare import context_tokens, misplaced
from edgespec.exporters.findings import Finding
from edgespec.exporters.plan import shipped
from edgespec.exporters.widths import divergence
from edgespec.soc import NAMES, SOCS, Soc
from edgespec.spec import ABSORBING, CODED, STEPS, CompiledEntry, GraphSpec, ModelEntry, VisionEntry

FAR = 1000  # a position where angles computed in fp16 are off (design, section 3)
ROWS = 512  # most rows in a cache before a step
LARGEST_DIFFERENCE = 0.05  # of a logit or a new row, as a share of the largest one's size
LARGEST_KL = 0.02  # nats, mean over rows
# Where activations are codes, fp16 between them sends some to the next one, 0.8 % of a cache's largest;
# what follows is as far off as the codes themselves are from fp32 (KL 0.009 with the demo), in other places.
LARGEST_DIFFERENCE_CODED, LARGEST_KL_CODED = 0.15, 0.1
LEAST_LIKENESS = 0.98  # mean cosine of a picture's features
LEAST_KEPT = 0.97  # of a commit's rows, those that scores in fp32 keep
NEW = ("new_keys", "new_values", "new_queries")


@dataclass(frozen=True)
class Distance:
    """How far emulated calls are from the CPU's: the largest |difference| of logits and of new rows, as
    shares of the largest of their size; the mean KL in nats; the share of rows with the same argmax.
    """

    logits: float
    rows: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class Place:
    """A state that a step starts from: an engine's snapshot, and the tokens that follow. Its position is that
    of the step's first row, or, in the `last` place, of its last row.
    """

    position: int
    last: bool
    snapshot: Any
    following: list[int]

    def start(self, rows: int) -> int:
        """The position of the first of so many rows."""
        return self.position + 1 - rows if self.last else self.position


def check_qualcomm(
    bundle: Bundle,
    engine: Callable[..., Any],
    socs: Sequence[str],
    text: str | None,
    progress: Any,
) -> list[Finding]:
    """Findings over every graph of an opened npu bundle. `socs`: of edgespec.soc, none for the bundle's own,
    or all. BundleError for a bundle that is for a CPU, or compiled for other SoCs; InputError for an empty
    text.
    """
    chips = wanted(bundle, socs)
    tokenizer = tokenizers.Tokenizer.from_str(
        bundle.file(bundle.manifest.tokenizer.tokenizer).read_text("utf-8")
    )
    words = Path(text).read_text(encoding="utf-8") if text else shipped("wikitext")
    tokens = tokenizer.encode(words, add_special_tokens=False).ids
    if not tokens:
        raise InputError(f"text {text!r} holds no tokens", "give a longer file to --text, or leave it out")
    with progress.stage("compiling for Qualcomm") as advance:
        found = check_graphs(bundle, chips, advance)
    found += [check_compiled(bundle, entry.soc) for entry in bundle.manifest.compiled]
    refused = {f.name.split()[0] for f in found if not f.passed}
    for encoder in bundle.manifest.vision:
        if encoder.graph.file not in refused:
            with progress.stage(f"vision: emulated on {chips[0].name}"):
                found.append(check_encoder(bundle, encoder, engine, chips[0]))
    for entry in bundle.manifest.models:
        if refused & {graph.file for graph in entry.graphs}:
            continue
        cpu, npu = engine(bundle.path, entry), emulated(engine, bundle.path, entry, chips[0])
        with progress.stage(f"{entry.name}: emulated on {chips[0].name}") as advance:
            if entry.context_rows:
                found.append(check_context(bundle, entry, cpu, npu, tokens))
            found += check_steps(entry, cpu, npu, tokens, advance)
            found += check_commit(entry, cpu, npu, tokens)
    return found


def check_encoder(bundle: Bundle, entry: VisionEntry, engine: Callable[..., Any], soc: Soc) -> Finding:
    """A picture's features, emulated and on the CPU.

    Fewer tokens may part otherwise where two are alike to fp16's rounding, so a pruned encoder's are compared
    by their direction.
    """
    pixels = np.random.default_rng(0).standard_normal(entry.graph.inputs[0].shape).astype(np.float32)
    target = bundle.model("target")
    ours, theirs = (
        one.look(entry, pixels)[0]
        for one in (emulated(engine, bundle.path, target, soc), engine(bundle.path, target))
    )
    off = share(ours, theirs)
    likeness = float(
        ((ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)).mean()
    )
    passed = likeness >= LEAST_LIKENESS and (entry.method != "whole" or off <= LARGEST_DIFFERENCE)
    detail = f"features differ from the CPU's by up to {off:.2%} of the largest, mean cosine {likeness:.4f}"
    detail += f" (at least {LEAST_LIKENESS})"
    return Finding("vision emulated", passed, detail, {"share": off, "likeness": likeness})


def emulated(engine: Callable[..., Any], folder: Path, entry: ModelEntry, soc: Soc) -> Any:
    """An engine whose graphs run on an emulated SoC."""
    return engine(folder, entry, opener=lambda path: qualcomm.opened(path, soc))


def wanted(bundle: Bundle, names: Sequence[str]) -> list[Soc]:
    """The SoCs to check a bundle for; see check_qualcomm."""
    if bundle.manifest.device != "npu":
        raise BundleError(
            f"{bundle.path} is for device {bundle.manifest.device}, which no NPU runs",
            "export it again with --device npu",
        )
    own = tuple(entry.soc for entry in bundle.manifest.compiled)
    if own:
        for name in names:
            bundle.compiled(name)
    return [SOCS[name] for name in names or own or NAMES]


def check_graphs(bundle: Bundle, chips: Sequence[Soc], advance: Any) -> list[Finding]:
    """One finding for all graphs that compile whole, and one for each graph and reason that does not."""
    graphs = [graph for graphs in bundle.manifest.parts.values() for graph in graphs]
    why: dict[tuple[str, str], list[str]] = {}
    for i, graph in enumerate(graphs):
        for j, soc in enumerate(chips):
            if reason := qualcomm.outcome(bundle.file(graph.file), soc).refusal:
                why.setdefault((graph.file, reason), []).append(soc.name)
            advance(i * len(chips) + j + 1, len(graphs) * len(chips))
    names = ", ".join(soc.name for soc in chips)
    good = len(graphs) - len({file for file, _ in why})
    whole = Finding("qualcomm graphs", True, f"{good} compile whole for {names} by {qualcomm.COMPILER}", {})
    refused = [
        Finding(f"{file} for {', '.join(socs)}", False, f"the compiler leaves to the CPU: {reason}", {})
        for (file, reason), socs in why.items()
    ]
    return ([whole] if good else []) + refused


def check_compiled(bundle: Bundle, name: str) -> Finding:
    """The files of a SoC are that SoC's, and open nothing but the context binary that the manifest names.

    They are not emulated: the emulator opens no context of several graphs.
    """
    soc, entry = SOCS[name], bundle.compiled(name)
    wrong = [
        fault
        for part, graphs in bundle.manifest.parts.items()
        for graph in graphs
        if (fault := misstated(bundle, entry, part, graph, soc))
    ]
    size = sum(bundle.manifest.files[file].bytes for file in entry.contexts.values())
    sizes = f"{len(entry.graphs)} graphs in {len(entry.contexts)} contexts of {size / 2**20:,.1f} MiB"
    detail = f"{sizes}, by {entry.compiler}"
    return Finding(f"compiled for {name}", not wrong, "; ".join(wrong[:3]) or detail, {"bytes": float(size)})


def misstated(bundle: Bundle, entry: CompiledEntry, part: str, graph: GraphSpec, soc: Soc) -> str:
    """What a compiled graph's file says that the manifest does not; '' for nothing."""
    file = entry.graphs[graph.file]
    try:
        arch, number, contexts = qualcomm.stated(bundle.file(file))
    except Exception as error:  # protobuf raises its own kinds
        return f"{file} cannot be read: {qualcomm.first_line(error)}"
    if (arch, number) != (soc.htp_arch, soc.soc_model):
        other = next(
            (s.name for s in SOCS.values() if (s.htp_arch, s.soc_model) == (arch, number)), "another SoC"
        )
        return f"{file} is compiled for {other}, not for {soc.name}"
    own = Path(entry.contexts[part])
    if contexts != (own.name,) or Path(file).parent != own.parent:
        return f"{file} opens {', '.join(contexts)[:80]!a}, and the manifest names {own}"
    return ""


def check_steps(entry: ModelEntry, cpu: Any, npu: Any, tokens: Sequence[int], advance: Any) -> list[Finding]:
    """Every step of the largest bucket at each place, emulated and on the CPU, its parts in order; a finding
    a place.

    Prefill, whose many rows are slow to emulate, starts from the last place only.
    """
    starts = places(entry, cpu, tokens)
    npu.reset(entry.cache.budget)
    found: list[list[Distance]] = [[] for _ in starts]
    steps = [g for g in entry.graphs if g.kind in STEPS and g.bucket == entry.cache.budget]
    graphs = [g for g in steps if g.part == 0]
    for done, graph in enumerate(graphs):
        for place, distances in zip(starts, found, strict=True):
            if graph.kind not in ABSORBING or place is starts[-1]:
                distances.append(distance(cpu, npu, graph, place))
        cpu.close()  # a large model's weights fit in memory once, not once a graph
        npu.close()
        advance(done + 1, len(graphs))
    return [judged(entry, place, distances) for place, distances in zip(starts, found, strict=True)]


def places(entry: ModelEntry, cpu: Any, tokens: Sequence[int]) -> list[Place]:
    """The first position, FAR and the last, each with a text's rows before it.

    Compact positions are places in the cache: the last from which a block fits, and as many rows before it.
    """
    cache, compact = entry.cache, entry.cache.positions == "compact"
    room = entry.spec.positions - cache.block
    most = min(room, cache.budget) if compact else ROWS
    text = list(tokens) * (1 + (most + cache.block) // len(tokens))
    found = []
    for position in (0, most) if compact else (0, *([FAR] if room > FAR else []), room):
        rows = min(position, cache.budget, most)
        cpu.reset(cache.budget)
        cpu.position = position - rows
        done = 0
        while done < rows:
            some = text[done : min(rows, done + min(cpu.widths("prefill")[-1], cpu.free))]
            cpu.call("prefill", some)
            cpu.accept(len(some))
            done += len(some)
        last = position == room and not compact
        place = entry.spec.positions - 1 if last else position
        found.append(Place(place, last, cpu.snapshot(), text[done : done + cache.block]))
    return found


def distance(cpu: Any, npu: Any, graph: GraphSpec, place: Place) -> Distance:
    """One call of a graph, and of its step's other parts, from a place on both engines."""
    rows, made = 0, []
    for engine in (cpu, npu):
        engine.restore(place.snapshot)
        rows = min(graph.width, engine.free)
        engine.position = place.start(rows)
        engine.call(graph.kind, place.following[:rows], graph.width)
        made.append(valid(graph, engine.pending, rows))
    want, got = made
    shares = {name: share(got[name], want[name]) for name in want}
    agree = (got["logits"].argmax(-1) == want["logits"].argmax(-1)).mean()
    kl = divergence(want["logits"], got["logits"])
    return Distance(shares.pop("logits"), max(shares.values()), kl, float(agree))


def valid(graph: GraphSpec, made: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """What is compared, without padding: logits [R,V], new rows [L,KV,S,d], queries [S,L,H,d]."""
    logits = made["logits"][0, : 1 if graph.kind in ABSORBING else rows]
    kept = {name: made[name][:, :, :rows] for name in NEW[:2]}
    if "new_queries" in made:
        kept["new_queries"] = made["new_queries"][:rows]
    return {name: array.copy() for name, array in ({"logits": logits} | kept).items()}


def share(got: np.ndarray, want: np.ndarray) -> float:
    """The largest |difference| as a share of the largest size, or of 1 where that is 0; infinite where
    something is no number.
    """
    got, want = got.astype(np.float64), want.astype(np.float64)
    value = float(np.abs(got - want).max()) / (float(np.abs(want).max()) or 1)
    return value if value == value else float("inf")


def judged(entry: ModelEntry, place: Place, found: Sequence[Distance]) -> Finding:
    """The verdict on a place: the worst of its graphs."""
    worst = Distance(
        max(d.logits for d in found),
        max(d.rows for d in found),
        max(d.kl for d in found),
        min(d.agreement for d in found),
    )
    far, kl = LARGEST_DIFFERENCE, LARGEST_KL
    if entry.precision["linear"] in CODED:
        far, kl = LARGEST_DIFFERENCE_CODED, LARGEST_KL_CODED
    passed = max(worst.logits, worst.rows) <= far and worst.kl <= kl
    detail = (
        f"{len(found)} graphs differ from the CPU's: logits by up to {worst.logits:.2%} of the largest, "
        f"new rows {worst.rows:.2%} (at most {far:.0%}), KL {worst.kl:.1e} nats "
        f"(at most {kl}), argmax agrees {worst.agreement:.0%}"
    )
    return Finding(f"{entry.name} emulated at {place.position}", passed, detail, asdict(worst))


def check_context(bundle: Bundle, entry: ModelEntry, cpu: Any, npu: Any, tokens: Sequence[int]) -> Finding:
    """Fill a draft's context rows on both engines; they must be the same head rows, rounded to fp16."""
    own = np.frombuffer(bundle.file(entry.head_ids).read_bytes(), "<i4")
    for engine in (cpu, npu):
        engine.fill_context(context_tokens(list(tokens), own, entry.context_rows))
    found = share(npu.context["context"], cpu.context["context"])
    passed, limit = found <= LARGEST_DIFFERENCE, f"at most {LARGEST_DIFFERENCE:.0%}"
    detail = f"{entry.context_rows} differ by up to {found:.2%} of the largest number ({limit})"
    return Finding(f"{entry.name} context rows emulated", passed, detail, {"rows": found})


def check_commit(entry: ModelEntry, cpu: Any, npu: Any, tokens: Sequence[int]) -> list[Finding]:
    """The emulated commit graph keeps the rows that scores in fp32 keep, on keys of a text; a few near ties
    may differ.
    """
    if entry.cache.policy == "none" or all(entry.spec.windows):
        return []
    graph = next(g for g in entry.graphs if g.kind == "commit")
    session = npu.opener(npu.folder / graph.file)
    missed = compared = 0
    for layer, (given, _) in enumerate(cpu.commits(tokens)):
        if entry.spec.windows[layer]:
            continue
        feed = {t.name: given[t.name].reshape(t.shape) for t in graph.inputs}
        (kept,) = session.run(["keep"], feed)
        missed += misplaced(given, kept, entry)
        compared += kept.size
    kept_share = 1 - missed / compared
    rule = f"fp32 keeps by {entry.cache.policy} (at least {LEAST_KEPT:.0%})"
    detail = f"{kept_share:.2%} of {compared} rows are those that {rule}"
    return [Finding(f"{entry.name} commit emulated", kept_share >= LEAST_KEPT, detail, {"kept": kept_share})]
