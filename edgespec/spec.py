"""What a bundle's parts are: frozen facts, and the names and shapes of the step graph's tensors. No tensors, no files.

Letters: S width, M slots = N + B, N budget, B block, L layers, KV key-value heads, d head dimension, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from edgespec.errors import BundleError

CONTRACTS = ("rows", "append")
KINDS = ("prefill", "verify", "decode", "draft", "commit")
DEVICES = ("cpu", "npu")
PRECISIONS = ("int4", "int8", "fp16", "fp32")


@dataclass(frozen=True)
class ModelSpec:
    """A decoder's facts. `windows` holds each layer's sliding window, 0 for full attention."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    tied: bool
    windows: tuple[int, ...]


@dataclass(frozen=True)
class CacheSpec:
    """A cache's facts: M = budget + block slots, the policy that empties it, and who appends rows (`contract`)."""

    contract: str
    budget: int
    block: int
    policy: str
    sinks: int
    recent: int
    buckets: tuple[int, ...]
    widest: int

    @property
    def slots(self) -> int:
        """M, the most rows a cache holds."""
        return self.budget + self.block

    def rows(self, bucket: int) -> int:
        """Rows of one layer's buffer in the graphs of a bucket: M, or M + S_max - 1 where the call itself appends."""
        return bucket + self.block + (self.widest - 1 if self.contract == "append" else 0)


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph: its name, ONNX element type (`float32`, `int32`) and fixed shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One graph file: its kind, width S, bucket (its cache's budget) and the tensors it takes and gives."""

    file: str
    kind: str
    width: int
    bucket: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class ModelEntry:
    """A target or draft in a bundle. `precision` maps a layer class (`linear`, `head`, `embedding`) to its form.

    `widths_agree`: every width gave the same bits when the bundle was made; if not, decoding goes through `verify`.
    """

    name: str
    source: str
    spec: ModelSpec
    cache: CacheSpec
    precision: dict[str, str]
    weights: str
    graphs: tuple[GraphSpec, ...]
    head_rows: int
    widths_agree: bool


@dataclass(frozen=True)
class TokenizerEntry:
    """Files of the tokenizer (`chat_template` may be empty) and the ids that end a text."""

    tokenizer: str
    chat_template: str
    stop_ids: tuple[int, ...]
    bos_id: int | None = None


@dataclass(frozen=True)
class FileEntry:
    """A file's checksum and size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything `manifest.json` says."""

    schema: int
    device: str
    models: tuple[ModelEntry, ...]
    tokenizer: TokenizerEntry
    files: dict[str, FileEntry]
    produced_by: dict[str, str] = field(default_factory=dict)


def step_inputs(kind: str, width: int, model: ModelSpec, rows: int) -> tuple[TensorSpec, ...]:
    """Inputs of a step graph: tokens [1,S], position [1], count [1], the row wanted (prefill), then 2L caches [1,KV,rows,d]."""
    cache = (1, model.kv_heads, rows, model.head_dim)
    head = [TensorSpec("tokens", "int32", (1, width)), TensorSpec("position", "int32", (1,)), TensorSpec("count", "int32", (1,))]
    if kind == "prefill":
        head.append(TensorSpec("row", "int32", (1,)))
    caches = [TensorSpec(f"{part}_{i}", "float32", cache) for part in ("keys", "values") for i in range(model.layers)]
    return tuple(head + caches)


def step_outputs(kind: str, width: int, model: ModelSpec, cache: CacheSpec, bucket: int, head_rows: int, top: int = 8) -> tuple[TensorSpec, ...]:
    """Outputs of a step graph: logits [1,R,head rows], argmax [1,R] (R = 1 in prefill, else S), then the new rows.

    A draft also gives entropy [1,S] in nats and its top-k (probabilities and target ids) [1,S,k]. New rows are
    [L,KV,S,d] under the `rows` contract, and the 2L updated buffers under `append`.
    """
    rows = 1 if kind == "prefill" else width
    head = [TensorSpec("logits", "float32", (1, rows, head_rows)), TensorSpec("argmax", "int32", (1, rows))]
    if kind == "draft":
        head += [TensorSpec("entropy", "float32", (1, rows)), TensorSpec("top_probabilities", "float32", (1, rows, top)),
                 TensorSpec("top_ids", "int32", (1, rows, top))]
    if cache.contract == "rows":
        shape = (model.layers, model.kv_heads, width, model.head_dim)
        return tuple([*head, TensorSpec("new_keys", "float32", shape), TensorSpec("new_values", "float32", shape)])
    shape = (1, model.kv_heads, cache.rows(bucket), model.head_dim)
    return tuple(head + [TensorSpec(f"new_{part}_{i}", "float32", shape) for part in ("keys", "values") for i in range(model.layers)])


def to_json(value: Any) -> Any:
    """A frozen fact as plain JSON data."""
    return asdict(value)


def from_json(kind: Any, data: Any, where: str = "manifest") -> Any:
    """Build `kind` from JSON data, checking every type; an unknown, missing or mistyped field is a BundleError naming it."""
    bad = lambda what: BundleError(f"{where}: {what}", "export the bundle again with this version of edgespec")  # noqa: E731
    origin = get_origin(kind)
    if is_dataclass(kind):
        if not isinstance(data, dict):
            raise bad(f"is {type(data).__name__}, not an object")
        hints = get_type_hints(kind)
        if unknown := sorted(set(data) - set(hints)):
            raise bad(f"unknown field {unknown[0]!r}")
        missing = [f.name for f in fields(kind) if f.name not in data]
        if missing:
            raise bad(f"field {missing[0]!r} is missing")
        return kind(**{name: from_json(hints[name], data[name], f"{where}.{name}") for name in hints})  # type: ignore[operator]
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise bad(f"is {type(data).__name__}, not a list")
        return tuple(from_json(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise bad(f"is {type(data).__name__}, not an object")
        return {key: from_json(get_args(kind)[1], item, f"{where}.{key}") for key, item in data.items()}
    choices = get_args(kind) or (kind,)
    if type(data) not in choices:
        raise bad(f"is {type(data).__name__}, not {' or '.join(c.__name__ for c in choices)}")
    return data
