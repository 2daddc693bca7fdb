"""Puts a bundle together: which graphs a model gets, in which forms, and the manifest that says so.

The order of work keeps memory small: shapes first (no weights), graphs next, then the weights file,
parameter by parameter.
"""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from edgespec.bundle import SCHEMA
from edgespec.config import ExportConfig
from edgespec.errors import InputError
from edgespec.exporters.build import Builder
from edgespec.exporters.checkpoint import Checkpoint, Grid, Tokenizer, layer_of
from edgespec.exporters.commit import Turn, policy_graphs
from edgespec.exporters.cut import cut
from edgespec.exporters.forms import FORMS
from edgespec.exporters.lower_codes import Spans
from edgespec.exporters.lower_context import context_graph
from edgespec.exporters.lower_onnx import Lowering, Storage, Target
from edgespec.exporters.program import Program, build_program
from edgespec.exporters.step import skeleton
from edgespec.exporters.weights import Weights
from edgespec.parts import Part, part_name, parts_of
from edgespec.spec import (
    ABSORBING,
    CacheSpec,
    GraphSpec,
    Manifest,
    ModelEntry,
    ModelSpec,
    TokenizerEntry,
    VisionEntry,
    context_tensors,
)

DRAFT_WIDTH = 2  # after a fully accepted round the draft absorbs two tokens
CONTEXT_WIDTH = 4  # context rows that one call looks up; a round brings about one new token


@dataclass(frozen=True)
class Job:
    """One model of a bundle, decided: all that is left is work.

    `head_ids` are the rows a draft's head keeps, `context_rows` how many more it is given at run time,
    `spans` what its activations reach, where they are coded. A model that `reads_images` has `embeds`
    graphs beside its prefill. `counts` are the layers of its parts, none for a whole model.
    """

    name: str
    checkpoint: Checkpoint
    spec: ModelSpec
    cache: CacheSpec
    precision: dict[str, str]
    widths: tuple[int, ...]
    fused: bool
    head_ids: np.ndarray | None = None
    grids: dict[str, Grid] | None = None
    context_rows: int = 0
    spans: Spans | None = None
    reads_images: bool = False
    counts: tuple[int, ...] = ()

    def form(self, role: str, name: str) -> str:
        """The form of a parameter by its role and its name in the checkpoint."""
        at_an_end = layer_of(name) in (0, self.spec.layers - 1)
        return self.precision["ends" if role == "linear" and at_an_end and "ends" in self.precision else role]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that its layers are in."""
        return parts_of(self.counts or (self.spec.layers,))

    def target(self, kind: str, width: int, bucket: int, part: Part | None = None) -> Target:
        """What one of the step graphs is."""
        context = self.context_rows if kind == "draft" else 0
        return Target(
            kind, width, bucket, self.cache, self.fused, self.head_ids, self.head_rows, context, part
        )

    @property
    def head_rows(self) -> int:
        """Rows of the LM head."""
        return self.spec.vocab if self.head_ids is None else len(self.head_ids)

    @property
    def calls(self) -> list[tuple[str, int]]:
        """Kind and width of every step graph of one bucket."""
        absorbing = ABSORBING if self.reads_images else ("prefill",)
        absorbed = [(kind, self.cache.block) for kind in absorbing]
        if self.name == "draft":
            return [*absorbed, ("draft", DRAFT_WIDTH)]
        return [*absorbed, *(("verify", w) for w in self.widths), ("decode", 1)]

    @property
    def steps(self) -> list[tuple[str, int, int]]:
        """Kind, width and bucket of every step graph."""
        return [(kind, width, bucket) for bucket in self.cache.buckets for kind, width in self.calls]


class Source:
    """A job's parameters in their stored forms: which name means which rows of which tensor."""

    def __init__(
        self,
        job: Job,
        program: Program,
        model: nn.Module,
        aliases: dict[str, tuple[str, ...]],
        weights: Weights,
        target: Source | None,
    ) -> None:
        self.job, self.program, self.weights, self.aliases = job, program, weights, aliases
        names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        self.head = self.canonical(names[id(model.get_output_embeddings().weight)])
        self.embedding = self.canonical(names[id(model.get_input_embeddings().weight)])
        self.first = target
        self.target = target if target is not None and same_table(self, target) else None

    def canonical(self, name: str) -> str:
        """The checkpoint's name of a parameter that the model knows by several."""
        known = self.aliases.get(name, (name,))
        return next((n for n in known if n in self.job.checkpoint.names()), name)

    def storage(self) -> Storage:
        """What the lowering asks."""
        seen = [n for n in self.program.shapes if self.canonical(n) == self.head]
        tables = [n for n in self.program.shapes if self.canonical(n) == self.embedding]
        return Storage(self.place, self.plain, frozenset(seen), frozenset(tables), self.job.spans)

    def place(self, b: Builder, names: tuple[str, ...], role: str) -> tuple[Any, dict[str, ir.Value]]:
        """Parameters' form and arrays; the draft's embedding is the target's where the tables agree."""
        if role == "embedding" and self.target is not None:
            return self.target.place(b, (self.target.embedding,), role)
        stored = tuple(self.canonical(name) for name in names)
        form = FORMS[self.job.form(role, stored[0])]
        shapes = [
            self.program.shapes.get(name) or self.job.checkpoint.shape(self.canonical(name)) for name in names
        ]
        trimmed = role == "head" and self.job.head_ids is not None
        label = "head" if trimmed else stored[0] + (f"+{len(stored) - 1}" if len(stored) > 1 else "")
        parts = form.parts(sum(shape[0] for shape in shapes), shapes[0][1])
        make = functools.partial(self.encode, form, stored, self.job.head_ids if trimmed else None)
        return form, self.weights.parts(b, (label, form.name), parts, make)

    def encode(self, form: Any, names: tuple[str, ...], rows: np.ndarray | None) -> dict[str, np.ndarray]:
        """Parameters read, stacked and encoded; nothing of them stays in memory."""
        weights = [self.job.checkpoint.tensor(name).numpy() for name in names]
        grids = [self.grid(name) for name in names]
        weight = np.concatenate(weights) if len(weights) > 1 else weights[0]
        grid = None if any(g is None for g in grids) else stack([g for g in grids if g is not None])
        if rows is not None:
            weight = weight[rows]
            grid = None if grid is None else Grid(grid.codes[rows], grid.scale[rows], grid.low[rows])
        return form.encode(weight, grid).arrays

    def grid(self, name: str) -> Grid | None:
        """The 4-bit grid that a parameter was rounded to, or came on."""
        stored = self.canonical(name)
        return (self.job.grids or {}).get(stored) or self.job.checkpoint.grid(stored)

    def plain(self, b: Builder, name: str, offset: float) -> ir.Value:
        """A parameter or a buffer as float32 (a norm's scale with its offset added)."""
        constant, key = self.program.constants.get(name), (name, f"plain {offset}")
        if constant is not None and self.first is not None and key in self.first.weights.entries:
            theirs = self.first.program.constants.get(name)
            if theirs is not None and torch.equal(constant, theirs):  # the angles, stored with the target
                return self.first.plain(b, name, offset)
        shape = tuple(constant.shape) if constant is not None else self.program.shapes[name]
        make = lambda: {"": self.array(name) + np.float32(offset)}  # noqa: E731
        return self.weights.parts(b, key, {"": ("float32", shape)}, make)[""]

    def array(self, name: str) -> np.ndarray:
        """A parameter or a buffer as float32."""
        constant = self.program.constants.get(name)
        value = self.job.checkpoint.tensor(self.canonical(name)) if constant is None else constant.float()
        return value.numpy()

    def head_array(self) -> np.ndarray:
        """The rows that the head keeps, as float32."""
        whole = self.job.checkpoint.tensor(self.head).numpy()
        return whole if self.job.head_ids is None else whole[self.job.head_ids]


def stack(grids: list[Grid]) -> Grid:
    """Grids one below the other."""
    return Grid(*(np.concatenate([getattr(g, part) for g in grids]) for part in ("codes", "scale", "low")))


def alias(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter name with the other names of the same (tied) parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def same_table(draft: Source, target: Source) -> bool:
    """True where the draft's embedding is the target's, value by value."""
    ours, theirs = draft.job.checkpoint, target.job.checkpoint
    if ours.shape(draft.embedding) != theirs.shape(target.embedding):
        return False
    return torch.equal(ours.tensor(draft.embedding), theirs.tensor(target.embedding))


def export_model(
    job: Job, folder: Path, progress: Any, target: Source | None = None
) -> tuple[ModelEntry, Source]:
    """Write a model's graphs and weights into the folder."""
    source = traced(job, folder, progress, target)
    program, weights = source.program, source.weights
    graphs = []
    with progress.stage(f"{job.name}: graphs") as advance:
        jobs, programs = job.steps, cut(program, job.parts, job.spec.family)
        for done, step in enumerate(jobs):
            for part, own in zip(job.parts, programs, strict=True):
                graphs.append(step_graph(job, own, part, source, step, folder))
            advance(done + 1, len(jobs))
        for model, graph in policy_graphs(job.name, job.spec, job.cache, turn_of(program, job)):
            ir.save(model, folder / graph.file)
            graphs.append(graph)
        if job.context_rows and target is not None:
            graphs.append(save_context_graph(job, target, folder))
    with progress.stage(f"{job.name}: weights") as advance:
        total = len(weights.entries)
        written = iter(range(1, total + 1))
        weights.write(lambda key: advance(next(written), total))
    gc.collect()
    return entry_of(job, weights.name, graphs, folder), source


def traced(job: Job, folder: Path, progress: Any, target: Source | None) -> Source:
    """The model's program, its head trimmed as the job says, and where its parameters come from."""
    with progress.stage(f"{job.name}: trace"):
        bones = skeleton(job.checkpoint.config)
        if job.reads_images and type(bones.model.get_input_embeddings()) is not nn.Embedding:
            raise InputError(
                f"{job.spec.family} scales the embedding of words, which rows of an image must not be",
                "choose a model whose decoder does not (Llama, Mistral, Qwen)",
            )
        aliases = alias(bones.model)  # before the head is trimmed: a tied one is named after its embedding
        if job.head_ids is not None:
            trimmed = nn.Linear(job.spec.hidden, job.head_rows, bias=False, device="meta")
            bones.model.set_output_embeddings(trimmed)
        program = build_program(bones, job.spec)
    return Source(job, program, bones.model, aliases, Weights(f"{job.name}.data", folder), target)


def entry_of(job: Job, weights: str, graphs: list[GraphSpec], folder: Path) -> ModelEntry:
    """What the manifest says of a model; its head's ids are written into the folder."""
    return ModelEntry(
        job.name,
        job.checkpoint.source,
        job.spec,
        job.cache,
        dict(job.precision),
        weights,
        tuple(graphs),
        job.head_rows,
        save_ids(job, folder),
        True,
        tuple(len(part.layers) for part in job.parts),
        job.context_rows,
    )


def turn_of(program: Program, job: Job) -> Turn | None:
    """By which angles a commit turns keys, where it does; InputError where layers do not all turn alike."""
    spec, block = job.spec, job.cache.block
    if job.cache.positions != "compact":
        return None
    ropes: list[Any] = [n.inputs[1].producer() for n in program.graph if n.op_type == "Attend"]
    tables: list[Any] = [[v.producer() for v in n.inputs[1:3]] for n in ropes if n and n.op_type == "Rope"]
    names = {tuple(e.inputs[0].name for e in pair if e is not None) for pair in tables}
    kinds = {n.attributes["interleaved"].value for n in ropes if n and n.op_type == "Rope"}
    if len(tables) < spec.layers or len(names) != 1 or len(kinds) != 1:
        raise InputError(
            f"compact positions need layers that all turn their keys alike; those of {spec.family} do not",
            "leave --positions out",
        )
    cos, sin = (program.constants[name] for name in names.pop())
    return Turn.of(cos, sin, block, bool(kinds.pop()))


def save_ids(job: Job, folder: Path) -> str:
    """Write the token ids of a trimmed head's rows, int32; the file's name, empty for a whole head."""
    if job.head_ids is None:
        return ""
    (folder / f"{job.name}-head.ids").write_bytes(job.head_ids.astype("<i4").tobytes())
    return f"{job.name}-head.ids"


def save_context_graph(job: Job, target: Source, folder: Path) -> GraphSpec:
    """Write the graph that looks up rows of the target's head, as they are stored with the target."""
    width = min(CONTEXT_WIDTH, job.cache.widest)
    place = lambda b: target.place(b, (target.head,), "head")  # noqa: E731
    ir.save(
        context_graph(place, width, target.job.spec.vocab, job.spec.hidden, job.fused),
        folder / f"{job.name}-context.onnx",
    )
    tensors = context_tensors(width, job.spec.hidden)
    return GraphSpec(f"{job.name}-context.onnx", "context", width, job.cache.budget, *tensors)


def step_graph(
    job: Job, program: Program, part: Part, source: Source, step: tuple[str, int, int], folder: Path
) -> GraphSpec:
    """Lower one part of a step (its kind, width and bucket), whose program this is, and save it."""
    kind, width, bucket = step
    target = job.target(kind, width, bucket, part)
    model = Lowering(program, job.spec, source.storage(), target).run()
    size = f"-{width}" if kind == "verify" else ""
    cache = f"-{bucket}" if len(job.cache.buckets) > 1 else ""
    file = f"{part_name(job.name, part.number, len(job.parts))}-{kind}{size}{cache}.onnx"
    ir.save(model, folder / file)
    return GraphSpec(file, kind, width, bucket, *target.tensors(job.spec), part=part.number)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> TokenizerEntry:
    """Write tokenizer.json and the chat template; what the manifest says of them."""
    (folder / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
    template = "chat_template.jinja" if tokenizer.chat_template else ""
    if template:
        (folder / template).write_text(tokenizer.chat_template, encoding="utf-8")
    return TokenizerEntry("tokenizer.json", template, tokenizer.stop_ids, tokenizer.bos_id)


def manifest(
    config: ExportConfig,
    entries: list[ModelEntry],
    tokenizer: TokenizerEntry,
    jobs: list[Job],
    vision: tuple[VisionEntry, ...] = (),
) -> Manifest:
    """The manifest, but for its files, which are hashed when the bundle is sealed."""
    used = ("executorch",) if config.format == "executorch" else ("onnxruntime",)
    names = ("edgespec", "torch", "transformers", "onnx", "onnxscript", *used)
    tools = {name: version(name) for name in names}
    sources = {f"{job.name}_sha256": job.checkpoint.digest for job in jobs}
    made = (tools | sources, (), config.format, vision)
    return Manifest(SCHEMA, config.device, tuple(entries), tokenizer, {}, *made)
