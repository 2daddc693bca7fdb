"""What a bundle's parts are: frozen facts, and the names and shapes of the step graph's tensors.

No tensors, no files. Letters: S width, M slots = N + B, N budget, B block, L layers, KV key-value heads,
d head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from edgespec.parts import Part, part_name, parts_of

CONTRACTS = ("rows", "append")
POSITIONS = ("absolute", "compact")
STEPS = ("prefill", "embeds", "verify", "decode", "draft")
ABSORBING = ("prefill", "embeds")  # steps that give the logits of one row: the others give those of all
KINDS = (*STEPS, "observe", "commit", "context", "vision")
DEVICES = ("cpu", "npu")
FORMATS = ("onnx", "executorch")
PRECISIONS = ("int4", "int8", "fp16", "fp32", "w4a16", "w8a16")
CODED = ("w4a16", "w8a16")  # forms whose activations are codes of 16 bits, and whose caches are of 8
CACHED = ("float32", "int8")
MODELS = ("target", "draft")
CACHES = ("keys", "values")
HIDDEN = "hidden_"  # before the number of the part that takes it
VISION = "vision"
VISION_METHODS = ("whole", "tosa", "merge")
LAYER_CLASSES = ("linear", "ends", "head", "embedding")
BYTES_PER_ELEMENT = {"float32": 4, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}


@dataclass(frozen=True)
class ModelSpec:
    """A decoder's facts. `windows` holds each layer's sliding window, 0 for full attention; `softcap` what
    its attention scores are capped at, 0 for not.
    """

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
    softcap: float = 0.0


@dataclass(frozen=True)
class CacheSpec:
    """A cache's facts: M = budget + block slots, the policy that empties it, who appends (`contract`), and
    how many of each block's last queries are kept for the policy (`queries`). `positions`: a row keeps the
    position it came with (absolute), or every commit turns keys to their place in the cache (compact).
    `dtype`: its rows are float32, or int8 codes, with a scale for each layer's head that the graphs know.
    """

    contract: str
    budget: int
    block: int
    policy: str
    sinks: int
    recent: int
    buckets: tuple[int, ...]
    widest: int
    queries: int = 0
    positions: str = "absolute"
    dtype: str = "float32"

    @property
    def slots(self) -> int:
        """M, the most rows a cache holds."""
        return self.budget + self.block

    def rows(self, bucket: int) -> int:
        """Rows of one layer's buffer in a bucket's graphs: M, or M + S_max - 1 where the call appends."""
        return bucket + self.block + (self.widest - 1 if self.contract == "append" else 0)


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output: its name, ONNX element type (`float32`, `int32`, `int8`) and fixed shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its kind, width S, bucket (its cache's budget) and the tensors it takes and gives.

    `method` is its name in an ExecuTorch program, whose file holds all graphs of a model; else empty.
    A step is the graphs of one kind, width and bucket, one for each part of the model in order of `part`.
    """

    file: str
    kind: str
    width: int
    bucket: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    method: str = ""
    part: int = 0


@dataclass(frozen=True)
class ModelEntry:
    """A target or draft. `precision` maps a layer class (`linear`, `head`, `embedding`) to its form; `ends`,
    where present, are the linears of the first and last decoder layer.

    `head_ids` names a file of int32 token ids, one for each head row, or is empty where row i is token i.

    `widths_agree`: every width gave the same bits when the bundle was made; if not, decoding goes through
    `verify`. `parts`: how many layers each part has, one part for most models. `context_rows`: further rows
    of a draft's head, which the runtime fills while it runs.
    """

    name: str
    source: str
    spec: ModelSpec
    cache: CacheSpec
    precision: dict[str, str]
    weights: str
    graphs: tuple[GraphSpec, ...]
    head_rows: int
    head_ids: str
    widths_agree: bool
    parts: tuple[int, ...]
    context_rows: int = 0

    def part_name(self, part: int) -> str:
        """What a part's files are named after: `target`, or `target-part1` of several."""
        return part_name(self.name, part, len(self.parts))


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
class CompiledEntry:
    """The graphs as compiled for one SoC (edgespec.soc): by which `compiler`, and its log's file.

    `contexts` names the context binary of each model, or of each part of one (Manifest.parts), which holds
    all its graphs over weights stored once;
    `graphs` names, for every graph file, the ONNX file that opens it from there.
    """

    soc: str
    compiler: str
    log: str
    contexts: dict[str, str]
    graphs: dict[str, str]


@dataclass(frozen=True)
class VisionEntry:
    """The target's image encoder and projector: pixels [1,3,size,size] -> features [1,rows,hidden].

    A picture takes `rows` rows of a prompt, each written as the id `token`; `processor` is the folder of the
    model's own processor, which makes both pixels and prompt. Of the encoder's `tokens` a layer in `keeps`
    lets so many patches take part, chosen by `method` (whole, tosa, merge), by the file `selectors` if tosa.
    `draft_rows`: of a draft that reads pictures, what it sees of one, from the same graph; 0: it reads words.
    """

    family: str
    size: int
    rows: int
    token: int
    tokens: int
    method: str
    keeps: dict[str, int]
    weights: str
    graph: GraphSpec
    processor: str
    selectors: str = ""
    draft_rows: int = 0


@dataclass(frozen=True)
class Manifest:
    """Everything `manifest.json` says. `format`: which runtime's files the graphs are. `vision` has one entry
    where the target reads images.
    """

    schema: int
    device: str
    models: tuple[ModelEntry, ...]
    tokenizer: TokenizerEntry
    files: dict[str, FileEntry]
    produced_by: dict[str, str] = field(default_factory=dict)
    compiled: tuple[CompiledEntry, ...] = ()
    format: str = "onnx"
    vision: tuple[VisionEntry, ...] = ()

    @property
    def parts(self) -> dict[str, tuple[GraphSpec, ...]]:
        """The graphs of every part of a model, and of the image encoder, by name."""
        encoder = {VISION: tuple(entry.graph for entry in self.vision)} if self.vision else {}
        return {
            model.part_name(i): tuple(g for g in model.graphs if g.part == i)
            for model in self.models
            for i in range(len(model.parts))
        } | encoder


def step_inputs(
    kind: str,
    width: int,
    model: ModelSpec,
    rows: int,
    context: int = 0,
    cached: str = "float32",
    part: Part | None = None,
) -> tuple[TensorSpec, ...]:
    """Inputs of a step graph: tokens [1,S], position [1], count [1], the row wanted (prefill, embeds), 2L
    caches. `embeds` is a prefill that takes features [1,S,hidden] of images for rows of a token below 0.
    Of a `part` (None: all layers) only what it has: the head's inputs are the last's, words' the first's.

    A cache is [1,KV,rows,d] of the type `cached`; under the `rows` contract its free slots hold zeros. Where
    the head has context rows, `draft` takes them as columns [hidden,R] with the absolute id of the token that
    each is of, -1 where a column is not filled.
    """
    cache = (1, model.kv_heads, rows, model.head_dim)
    own = part or parts_of((model.layers,))[0]
    head = [
        TensorSpec("tokens", "int32", (1, width)) if own.number == 0 else hidden(own.number, width, model),
        TensorSpec("position", "int32", (1,)),
        TensorSpec("count", "int32", (1,)),
    ]
    if kind in ABSORBING and own.last:
        head.append(TensorSpec("row", "int32", (1,)))
    if kind == "embeds" and own.number == 0:
        head.append(TensorSpec("features", "float32", (1, width, model.hidden)))
    if kind == "draft" and context and own.last:
        head += [
            TensorSpec("context", "float32", (model.hidden, context)),
            TensorSpec("context_ids", "int32", (context,)),
        ]
    caches = [TensorSpec(f"{rows_of}_{i}", cached, cache) for rows_of in CACHES for i in own.layers]
    return tuple(head + caches)


def hidden(part: int, width: int, model: ModelSpec) -> TensorSpec:
    """What a part takes of the one before it: the rows' sums after its last layer."""
    return TensorSpec(f"{HIDDEN}{part}", "float32", (1, width, model.hidden))


def step_outputs(
    kind: str,
    width: int,
    model: ModelSpec,
    cache: CacheSpec,
    bucket: int,
    head_rows: int,
    top: int = 8,
    context: int = 0,
    part: Part | None = None,
) -> tuple[TensorSpec, ...]:
    """Outputs of a step graph: logits [1,R,head rows], argmax [1,R] (R = 1 in prefill and embeds, else S),
    new rows. Of a `part` (None: all layers) L are its own, and one before the last gives hidden rows instead
    of logits and what follows from them.

    A draft also gives entropy [1,S] in nats and its top-k (probabilities and absolute token ids) [1,S,k]; its
    logits are those of the head's own rows, then of the context rows. Where the policy reads queries, the
    rows' own, multiplied by the attention's scale: [S,L,H,d]. New rows are [L,KV,S,d] under the `rows`
    contract, and the 2L updated buffers under `append`.
    """
    own = part or parts_of((model.layers,))[0]
    head = [hidden(own.number + 1, width, model)]
    if own.last:
        head = _head_outputs(kind, width, head_rows + (context if kind == "draft" else 0), top)
    if cache.queries:
        queries = (width, len(own.layers), model.heads, model.head_dim)
        head.append(TensorSpec("new_queries", "float32", queries))
    if cache.contract == "rows":
        shape = (len(own.layers), model.kv_heads, width, model.head_dim)
        return tuple(
            [*head, TensorSpec("new_keys", cache.dtype, shape), TensorSpec("new_values", cache.dtype, shape)]
        )
    shape = (1, model.kv_heads, cache.rows(bucket), model.head_dim)
    return tuple(
        head + [TensorSpec(f"new_{rows_of}_{i}", "float32", shape) for rows_of in CACHES for i in own.layers]
    )


def _head_outputs(kind: str, width: int, columns: int, top: int) -> list[TensorSpec]:
    rows = 1 if kind in ABSORBING else width
    head = [TensorSpec("logits", "float32", (1, rows, columns)), TensorSpec("argmax", "int32", (1, rows))]
    if kind == "draft":
        head += [
            TensorSpec("entropy", "float32", (1, rows)),
            TensorSpec("top_probabilities", "float32", (1, rows, top)),
            TensorSpec("top_ids", "int32", (1, rows, top)),
        ]
    return head


def context_tensors(width: int, hidden: int) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a `context` graph: tokens [1,S] -> the target's head rows of these, [1,S,hidden].

    It fills a draft's context rows, so it belongs to the draft.
    """
    return (TensorSpec("tokens", "int32", (1, width)),), (TensorSpec("rows", "float32", (1, width, hidden)),)


def vision_tensors(
    size: int, rows: int, hidden: int, draft_rows: int = 0, draft_hidden: int = 0
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a `vision` graph: pixels [1,3,size,size] -> features of the rows of a target's
    prompt [1,rows,hidden], and, where a draft reads pictures, of its own [1,draft rows,draft hidden].
    """
    made = [TensorSpec("features", "float32", (1, rows, hidden))]
    if draft_rows:
        made.append(TensorSpec("draft_features", "float32", (1, draft_rows, draft_hidden)))
    return (TensorSpec("pixels", "float32", (1, 3, size, size)),), tuple(made)


def policy_inputs(
    kind: str, reads: Collection[str], model: ModelSpec, cache: CacheSpec, bucket: int
) -> tuple[TensorSpec, ...]:
    """Inputs of a `commit` or `observe` graph that reads these of keys, values, queries, carried.

    keys, values [1,KV,rows,d], queries [W,H,d], carried [H,M]; `observe` also count [1], the filled rows.
    """
    rows = (1, model.kv_heads, cache.rows(bucket), model.head_dim)
    shapes = {
        "keys": rows,
        "values": rows,
        "queries": (cache.queries, model.heads, model.head_dim),
        "carried": (model.heads, cache.slots),
    }
    types = {"keys": cache.dtype, "values": cache.dtype}
    given = [
        TensorSpec(name, types.get(name, "float32"), shape) for name, shape in shapes.items() if name in reads
    ]
    return tuple(given + ([TensorSpec("count", "int32", (1,))] if kind == "observe" else []))


def kept_parts(cache: CacheSpec) -> tuple[str, ...]:
    """What a commit graph gives of the rows that stay: floats for an NPU, and keys that it turned."""
    if cache.dtype != "float32":
        return ()
    return (
        ("keys", "values") if cache.contract == "rows" else ("keys",) if cache.positions == "compact" else ()
    )


def policy_outputs(
    kind: str, reads: Collection[str], model: ModelSpec, cache: CacheSpec
) -> tuple[TensorSpec, ...]:
    """Outputs of a `commit` graph: keep [KV,N], and kept rows [1,KV,N,d] (kept_parts); of it and of
    `observe`: new_carried [H,M] where the policy carries a score, 0 for slots that are free.
    """
    made: list[TensorSpec] = []
    if kind == "commit":
        made.append(TensorSpec("keep", "int32", (model.kv_heads, cache.budget)))
        kept = (1, model.kv_heads, cache.budget, model.head_dim)
        made += [TensorSpec(f"kept_{part}", "float32", kept) for part in kept_parts(cache)]
    if "carried" in reads:
        made.append(TensorSpec("new_carried", "float32", (model.heads, cache.slots)))
    return tuple(made)
