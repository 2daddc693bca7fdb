"""What a bundle costs: bytes of weights a call reads, of caches, of inputs and outputs. Counts, never times.

Sizes come from the manifest. Operators, the weights each graph reads and its products come from the graph
files, where onnx is installed; without it those fields are None. Of intermediate activations only the
products' inputs and outputs are counted, and a backend's own memory (packed copies of weights among them)
is not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgespec.bundle import Bundle
from edgespec.errors import BundleError
from edgespec.policy import carries
from edgespec.pte import DELEGATE_NAME, MethodCost, read_pte
from edgespec.spec import ABSORBING, BYTES_PER_ELEMENT, VISION, GraphSpec, ModelEntry, TensorSpec, VisionEntry

INT8_EMBED = "Int8Embed"
LOOKUPS = ("Gather", "GatherBlockQuantized", INT8_EMBED)
ANGLES = {("AttendPacked", 6), ("AttendPacked", 7)}  # tables of cosines and sines
ENCODING = ("MatMul", "Gemm", "Conv")
INT4_LINEAR = ("Int4Linear", "Int4LinearRow")
PRODUCTS = ("MatMul", "MatMulNBits", "Int8Linear", *INT4_LINEAR)
WIDENED = ("Cast", "DequantizeLinear")  # what makes floats of a stored weight
_CODES = (2, 3, 21, 22)  # uint8, int8, uint4, int4
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
    """One graph: what a call of it reads (`bytes_weights` without rows that are looked up; `bytes_codes` of
    them are codes of up to 8 bits; `bytes_context`: head rows that the runtime fills), takes, and multiplies:
    operations with weights (two for each weight and row), numbers into and out of those products. A step of
    a model in parts is several graphs, one for each `part`.
    """

    model: str
    kind: str
    width: int
    bucket: int
    bytes_context: int
    bytes_kv: int
    bytes_io: int
    nodes: int | None = None
    ops: dict[str, int] | None = None
    bytes_weights: int | None = None
    bytes_codes: int | None = None
    ops_weights: int | None = None
    numbers_activations: int | None = None
    part: int = 0

    @property
    def delegates(self) -> int | None:
        """Calls of a backend's subgraph in an ExecuTorch method; None for other graphs."""
        return None if self.ops is None else self.ops.get(DELEGATE_NAME)


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
class CompiledCost:
    """A model's graphs (or those of one of its parts) as compiled for one SoC: which compiler made them, and
    the bytes of their context.
    """

    soc: str
    compiler: str
    model: str
    bytes_context: int


@dataclass(frozen=True)
class BundleCost:
    """Everything `inspect` shows; `bytes_memory` = weights + caches + graphs + the widest call's
    tensors, of the graphs that are not compiled.
    """

    bundle: str
    device: str
    models: tuple[ModelCost, ...]
    graphs: tuple[GraphCost, ...]
    bytes_disk: int
    bytes_io: int
    bytes_memory: int
    compiled: tuple[CompiledCost, ...] = ()
    format: str = "onnx"


def count(bundle: Bundle) -> BundleCost:
    """What the bundle costs on disk, in memory and per call."""
    files = bundle.manifest.files
    own = {model.name: model.graphs for model in bundle.manifest.models}
    own |= {VISION: tuple(v.graph for v in bundle.manifest.vision)}
    graphs = tuple(_count_graph(bundle, name, g) for name, held in own.items() for g in held)
    models = tuple(_count_model(bundle, m) for m in bundle.manifest.models)
    models += tuple(_count_encoder(bundle, v) for v in bundle.manifest.vision)
    weights = {m.weights for m in bundle.manifest.models} | {v.weights for v in bundle.manifest.vision}
    protos = {g.file for held in own.values() for g in held}
    bytes_io = max((g.bytes_io for g in graphs), default=0)
    held = sum(files[name].bytes for name in weights | protos)
    held += sum(m.bytes_kv + m.bytes_policy + m.bytes_context for m in models)
    disk = sum(entry.bytes for entry in files.values())
    name, device = str(bundle.path), bundle.manifest.device
    compiled = tuple(
        CompiledCost(entry.soc, entry.compiler, model, files[file].bytes)
        for entry in bundle.manifest.compiled
        for model, file in entry.contexts.items()
    )
    form = bundle.manifest.format
    return BundleCost(name, device, models, graphs, disk, bytes_io, held + bytes_io, compiled, form)


def bytes_kv(model: ModelEntry, bucket: int) -> int:
    """Bytes of all the model's cache buffers in a bucket: 2 L x KV x rows x d."""
    spec, element = model.spec, BYTES_PER_ELEMENT[model.cache.dtype]
    return 2 * spec.layers * spec.kv_heads * model.cache.rows(bucket) * spec.head_dim * element


def bytes_policy(model: ModelEntry) -> int:
    """Bytes of the block's last queries, L x W x H x d float32, and of carried scores, L x H x M
    float32.
    """
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


def _count_encoder(bundle: Bundle, entry: VisionEntry) -> ModelCost:
    files = bundle.manifest.files
    weights, graph = files[entry.weights].bytes, files[entry.graph.file].bytes
    form = {"patches": entry.method, "linear": "fp32"}
    return ModelCost(VISION, entry.family, weights, 0, 0, 0, graph, form)


def _count_graph(bundle: Bundle, model: str, graph: GraphSpec) -> GraphCost:
    caches = _bytes(t for t in graph.inputs if t.name.startswith(("keys", "values")))
    # Under the append contract the updated caches are the same buffers, bound as outputs.
    appended = _bytes(t for t in graph.outputs if t.name.startswith(("new_keys_", "new_values_")))
    context = _bytes(t for t in graph.inputs if t.name == "context")
    other = _bytes((*graph.inputs, *graph.outputs)) - caches - appended - context
    file = bundle.file(graph.file)
    read = _read_method(file, graph) if graph.method else _read_onnx(file, graph)
    sizes = {"bytes_context": context, "bytes_kv": caches, "bytes_io": other, **read}
    return GraphCost(model, graph.kind, graph.width, graph.bucket, **sizes, part=graph.part)


def _bytes(tensors: Iterable[TensorSpec]) -> int:
    return sum(BYTES_PER_ELEMENT[t.dtype] * math.prod(t.shape) for t in tensors)


def _read_method(path: Path, spec: GraphSpec) -> dict[str, Any]:
    """The fields of a GraphCost that only an ExecuTorch program's file tells."""
    stat = path.stat()
    method = _methods(path, stat.st_mtime_ns, stat.st_size).get(spec.method)
    if method is None:
        raise BundleError(f"{path} has no method {spec.method}", "export the bundle again")
    return {
        "nodes": sum(method.ops.values()),
        "ops": method.ops,
        "bytes_weights": method.bytes_weights,
        "bytes_codes": 0,
        "ops_weights": method.ops_weights,
        "numbers_activations": method.numbers_activations,
    }


@cache
def _methods(path: Path, *state: int) -> dict[str, MethodCost]:
    """A file of all methods of a model is read once; `state` tells one content from another."""
    return read_pte(path)


def _read_onnx(path: Path, spec: GraphSpec) -> dict[str, Any]:
    """The fields of a GraphCost that only its file tells, none of them without onnx; weights stay on disk."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError:
        return {}
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not an ONNX graph: {error}", "export the bundle again") from None
    ops = Counter(node.op_type for node in graph.node)
    uses: dict[str, list[Any]] = {}
    for node in graph.node:
        for i, name in enumerate(node.input):
            uses.setdefault(name, []).append((node, i))
    for node in reversed(graph.node):  # codes are read as their floats are
        if node.op_type == "DequantizeLinear":
            own = [use for use in uses[node.input[0]] if use[0] is not node]
            uses[node.input[0]] = own + uses.get(node.output[0], [])
    read = codes = 0
    for tensor in graph.initializer:
        size = _read_bytes(tensor, uses.get(tensor.name, []), spec.width)
        read += size
        codes += size if tensor.data_type in _CODES else 0
    products, numbers = _count_encoding(graph) if spec.kind == VISION else _count_products(graph, spec)
    return {
        "nodes": len(graph.node),
        "ops": dict(sorted(ops.items())),
        "bytes_weights": read,
        "bytes_codes": codes,
        "ops_weights": products,
        "numbers_activations": numbers,
    }


def _read_bytes(tensor: Any, uses: list[Any], width: int) -> int:
    """Bytes of a stored tensor that a call reads: of a table that is only looked up, `width` rows."""
    size = math.prod(tensor.dims) * _BITS.get(tensor.data_type, 32) // 8
    if not uses or not all(_looked_up(node, i) for node, i in uses):
        return size if uses else 0
    node = uses[0][0]
    last = len(tensor.dims) - 1 if node.op_type == INT8_EMBED else 0
    axis = next((a.i for a in node.attribute if a.name in ("axis", "gather_axis")), last)
    return min(size, size // max(1, tensor.dims[axis] if tensor.dims else 1) * width)


def _looked_up(node: Any, i: int) -> bool:
    """True for a table of which a call reads only its own rows (a table's scales and zero points too)."""
    ids = 0 if node.op_type == INT8_EMBED else 1
    return (node.op_type in LOOKUPS and i != ids) or (node.op_type, i) in ANGLES


def _count_products(graph: Any, spec: GraphSpec) -> tuple[int, int]:
    """Operations of a step graph's products with stored weights, and the numbers into and out of them.

    Every product has the call's rows, but for the head of a prefill, its last, which has one. What several
    products take (q, k and v) goes in once.
    """
    head = any(t.name == "logits" for t in spec.outputs)
    sizes = {t.name: tuple(t.dims) for t in graph.initializer if len(t.dims) > 1}
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type in WIDENED}
    products = []
    for node in graph.node:
        if node.op_type in PRODUCTS and (size := _weight_of(node, sizes, casts)):
            products.append((node.input[0], *size))
    ops = numbers = 0
    seen: set[str] = set()
    for place, (given, k, n) in enumerate(products, 1):
        rows = 1 if spec.kind in ABSORBING and head and place == len(products) else spec.width
        ops += 2 * rows * k * n
        numbers += rows * (n + (0 if given in seen else k))
        seen.add(given)
    return ops, numbers


def _count_encoding(graph: Any) -> tuple[int, int]:
    """Operations of all products of an image encoder's graph, and the numbers into and out of them.

    Those of attention are among them: what an encoder attends to is its own call's.
    """
    values = (*graph.value_info, *graph.input, *graph.output)
    sizes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
    weights = {t.name: tuple(t.dims) for t in graph.initializer}
    ops = numbers = 0
    for node in graph.node:
        if node.op_type not in ENCODING:
            continue
        if node.output[0] not in sizes or not {*node.input[:2]} <= {*sizes, *weights}:
            raise BundleError(
                f"the image encoder's graph lacks shapes (of {node.name})", "export the bundle again"
            )
        out = math.prod(sizes[node.output[0]])
        second = sizes.get(node.input[1]) or weights[node.input[1]]
        inner = second[-2] if node.op_type == "MatMul" else math.prod(second[1:])
        if node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute):
            inner = second[0]
        ops += 2 * out * inner
        numbers += out + sum(math.prod(sizes[name]) for name in node.input[:2] if name in sizes)
    return ops, numbers


def _weight_of(node: Any, sizes: dict[str, tuple[int, ...]], casts: dict[str, str]) -> tuple[int, int] | None:
    """(inputs, outputs) of the weight that a product multiplies with; None where it is no stored one."""
    name = casts.get(node.input[1], node.input[1])
    if name not in sizes:
        return None
    given = {a.name: a.i for a in node.attribute}
    if node.op_type == "MatMulNBits":
        return given["K"], given["N"]
    if node.op_type in INT4_LINEAR:
        return given["width"], given["height"]
    return sizes[name][-2], sizes[name][-1]
