"""What a manifest must mean to be a bundle: known words, numbers that agree, graphs of the contract's shapes.

Types are edgespec.spec's business and files are edgespec.bundle's; nothing here touches a disk.
"""

from __future__ import annotations

import re
from collections import Counter

from edgespec import policy
from edgespec.errors import BundleError, InputError
from edgespec.parts import MOST_PARTS, parts_of
from edgespec.soc import NAMES as SOCS
from edgespec.spec import (
    ABSORBING,
    BYTES_PER_ELEMENT,
    CACHED,
    CONTRACTS,
    DEVICES,
    FORMATS,
    KINDS,
    LAYER_CLASSES,
    MODELS,
    POSITIONS,
    PRECISIONS,
    STEPS,
    VISION_METHODS,
    CacheSpec,
    GraphSpec,
    Manifest,
    ModelEntry,
    ModelSpec,
    TensorSpec,
    TokenizerEntry,
    VisionEntry,
    context_tensors,
    policy_inputs,
    policy_outputs,
    step_inputs,
    step_outputs,
    vision_tensors,
)

LARGEST = {
    "layers": 2**10,
    "hidden": 2**20,
    "heads": 2**12,
    "kv_heads": 2**12,
    "head_dim": 2**14,
    "vocab": 2**24,
}
MOST_SLOTS = 2**24
MOST_GRAPHS = 2**10
LAYER = re.compile("[0-9]{1,4}", re.ASCII)
METHOD = re.compile("[a-z0-9_]{1,64}")


def check(manifest: Manifest) -> None:
    """Nothing, or a BundleError that names the first field which makes no sense."""
    _known(manifest.device, DEVICES, "device")
    _known(manifest.format, FORMATS, "format")
    names = [model.name for model in manifest.models]
    if sorted(names, reverse=True) not in (["target"], ["target", "draft"]):
        raise _fault("models", f"must be one target and at most one draft, not {ascii(names)[:60]}")
    for model in manifest.models:
        _check_model(model, manifest.device)
        _check_format(model, manifest.format)
    widths = {model.spec.hidden for model in manifest.models}
    if len(widths) > 1 and any(model.context_rows for model in manifest.models):
        raise _fault("models.draft.context_rows", "are the target's head rows, and the two have other widths")
    vocab = max(model.spec.vocab for model in manifest.models)
    _check_tokenizer(manifest.tokenizer, vocab)
    _check_vision(manifest)
    _check_compiled(manifest)
    for name, entry in manifest.files.items():
        if len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
            raise _fault(f"files[{name!r}].sha256", "is not 64 hexadecimal digits")


def _check_model(model: ModelEntry, device: str) -> None:
    where = f"models.{model.name}"
    _known(model.name, MODELS, "models")
    _check_spec(model.spec, f"{where}.spec")
    _check_cache(model.cache, device, f"{where}.cache")
    for layer_class, precision in model.precision.items():
        _known(layer_class, LAYER_CLASSES, f"{where}.precision")
        _known(precision, PRECISIONS, f"{where}.precision.{layer_class}")
    if not 1 <= model.head_rows <= model.spec.vocab:
        raise _fault(
            f"{where}.head_rows", f"is {model.head_rows}, not 1 to the vocabulary {model.spec.vocab}"
        )
    _check_context(model, where)
    if not all(model.parts) or sum(model.parts) != model.spec.layers or len(model.parts) > MOST_PARTS:
        raise _fault(f"{where}.parts", f"{list(model.parts[:8])} do not share out {model.spec.layers} layers")
    if len(model.graphs) > MOST_GRAPHS:
        raise _fault(f"{where}.graphs", f"are {len(model.graphs)}, more than {MOST_GRAPHS}")
    for graph in model.graphs:
        _check_graph(graph, model, f"{where}.{graph.file[:60]!a}")
    twice = Counter((g.kind, g.width, g.bucket, g.part) for g in model.graphs)
    for (kind, width, bucket, _), times in twice.items():
        if times > 1:
            raise _fault(f"{where}.graphs", f"hold {kind} of width {width} for bucket {bucket} twice")
    _check_complete(model, where)


def _check_format(model: ModelEntry, form: str) -> None:
    """An ExecuTorch program names a method for each graph, over caches of M slots; ONNX names none."""
    where = f"models.{model.name}"
    program = form == "executorch"
    if program and model.cache.contract != "rows":
        raise _fault(f"{where}.cache.contract", "is append, which no ExecuTorch program has")
    for graph in model.graphs:
        if program != bool(graph.method) or (program and not METHOD.fullmatch(graph.method)):
            raise _fault(f"{where}.graphs", f"hold the method {graph.method[:40]!a} in a bundle of {form}")
    if program and len({(g.file, g.method) for g in model.graphs}) < len(model.graphs):
        raise _fault(f"{where}.graphs", "name a method twice")


def _check_context(model: ModelEntry, where: str) -> None:
    """Context rows hold tokens that a draft's own, trimmed head lacks."""
    rows, most = model.context_rows, model.spec.vocab - model.head_rows
    if rows and (model.name != "draft" or not model.head_ids):
        raise _fault(f"{where}.context_rows", f"are {rows}, and only a draft's trimmed head has any")
    if rows > most:
        raise _fault(f"{where}.context_rows", f"are {rows}, and the head lacks {most} tokens")


def _check_spec(spec: ModelSpec, where: str) -> None:
    for name, most in LARGEST.items():
        if not 1 <= getattr(spec, name) <= most:
            raise _fault(f"{where}.{name}", f"is {getattr(spec, name)}, not 1 to {most}")
    if spec.heads % spec.kv_heads:
        raise _fault(f"{where}.kv_heads", f"{spec.kv_heads} does not divide heads {spec.heads}")
    if not 0 <= spec.softcap < 1e6:
        raise _fault(f"{where}.softcap", f"is {spec.softcap}, which caps nothing")
    if spec.positions < 1:
        raise _fault(f"{where}.positions", "is 0")
    if len(spec.windows) != spec.layers:
        raise _fault(f"{where}.windows", f"are {len(spec.windows)}, not one for each of {spec.layers} layers")


def _check_cache(cache: CacheSpec, device: str, where: str) -> None:
    _known(cache.contract, CONTRACTS, f"{where}.contract")
    if device == "npu" and cache.contract != "rows":
        raise _fault(f"{where}.contract", "is append, which no npu can run")
    _known(cache.positions, POSITIONS, f"{where}.positions")
    _known(cache.dtype, CACHED, f"{where}.dtype")
    if cache.dtype != "float32" and (cache.contract, cache.positions) != ("rows", "absolute"):
        raise _fault(
            f"{where}.dtype", f"is {cache.dtype}, which {cache.contract}, {cache.positions} caches are not"
        )
    if not 1 <= cache.block <= cache.budget:
        raise _fault(f"{where}.block", f"is {cache.block}, not 1 to the budget {cache.budget}")
    if cache.slots > MOST_SLOTS:
        raise _fault(f"{where}.budget", f"is absurdly large: {cache.budget}")
    buckets = cache.buckets
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[-1] != cache.budget:
        raise _fault(
            f"{where}.buckets", f"{list(buckets[:8])} must ascend and end with the budget {cache.budget}"
        )
    if buckets[0] < cache.block:
        raise _fault(f"{where}.buckets", f"hold {buckets[0]}, less than the block {cache.block}")
    if not 1 <= cache.widest <= cache.block:
        raise _fault(f"{where}.widest", f"is {cache.widest}, not 1 to the block {cache.block}")
    if not 0 <= cache.queries <= cache.block:
        raise _fault(f"{where}.queries", f"are {cache.queries}, not 0 to the block {cache.block}")
    try:
        policy.check(cache.policy, cache.sinks, cache.recent, cache.budget, cache.block)
    except InputError as error:
        raise _fault(f"{where}.policy", error.message) from None
    if (needed := policy.queries(cache.policy, cache.block, 1)) > cache.queries:
        raise _fault(f"{where}.queries", f"are {cache.queries}, and {cache.policy} reads {needed} or more")


def _check_graph(graph: GraphSpec, model: ModelEntry, where: str) -> None:
    cache, spec = model.cache, model.spec
    _known(graph.kind, KINDS, f"{where}.kind")
    if graph.bucket not in cache.buckets:
        raise _fault(f"{where}.bucket", f"{graph.bucket} is none of the cache's {list(cache.buckets[:8])}")
    if graph.part >= (len(model.parts) if graph.kind in STEPS else 1):
        raise _fault(f"{where}.part", f"is {graph.part}, which the {graph.kind} has not")
    for tensor in (*graph.inputs, *graph.outputs):
        _check_tensor(tensor, where)
    if graph.kind == "context":
        return _check_context_graph(graph, model, where)
    if graph.kind not in STEPS:
        return _check_policy_graph(graph, model, where)
    if not 1 <= graph.width <= cache.widest:
        raise _fault(f"{where}.width", f"is {graph.width}, not 1 to the widest {cache.widest}")
    fixed = {"decode": 1, "draft": 2, **dict.fromkeys(ABSORBING, cache.block)}.get(graph.kind, graph.width)
    if graph.width != fixed or (graph.kind == "verify" and graph.width < 2):
        raise _fault(f"{where}.width", f"is {graph.width}, which no {graph.kind} graph has")
    # Sizes first: the expected tensors are only built where the file has about as many.
    part, context = parts_of(model.parts)[graph.part], model.context_rows
    if not 0 <= len(graph.inputs) - 2 * len(part.layers) - 3 <= 2:
        raise _fault(f"{where}.inputs", f"are {len(graph.inputs)}, and it has {len(part.layers)} layers")
    inputs = step_inputs(graph.kind, graph.width, spec, cache.rows(graph.bucket), context, cache.dtype, part)
    _same(graph.inputs, inputs, f"{where}.inputs")
    sizes = (graph.width, spec, cache, graph.bucket, model.head_rows, _top(graph), context, part)
    _same(graph.outputs, step_outputs(graph.kind, *sizes), f"{where}.outputs")


def _top(graph: GraphSpec) -> int:
    """How many candidates a draft graph offers; any number will do."""
    return next((t.shape[-1] for t in graph.outputs if t.name == "top_ids" and t.shape), 1)


def _check_context_graph(graph: GraphSpec, model: ModelEntry, where: str) -> None:
    """A context graph looks up as many of the target's head rows at once as it is wide."""
    if not model.context_rows:
        raise _fault(f"{where}.kind", "is context, and the head has no context rows")
    if not 1 <= graph.width <= model.cache.widest:
        raise _fault(f"{where}.width", f"is {graph.width}, not 1 to the widest {model.cache.widest}")
    if graph.bucket != model.cache.budget:
        raise _fault(f"{where}.bucket", f"is {graph.bucket}, not the budget {model.cache.budget}")
    inputs, outputs = context_tensors(graph.width, model.spec.hidden)
    _same(graph.inputs, inputs, f"{where}.inputs")
    _same(graph.outputs, outputs, f"{where}.outputs")


def _check_policy_graph(graph: GraphSpec, model: ModelEntry, where: str) -> None:
    """A commit or observe graph reads parts of one layer; its width is the block."""
    if graph.width != model.cache.block:
        raise _fault(f"{where}.width", f"is {graph.width}, not the block {model.cache.block}")
    if graph.kind == "commit" and graph.bucket != model.cache.budget:
        raise _fault(f"{where}.bucket", f"is {graph.bucket}, not the budget {model.cache.budget}")
    reads = {"keys", *(tensor.name for tensor in graph.inputs)}
    inputs = policy_inputs(graph.kind, reads, model.spec, model.cache, graph.bucket)
    _same(graph.inputs, inputs, f"{where}.inputs")
    _same(graph.outputs, policy_outputs(graph.kind, reads, model.spec, model.cache), f"{where}.outputs")
    if "carried" in reads and not policy.carries(model.cache.policy):
        raise _fault(f"{where}.inputs", f"hold carried, which policy {model.cache.policy} has none of")
    if "queries" in reads and not model.cache.queries:
        raise _fault(f"{where}.inputs", "hold queries, and the cache keeps none")


def _check_tensor(tensor: TensorSpec, where: str) -> None:
    if tensor.dtype not in BYTES_PER_ELEMENT:
        raise _fault(f"{where}.{tensor.name[:40]!a}", f"has the unknown type {tensor.dtype[:20]!a}")
    if len(tensor.shape) > 8 or not all(1 <= size < 2**32 for size in tensor.shape):
        raise _fault(f"{where}.{tensor.name[:40]!a}", f"has the impossible shape {list(tensor.shape[:8])}")


def _same(found: tuple[TensorSpec, ...], expected: tuple[TensorSpec, ...], where: str) -> None:
    if len(found) != len(expected):
        raise _fault(where, f"are {len(found)}, not {len(expected)}")
    for have, want in zip(found, expected, strict=True):
        if have != want:
            text = f"{have.name[:40]!a} {have.dtype[:20]!a} {list(have.shape)}"
            raise _fault(where, f"hold {text} where {want.name} {want.dtype} {list(want.shape)} must be")


def _check_complete(model: ModelEntry, where: str) -> None:
    """Every bucket has what a runtime calls, and every step all its parts; where rows can be evicted there is
    a graph that chooses them.
    """
    steps = Counter((g.kind, g.width, g.bucket) for g in model.graphs if g.kind in STEPS)
    for (kind, width, bucket), parts in steps.items():
        if parts != len(model.parts):
            raise _fault(f"{where}.graphs", f"lack parts of {kind} of width {width} for bucket {bucket}")
    have = {(g.kind, g.bucket) for g in model.graphs}
    needed = ("prefill", "decode") if model.name == "target" else ("prefill", "draft")
    for bucket in model.cache.buckets:
        for kind in needed:
            if (kind, bucket) not in have:
                raise _fault(f"{where}.graphs", f"lack {kind} for bucket {bucket}")
    looked = sum(g.kind == "context" for g in model.graphs)
    if looked != (model.context_rows > 0):
        raise _fault(f"{where}.graphs", f"hold {looked} context graphs for {model.context_rows} context rows")
    wanted = [("commit", model.cache.budget)] if model.cache.policy != "none" else []
    if policy.carries(model.cache.policy):
        wanted += [("observe", bucket) for bucket in model.cache.buckets]
    for kind, bucket in wanted:
        if (kind, bucket) not in have:
            raise _fault(f"{where}.graphs", f"lack {kind} for policy {model.cache.policy}, bucket {bucket}")


def _check_vision(manifest: Manifest) -> None:
    """At most one image encoder, and models that take what it gives, in every bucket."""
    if len(manifest.vision) > 1:
        raise _fault("vision", f"are {len(manifest.vision)} image encoders, and a target has one")
    models = {model.name: model for model in manifest.models}
    reading = {"target"} if manifest.vision else set()
    if any(entry.draft_rows for entry in manifest.vision):
        reading.add("draft")
        if "draft" not in models:
            raise _fault("vision.draft_rows", "are of a draft, and there is none")
    for model in manifest.models:
        found = {g.bucket for g in model.graphs if g.kind == "embeds"}
        if found != (set(model.cache.buckets) if model.name in reading else set()):
            raise _fault(
                f"models.{model.name}.graphs", "hold embeds graphs for other buckets than images need"
            )
    for entry in manifest.vision:
        _check_encoder(entry, models, manifest.format == "executorch")


def _check_encoder(entry: VisionEntry, models: dict[str, ModelEntry], program: bool) -> None:
    target, draft = models["target"], models.get("draft")
    if entry.draft_rows > entry.rows:
        raise _fault("vision.draft_rows", f"are {entry.draft_rows}, more than the target's {entry.rows}")
    for name, most in (("size", 2**14), ("rows", target.spec.positions), ("tokens", 2**20)):
        if not 1 <= getattr(entry, name) <= most:
            raise _fault(f"vision.{name}", f"is {getattr(entry, name)}, not 1 to {most}")
    if entry.token >= target.spec.vocab:
        raise _fault("vision.token", f"is {entry.token}, and the vocabulary has {target.spec.vocab}")
    _known(entry.method, VISION_METHODS, "vision.method")
    if bool(entry.keeps) != (entry.method != "whole") or not all(
        LAYER.fullmatch(number) for number in entry.keeps
    ):
        raise _fault("vision.keeps", f"names layers in a way that {entry.method} does not")
    if any(not 1 <= count <= entry.tokens for count in entry.keeps.values()):
        raise _fault("vision.keeps", f"name counts of patches beyond 1 to {entry.tokens}")
    if program != bool(entry.graph.method) or (program and not METHOD.fullmatch(entry.graph.method)):
        raise _fault("vision.graph", f"has the method {entry.graph.method[:40]!a}, or none")
    if bool(entry.selectors) != (entry.method == "tosa"):
        raise _fault("vision.selectors", f"are {entry.selectors[:60]!a}, and the method is {entry.method}")
    own = (entry.draft_rows, draft.spec.hidden if draft else 0)
    graph, tensors = entry.graph, vision_tensors(entry.size, entry.rows, target.spec.hidden, *own)
    if (graph.kind, graph.width, graph.bucket, graph.part) != ("vision", entry.rows, 0, 0):
        raise _fault(
            "vision.graph", f"is a {graph.kind[:20]!a} of width {graph.width}, not vision of {entry.rows}"
        )
    _same(graph.inputs, tensors[0], "vision.graph.inputs")
    _same(graph.outputs, tensors[1], "vision.graph.outputs")


def _check_compiled(manifest: Manifest) -> None:
    """Each SoC once, and in it every graph of the bundle and one context for each model."""
    graphs = {graph.file for graphs in manifest.parts.values() for graph in graphs}
    models = set(manifest.parts)
    if manifest.compiled and manifest.format != "onnx":
        raise _fault("compiled", f"is of ONNX graphs, and the bundle of {manifest.format}")
    if manifest.compiled and manifest.device != "npu":
        raise _fault("compiled", f"is for an npu, and the bundle for {manifest.device}")
    for entry in manifest.compiled:
        where = f"compiled[{entry.soc[:40]!a}]"
        _known(entry.soc, SOCS, "compiled.soc")
        if sum(other.soc == entry.soc for other in manifest.compiled) > 1:
            raise _fault(where, "stands there twice")
        for name, found, wanted in (("graphs", entry.graphs, graphs), ("contexts", entry.contexts, models)):
            if odd := sorted(wanted ^ set(found)):
                raise _fault(
                    f"{where}.{name}", f"must name what the bundle holds, and differ in {odd[0][:60]!a}"
                )


def _check_tokenizer(tokenizer: TokenizerEntry, vocab: int) -> None:
    ids = [*tokenizer.stop_ids, *([] if tokenizer.bos_id is None else [tokenizer.bos_id])]
    if any(i >= vocab for i in ids):
        raise _fault("tokenizer", f"names the id {max(ids)}, and the vocabulary has {vocab}")


def _known(word: str, words: tuple[str, ...], where: str) -> None:
    if word not in words:
        raise _fault(where, f"{word[:40]!a} is none of {', '.join(words)}")


def _fault(where: str, what: str) -> BundleError:
    return BundleError(f"manifest.{where}: {what}", "export the bundle again with this version of edgespec")
