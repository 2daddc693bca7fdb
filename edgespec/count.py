"""What a bundle costs: bytes of weights a call reads, of caches, of inputs and outputs. Counts, never times.

Sizes come from the manifest. Operators and the weights each graph reads come from the graph files, where onnx
is installed; without it those fields are None. Intermediate activations and a backend's own memory (packed
copies of weights among them) are not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgespec.bundle import Bundle
from edgespec.errors import BundleError
from edgespec.policy import carries
from edgespec.spec import BYTES_PER_ELEMENT, GraphSpec, ModelEntry, TensorSpec

LOOKUPS = ("Gather", "GatherBlockQuantized")
_BITS = {
    1: 32,
    2: 8,
    3: 8,
    4: 16,
    5: 16,
    6: 32,
    7: 64,
    9: 8,
    10: 16,
    11: 64,
    12: 32,
    13: 64,
    16: 16,
    21: 4,
    22: 4,
}


@dataclass(frozen=True)
class GraphCost:
    """One graph: what a call of it reads (`bytes_weights` without rows that are looked up, `bytes_context`:
    head rows that the runtime fills) and takes.
    """

    model: str
    kind: str
    width: int
    bucket: int
    nodes: int | None
    ops: dict[str, int] | None
    bytes_weights: int | None
    bytes_context: int
    bytes_kv: int
    bytes_io: int


@dataclass(frozen=True)
class ModelCost:
    """One model: the bytes of its weights file, of its context rows, of its caches at the largest bucket, and
    of what its policy keeps beside rows: stored queries and carried scores.
    """

    model: str
    source: str
    bytes_weights: int
    bytes_context: int
    bytes_kv: int
    bytes_policy: int
    bytes_graphs: int
    precision: dict[str, str]


@dataclass(frozen=True)
class BundleCost:
    """Everything `inspect` shows; `bytes_memory` = weights + caches + graphs + the widest call's tensors."""

    bundle: str
    device: str
    models: tuple[ModelCost, ...]
    graphs: tuple[GraphCost, ...]
    bytes_disk: int
    bytes_io: int
    bytes_memory: int


def count(bundle: Bundle) -> BundleCost:
    """What the bundle costs on disk, in memory and per call."""
    files = bundle.manifest.files
    graphs = tuple(_count_graph(bundle, m, g) for m in bundle.manifest.models for g in m.graphs)
    models = tuple(_count_model(bundle, m) for m in bundle.manifest.models)
    weights = {m.weights for m in bundle.manifest.models}
    protos = {g.file for m in bundle.manifest.models for g in m.graphs}
    bytes_io = max((g.bytes_io for g in graphs), default=0)
    held = sum(files[name].bytes for name in weights | protos)
    held += sum(m.bytes_kv + m.bytes_policy + m.bytes_context for m in models)
    disk = sum(entry.bytes for entry in files.values())
    name, device = str(bundle.path), bundle.manifest.device
    return BundleCost(name, device, models, graphs, disk, bytes_io, held + bytes_io)


def bytes_kv(model: ModelEntry, bucket: int) -> int:
    """Bytes of all the model's cache buffers in a bucket: 2 L x KV x rows x d float32."""
    spec = model.spec
    return 2 * spec.layers * spec.kv_heads * model.cache.rows(bucket) * spec.head_dim * 4


def bytes_policy(model: ModelEntry) -> int:
    """Bytes of the block's last queries, L x W x H x d float32, and of carried scores, L x H x M float32."""
    spec, cache = model.spec, model.cache
    carried = cache.slots if carries(cache.policy) else 0
    return 4 * spec.layers * spec.heads * (cache.queries * spec.head_dim + carried)


def bytes_context(model: ModelEntry) -> int:
    """Bytes of a draft's context rows: R x hidden float32, read by each of its `draft` calls."""
    return 4 * model.context_rows * model.spec.hidden


def _count_model(bundle: Bundle, model: ModelEntry) -> ModelCost:
    files = bundle.manifest.files
    return ModelCost(
        model.name,
        model.source,
        files[model.weights].bytes,
        bytes_context(model),
        bytes_kv(model, model.cache.budget),
        bytes_policy(model),
        sum(files[name].bytes for name in {g.file for g in model.graphs}),
        model.precision,
    )


def _count_graph(bundle: Bundle, model: ModelEntry, graph: GraphSpec) -> GraphCost:
    caches = _bytes(t for t in graph.inputs if t.name.startswith(("keys", "values")))
    # Under the append contract the updated caches are the same buffers, bound as outputs.
    appended = _bytes(t for t in graph.outputs if t.name.startswith(("new_keys_", "new_values_")))
    context = _bytes(t for t in graph.inputs if t.name == "context")
    other = _bytes((*graph.inputs, *graph.outputs)) - caches - appended - context
    nodes, ops, weights = _read_onnx(bundle.file(graph.file), graph.width)
    sizes = (weights, context, caches, other)
    return GraphCost(model.name, graph.kind, graph.width, graph.bucket, nodes, ops, *sizes)


def _bytes(tensors: Iterable[TensorSpec]) -> int:
    return sum(BYTES_PER_ELEMENT[t.dtype] * math.prod(t.shape) for t in tensors)


def _read_onnx(path: Path, width: int) -> tuple[int | None, dict[str, int] | None, int | None]:
    """Nodes, operators by type, bytes of weights that a call of this width reads; weights stay on disk."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError:
        return None, None, None
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not an ONNX graph: {error}", "export the bundle again") from None
    ops = Counter(node.op_type for node in graph.node)
    streamed = {name for node in graph.node for i, name in enumerate(node.input) if not _looked_up(node, i)}
    read = 0
    for tensor in graph.initializer:
        size = _stored_bytes(tensor)
        read += size if tensor.name in streamed else min(size, size // max(1, tensor.dims[0]) * width)
    return len(graph.node), dict(sorted(ops.items())), read


def _looked_up(node: Any, i: int) -> bool:
    """True for a table of which a call reads only its own rows (a table's scales and zero points too)."""
    return node.op_type in LOOKUPS and i != 1


def _stored_bytes(tensor: Any) -> int:
    return math.prod(tensor.dims) * _BITS.get(tensor.data_type, 32) // 8
