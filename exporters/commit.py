"""The commit: which N of a layer's M rows survive, as a small weight-free graph and as the same code run
eagerly; and `observe`, what a score that is carried from block to block adds after each.

Layers with a sliding window need no graph: they keep the newest N, whatever the policy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgespec.errors import BundleError
from edgespec.exporters.lower_codes import STEPS8
from edgespec.exporters.scores import Layer, carrying, score_of
from edgespec.exporters.to_onnx import to_onnx
from edgespec.spec import (
    CacheSpec,
    GraphSpec,
    ModelSpec,
    TensorSpec,
    kept_parts,
    policy_inputs,
    policy_outputs,
)

PROTECTED = 3e4  # above every score, and finite in fp16


def ranked(layer: Layer, cache: CacheSpec) -> Tensor:
    """Every row's score [KV,M], the protected ones' above all."""
    place = torch.arange(cache.slots)
    protected = (place < cache.sinks) | (place >= cache.slots - cache.recent)
    return torch.where(protected, PROTECTED, score_of(cache.policy)(layer))


def keep(layer: Layer, cache: CacheSpec) -> Tensor:
    """Ascending indices of the rows that survive: the first `sinks`, the last `recent`, then the best scores;
    of equal ones the older.

    M rows in order of position, their last block observed -> [KV,N] int32. Each key-value head keeps its own
    set (design, section 4).
    """
    scores = ranked(layer, cache)
    if cache.contract == "append":
        return without_worst(scores, cache.block)
    chosen = scores.topk(
        cache.budget, -1, sorted=False
    ).indices.float()  # float: some NPUs sort nothing else; exact below 2^24
    return chosen.topk(cache.budget, -1, largest=False).values.int()


def without_worst(scores: Tensor, worst: int) -> Tensor:
    """Ascending indices of all but so many of the worst of each row; of equal ones the newer goes.

    Few are sorted, where `keep` sorts all that stay: a CPU needs a fifth of the time. What an NPU lacks.
    """
    slots = scores.shape[-1]
    gone = slots - 1.0 - scores.flip(-1).topk(worst, -1, largest=False, sorted=False).indices.float()
    gone = gone.topk(worst, -1, largest=False).values
    before = (gone - torch.arange(worst)).long()  # of each that goes: how many stay before it
    steps = torch.zeros(scores.shape[0], slots - worst + 1).scatter_add(1, before, torch.ones_like(gone))
    return (steps.cumsum(1)[:, :-1] + torch.arange(slots - worst)).int()


def observed(layer: Layer, cache: CacheSpec) -> Layer:
    """The layer with this block in its carried score [H,M], 0 for slots that are free; itself where the
    policy carries none.
    """
    score = carrying(cache.policy)
    if score is None:
        return layer
    return replace(layer, carried=padded(score.observe(layer).flatten(0, 1), cache.slots))


def survivors(carried: Tensor, kept: Tensor, cache: CacheSpec) -> Tensor:
    """The carried score [H,M] of the rows that stay, at their new places."""
    group = carried.shape[0] // kept.shape[0]
    index = kept.long().repeat_interleave(group, 0)
    return padded(carried.gather(1, index), cache.slots)


def padded(carried: Tensor, slots: int) -> Tensor:
    """[H,n] as [H,M], zeros behind; by a Concat, which every NPU has."""
    missing = slots - carried.shape[1]
    zeros = (torch.arange(missing) * 0.0).expand(carried.shape[0], missing)
    return torch.cat([carried, zeros], 1) if missing else carried


@dataclass(frozen=True, eq=False)
class Turn:
    """The angles of 0..B positions, cos and sin [B+1,r], and which dimensions turn together.

    A commit graph holds them under their names, so that other policies' graphs can be made from it.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, block: int, interleaved: bool) -> Turn:
        """From a model's tables [positions,r], but for what it multiplies angles with (the cosine of 0)."""
        scaled = lambda table: (table[: block + 1].double() / cos[:1].double()).float()  # noqa: E731
        return cls(scaled(cos), scaled(sin), interleaved)

    def name(self, model: ir.Model) -> None:
        """Give a commit graph's tables their names, as `stored` looks for them."""
        held = model.graph.initializers
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            same = [
                v for v in held.values() if v.const_value is not None and equal(v.const_value.numpy(), table)
            ]
            for value in same[:1]:
                value.name = name
        model.metadata_props["interleaved"] = str(int(self.interleaved))

    @classmethod
    def stored(cls, file: Path) -> Turn:
        """The angles of a bundle's commit graph."""
        model = ir.load(file)
        held = {name: model.graph.initializers.get(name) for name in ("cos", "sin")}
        if any(value is None or value.const_value is None for value in held.values()):
            raise BundleError(
                f"{file.name} does not say by which angles it turns keys",
                "export the bundle again with this version of edgespec",
            )
        cos, sin = (torch.from_numpy(value.const_value.numpy().copy()) for value in held.values())
        return cls(cos, sin, model.metadata_props.get("interleaved") == "1")

    def back(self, keys: Tensor, steps: Tensor) -> Tensor:
        """Keys [KV,N,d] that turned with their position, so many positions back [KV,N]: k · R(-steps).

        Turns add up (RoFormer, arXiv 2104.09864), so the key is that of the earlier position.
        """
        c, s, r = self.cos[steps.long()], self.sin[steps.long()], self.cos.shape[-1]
        head, tail = keys[..., : 2 * r], keys[..., 2 * r :]
        a, b = (head[..., 0::2], head[..., 1::2]) if self.interleaved else (head[..., :r], head[..., r:])
        pair = (a * c + b * s, b * c - a * s)
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat([turned, tail], -1) if tail.shape[-1] else turned


def equal(array: np.ndarray, table: Tensor) -> bool:
    """True where both hold the same numbers."""
    return array.shape == tuple(table.shape) and np.array_equal(array, table.numpy())


def moved(keys: Tensor, kept: Tensor, turn: Turn | None) -> Tensor:
    """The kept keys [KV,N,d] of keys [KV,M,d]; with a turn, as if their places were their positions."""
    index = kept.long().unsqueeze(-1).expand(-1, -1, keys.shape[-1])
    rows = keys.gather(1, index)
    return rows if turn is None else turn.back(rows, kept - torch.arange(kept.shape[1]))


class Policy(nn.Module):
    """A layer's tensors by name, as `policy_inputs` lists them, to those that `policy_outputs` lists."""

    def __init__(
        self, kind: str, cache: CacheSpec, softcap: float, names: list[str], turn: Turn | None
    ) -> None:
        super().__init__()
        self.kind, self.cache, self.softcap, self.names, self.turn = kind, cache, softcap, names, turn

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """See the class; rows beyond the filled ones are left alone."""
        given, cache = dict(zip(self.names, tensors, strict=True)), self.cache
        end: int | Tensor = given.get("count", cache.slots)
        parts: dict[str, Any] = {
            part: given[part][:, :, : cache.slots].squeeze(0) for part in ("keys", "values") if part in given
        }
        queries, carried = given.get("queries"), given.get("carried")
        if carried is not None:  # a smaller bucket's buffers have fewer rows than it has places
            carried = carried[:, : parts["keys"].shape[1]]
        parts |= {"queries": queries, "carried": carried, "half": cache.contract == "rows"}
        layer = Layer(**parts, end=end, softcap=self.softcap)
        layer = observed(layer, cache)
        if self.kind == "observe":
            return (layer.carried,)
        made = [kept := keep(layer, cache)]
        for part in kept_parts(cache):
            made.append(moved(parts[part], kept, self.turn if part == "keys" else None)[None])
        if layer.carried is not None:
            made.append(survivors(layer.carried, kept, cache))
        return tuple(made)


def reads(cache: CacheSpec, kind: str = "commit") -> set[str]:
    """The parts of a layer that a graph of the policy is given."""
    score = carrying(cache.policy) if kind == "observe" else score_of(cache.policy)
    assert score is not None
    return {*score.reads, *(("keys", "values") if cache.contract == "rows" and kind == "commit" else ())}


def policy_graph(
    kind: str,
    spec: ModelSpec,
    cache: CacheSpec,
    file: str,
    bucket: int | None = None,
    turn: Turn | None = None,
) -> tuple[ir.Model, GraphSpec]:
    """A `commit` graph (over the largest bucket's buffers), or an `observe` graph of a bucket; every
    full-attention layer runs it on its own.

    The budget may be smaller than that bucket: a graph reads the first M = N + B rows.
    """
    module, graph = policy_module(kind, spec, cache, file, bucket, turn)
    if turn is None:
        made = _exported_once(kind, cache, spec.softcap, graph.inputs, graph.outputs)
        return ir.from_proto(made), graph
    model = exported(module, graph.inputs, graph.outputs)
    turn.name(model)
    return model, graph


@lru_cache(maxsize=64)
def _exported_once(
    kind: str,
    cache: CacheSpec,
    softcap: float,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
) -> onnx.ModelProto:
    """A graph that depends on nothing else: target and draft, and models of one shape, share it."""
    module = Policy(kind, cache, softcap, [t.name for t in inputs], None)
    return ir.to_proto(exported(module, inputs, outputs))


def policy_module(
    kind: str,
    spec: ModelSpec,
    cache: CacheSpec,
    file: str,
    bucket: int | None = None,
    turn: Turn | None = None,
) -> tuple[Policy, GraphSpec]:
    """The same, not yet a graph of any format."""
    bucket = bucket or cache.buckets[-1]
    inputs = policy_inputs(kind, reads(cache, kind), spec, cache, bucket)
    outputs = policy_outputs(kind, reads(cache, kind), spec, cache)
    module = Policy(kind, cache, spec.softcap, [t.name for t in inputs], turn)
    return module, GraphSpec(file, kind, cache.block, bucket, inputs, outputs)


def exported(module: nn.Module, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> ir.Model:
    """The module's graph with these tensors."""
    noise = torch.Generator().manual_seed(0)
    examples = tuple(
        torch.ones(1, dtype=torch.int32) if t.name == "count" else torch.randn(t.shape, generator=noise)
        for t in inputs
    )
    names = {"input_names": [t.name for t in inputs], "output_names": [t.name for t in outputs]}
    model = to_onnx(module, examples, **names)
    decode_inputs(model, inputs)
    for noted in (
        model,
        model.graph,
        *model.graph,
        *model.graph.inputs,
        *(v for n in model.graph for v in n.outputs),
    ):
        noted.metadata_props.clear()  # the exporter's notes: stack traces, with this machine's paths
    return model


def decode_inputs(model: ir.Model, inputs: tuple[TensorSpec, ...]) -> None:
    """Let those inputs that are codes of a cache come as such; the graph sees code/127."""
    held = model.graph.initializers
    for value, tensor in zip(model.graph.inputs, inputs, strict=True):
        if tensor.dtype != "int8":
            continue
        step = (np.float32(1 / STEPS8), np.int8(0))
        given = [
            ir.Value(name=f"{tensor.name}_{what}", const_value=ir.tensor(np.asarray(number)))
            for what, number in zip(("step", "zero"), step, strict=True)
        ]
        for constant in given:
            held.add(constant)
        node = ir.node("DequantizeLinear", [value, *given])
        made = node.outputs[0]
        made.name = f"{tensor.name}_seen"
        ir.convenience.replace_all_uses_with(value, made)
        node.replace_input_with(0, value)
        value.type = ir.TensorType(ir.DataType.INT8)
        model.graph.insert_before(model.graph[0], node)


def write_policy(
    prefix: Path, spec: ModelSpec, cache: CacheSpec, turning: Path | None = None
) -> tuple[GraphSpec, ...]:
    """Write the graphs of a policy that no bundle was exported with; their files are whole paths.

    Compact positions need a commit graph that turns keys by the model's angles.
    """
    turn = Turn.stored(turning) if cache.positions == "compact" and turning is not None else None
    made = policy_graphs(str(prefix), spec, cache, turn)
    for model, graph in made:
        ir.save(model, graph.file)
    return tuple(graph for _, graph in made)


def policy_graphs(
    name: str, spec: ModelSpec, cache: CacheSpec, turn: Turn | None = None
) -> list[tuple[ir.Model, GraphSpec]]:
    """All graphs of a model's policy; none where it does not evict. Compact positions need the turn."""
    made = []
    for kind, bucket in policy_kinds(cache):
        size = f"-{bucket}" if kind == "observe" and len(cache.buckets) > 1 else ""
        own = turn if kind == "commit" else None
        made.append(policy_graph(kind, spec, cache, f"{name}-{kind}{size}.onnx", bucket, own))
    return made


def policy_kinds(cache: CacheSpec) -> list[tuple[str, int]]:
    """Kind and bucket of every graph of a policy."""
    commits = [("commit", cache.buckets[-1])] if cache.policy != "none" else []
    return commits + [("observe", bucket) for bucket in cache.buckets if carrying(cache.policy)]
