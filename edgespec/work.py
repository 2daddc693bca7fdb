"""What a model's calls read and compute, from a bundle's graphs or from a Shape in a stated precision. No
times.

Numbers of caches and activations are counted as numbers; how many bytes one takes is the device's matter
(an NPU keeps floats in two bytes), unless the precision says it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

from edgespec.bundle import Bundle
from edgespec.count import BundleCost, GraphCost, bytes_policy, count
from edgespec.errors import BackendError, InputError
from edgespec.shape import PRECISIONS, Precision, Shape, bytes_codes, bytes_matrix, padded
from edgespec.spec import ABSORBING, CODED, STEPS, VISION, ModelEntry

ARITHMETIC = {"int4": "int8", "int8": "int8", "fp16": "float", "fp32": "float"}


@dataclass(frozen=True)
class Work:
    """One call: bytes it moves, operations it does in an arithmetic, graphs that it starts.
    `bytes_widened` of its weights are codes that the call makes floats of before it multiplies.
    """

    bytes_weights: float
    bytes_widened: float
    bytes_kv: float
    bytes_activations: float
    ops: float
    arithmetic: str
    dispatches: int = 1

    @property
    def bytes_moved(self) -> float:
        """Weights, cache and activations."""
        return self.bytes_weights + self.bytes_kv + self.bytes_activations


@dataclass(frozen=True)
class Step:
    """A step's graphs: what a call reads but for its cache, whose buffers have `rows` rows; a draft's context
    rows are among its weights. `dispatches`: its graphs, one for each part of the model.
    """

    bytes_weights: int
    bytes_codes: int
    numbers_activations: int
    ops_weights: int
    width: int
    rows: int
    dispatches: int = 1

    def joined(self, other: Step) -> Step:
        """The step with a further part."""
        added = ("bytes_weights", "bytes_codes", "numbers_activations", "ops_weights", "dispatches")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in added})


@dataclass(frozen=True)
class ModelWork:
    """A model's step graphs by (kind, width, bucket), and the numbers that one layer of its policy's graphs
    takes and gives by (kind, bucket). `appends`: a call reads the filled part of its cache, else all of it.
    """

    name: str
    layers: int
    evicting_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    arithmetic: str
    bytes_cached: float | None
    bytes_activation: float | None
    appends: bool
    budget: int
    block: int
    buckets: tuple[int, ...]
    head_rows: int
    bytes_weights: int
    bytes_policy: int
    steps: dict[tuple[str, int, int], Step]
    policy: dict[tuple[str, int], int]

    @property
    def numbers_row(self) -> int:
        """Numbers of one cached row, over all layers: 2 L x KV x d."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def bytes_row(self, bytes_float: float) -> float:
        """Bytes of one cached row."""
        return self.numbers_row * (self.bytes_cached or bytes_float)

    def widths(self, kind: str) -> tuple[int, ...]:
        """The widths of a kind's graphs, ascending."""
        return tuple(sorted({width for k, width, _ in self.steps if k == kind}))

    def bucket(self, rows: int) -> int:
        """The smallest bucket whose slots hold so many rows."""
        return next((b for b in self.buckets if b + self.block >= rows), self.buckets[-1])

    def call(self, kind: str, width: int, bucket: int, filled: int, bytes_float: float) -> Work:
        """A call of a step graph over a cache of which `filled` rows are filled."""
        step = self.steps.get((kind, width, bucket))
        if step is None:
            raise InputError(
                f"the {self.name} has no {kind} graph of width {width}",
                "replay a trace with the bundle that it was recorded with",
            )
        rows = min(filled + width, step.rows) if self.appends else step.rows
        attended = rows if self.appends else rows + width
        attention = 4 * self.layers * self.heads * self.head_dim * width * attended
        return Work(
            step.bytes_weights,
            step.bytes_codes if self.arithmetic == "float" else 0,
            rows * self.bytes_row(bytes_float),
            step.numbers_activations * (self.bytes_activation or bytes_float),
            step.ops_weights + attention,
            self.arithmetic,
            step.dispatches,
        )

    def policy_call(self, kind: str, bucket: int, bytes_float: float) -> Work:
        """All layers of a commit, or of an observation of a block; layers with a window need no graph."""
        numbers = self.policy.get((kind, bucket if kind == "observe" else self.budget), 0)
        moved = self.evicting_layers * numbers * bytes_float
        return Work(0, 0, moved, 0, 0, "float", self.evicting_layers)


def of_bundle(bundle: Bundle, cost: BundleCost | None = None) -> dict[str, ModelWork]:
    """The work of a bundle's target, and of its draft and its image encoder if it has them, by graph."""
    cost = cost or count(bundle)
    made = {model.name: _of_entry(bundle, model, cost) for model in bundle.manifest.models}
    return made | ({VISION: _of_encoder(cost)} if bundle.manifest.vision else {})


def _of_entry(bundle: Bundle, model: ModelEntry, cost: BundleCost) -> ModelWork:
    spec, cache = model.spec, model.cache
    steps: dict[tuple[str, int, int], Step] = {}
    policy = {}
    for graph, read in zip(model.graphs, [g for g in cost.graphs if g.model == model.name], strict=True):
        if graph.kind in STEPS:
            key, part = (graph.kind, graph.width, graph.bucket), _step(read, cache.rows(graph.bucket))
            steps[key] = steps[key].joined(part) if key in steps else part
        else:
            tensors = (*graph.inputs, *graph.outputs)
            # a code is half a float
            sizes = [prod(t.shape) // (2 if t.dtype == "int8" else 1) for t in tensors]
            policy[graph.kind, graph.bucket] = sum(sizes)
    form = model.precision["linear"]
    arithmetic = ARITHMETIC[form] if bundle.manifest.device == "cpu" else "float"
    cached = activation = None
    if form in CODED:
        stored_as = PRECISIONS[form]
        arithmetic, cached, activation = (
            stored_as.arithmetic, stored_as.bytes_cached, stored_as.bytes_activation
        )  # fmt: skip
    held = next(m for m in cost.models if m.model == model.name)
    stored = held.bytes_weights + held.bytes_graphs + held.bytes_context
    return ModelWork(
        model.name, spec.layers, sum(window == 0 for window in spec.windows), spec.heads, spec.kv_heads,
        spec.head_dim, arithmetic, cached, activation, cache.contract == "append", cache.budget, cache.block,
        cache.buckets, model.head_rows, stored, bytes_policy(model), steps, policy,
    )  # fmt: skip


def _of_encoder(cost: BundleCost) -> ModelWork:
    """The image encoder, whose one call holds all its attention: it has no cache and no rows to attend to."""
    read = next(g for g in cost.graphs if g.model == VISION)
    held = next(m for m in cost.models if m.model == VISION)
    layers = max(1, (read.ops or {}).get("Softmax", 1))
    nothing = (0, 0, 0, 0, "float", None, None, False, 0, 0, (0,), 0)
    stored = held.bytes_weights + held.bytes_graphs
    return ModelWork(VISION, layers, *nothing, stored, 0, {(VISION, read.width, 0): _step(read, 0)}, {})


def _step(read: GraphCost, rows: int) -> Step:
    weights, codes = read.bytes_weights, read.bytes_codes
    ops, numbers = read.ops_weights, read.numbers_activations
    if weights is None or codes is None or ops is None or numbers is None:
        what = "onnx is not installed, which reads a graph's weights"
        raise BackendError(what, "pip install 'edgespec[onnx]'")
    return Step(weights + read.bytes_context, codes, numbers, ops, read.width, rows)


def of_shape(
    shape: Shape,
    stored: Precision,
    steps: Iterable[tuple[str, int]],
    budget: int,
    block: int,
    name: str = "target",
    head_rows: int = 0,
    appends: bool = False,
) -> ModelWork:
    """The work of a model that was not exported: these step graphs over a static cache of budget + block
    rows, or, where calls append, over buffers that hold a call's rows besides and are read as far as filled.

    `head_rows` 0: the head has a row for every token. A commit is KeyDiff's: it takes a layer's keys and
    gives the places of those that stay; under a static cache it takes and gives the rows themselves, or takes
    their codes.
    """
    rows = head_rows or shape.vocab
    products: list[Product] = [(shape.layers, stored.linear, n, k) for n, k in shape.matrices()]
    head: Product = (1, stored.head, rows, shape.hidden)
    read = sum(times * bytes_matrix(form, n, k) for times, form, n, k in (*products, head))
    shared = shape.tied and rows == shape.vocab and stored.embedding == stored.head
    table = 0 if shared else bytes_matrix(stored.embedding, shape.vocab, shape.hidden)
    norms = 4 * (2 * shape.layers + 1) * shape.hidden
    codes = sum(times * bytes_codes(form, n, k) for times, form, n, k in (*products, head))
    steps, made = tuple(steps), {}
    slots = budget + block + (max(width for _, width in steps) - 1 if appends else 0)
    for kind, width in steps:
        ops, numbers = _products(products, head, width, 1 if kind in ABSORBING else width)
        looked_up = width * bytes_matrix(stored.embedding, 1, shape.hidden)
        made[kind, width, budget] = Step(read + norms + looked_up, codes, numbers, ops, width, slots)
    row = shape.kv_heads * shape.head_dim
    places = (
        row * slots + shape.kv_heads * budget
    )  # takes keys, or the codes of keys and values; gives places
    taken = places if appends or stored.bytes_cached == 1 else 2 * row * (2 * budget + block)
    commit = {("commit", budget): taken}
    return ModelWork(
        name, shape.layers, shape.layers, shape.heads, shape.kv_heads, shape.head_dim, stored.arithmetic,
        stored.bytes_cached, stored.bytes_activation, appends, budget, block, (budget,), rows, read + table,
        0, made, commit,
    )  # fmt: skip


Product = tuple[int, str, int, int]


def _products(linears: Iterable[Product], head: Product, rows: int, head_rows: int) -> tuple[int, int]:
    """Operations of a call's products, each (times, form, outputs, inputs), and the numbers in and out."""
    ops = numbers = 0
    for own_rows, (times, form, n, k) in (*((rows, one) for one in linears), (head_rows, head)):
        ops += 2 * times * own_rows * n * padded(form, k)
        numbers += times * own_rows * (n + padded(form, k))
    return ops, numbers
