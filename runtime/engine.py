"""Runs one model's graphs on ONNX Runtime, or the methods of its ExecuTorch program, and keeps its caches by
the rules of design section 4.

A call never writes what is not accepted; `accept` appends rows and commits when the cache is full. Knows
nothing of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgespec.errors import BackendError, InputError
from edgespec.runtime.binding import NUMPY, Bound, bound_to
from edgespec.runtime.program import Program
from edgespec.spec import ABSORBING, GraphSpec, ModelEntry, VisionEntry

GIVEN = ("logits", "argmax", "entropy", "top_probabilities", "top_ids", "new_queries")


@dataclass(frozen=True)
class Snapshot:
    """What an engine had absorbed: its count, its position and copies of every cache's filled rows, and of
    what its policy keeps beside them.
    """

    count: int
    position: int
    observed: int
    caches: dict[str, list[np.ndarray]]
    queries: np.ndarray
    carried: np.ndarray


class Engine:
    """One model of a bundle: its graphs (opened when first called), its caches and their count."""

    def __init__(
        self,
        folder: Path,
        entry: ModelEntry,
        threads: int = 0,
        opener: Callable[[Path], ort.InferenceSession] | None = None,
    ) -> None:
        """`opener` opens a graph's file on another processor than this machine's, such as an emulated NPU."""
        self.folder, self.entry, self.threads = folder, entry, threads
        self.opener = opener or self._open
        self.spec, self.cache = entry.spec, entry.cache
        self.steps: dict[tuple[str, int, int], list[GraphSpec]] = {}  # the graphs of each, in order of part
        for graph in sorted(entry.graphs, key=lambda g: g.part):
            self.steps.setdefault((graph.kind, graph.width, graph.bucket), []).append(graph)
        self.sessions: dict[tuple[str, str], Any] = {}  # by file and method
        self.programs: dict[str, Program] = {}
        self.bound: dict[tuple[str, int, int], Bound] = {}
        self.pending: dict[str, np.ndarray] = {}
        self.caches: dict[str, list[np.ndarray]] = {}
        heads, layers = (self.spec.heads, self.spec.head_dim), self.spec.layers
        self.queries = np.zeros((layers, self.cache.queries, *heads), np.float32)
        carried = any(g.kind == "observe" for g in entry.graphs)
        self.carried = np.zeros((layers, self.spec.heads, self.cache.slots if carried else 0), np.float32)
        self.context = {
            "context": np.zeros((self.spec.hidden, entry.context_rows), np.float32),
            "context_ids": np.full(entry.context_rows, -1, np.int32),
        }
        self.bucket = 0
        self.reset()

    def reset(self, bucket: int | None = None) -> None:
        """Empty caches, of the smallest bucket unless another is named."""
        self.count, self.position, self.observed = 0, 0, 0
        self.carried[:] = 0
        self._lay(bucket or self.cache.buckets[0])

    def over(self, entry: ModelEntry) -> Engine:
        """An engine with empty caches of another budget or policy over the same opened graphs."""
        other = Engine(self.folder, entry, self.threads, self.opener)
        other.sessions, other.programs = self.sessions, self.programs
        return other

    def snapshot(self) -> Snapshot:
        """What `restore` goes back to, however much is absorbed or evicted in between."""
        filled = {
            part: [buffer[:, :, : self.count].copy() for buffer in buffers]
            for part, buffers in self.caches.items()
        }
        beside = self.queries.copy(), self.carried.copy()
        return Snapshot(self.count, self.position, self.observed, filled, *beside)

    def restore(self, snapshot: Snapshot) -> None:
        """The caches of a snapshot of this engine; the graphs' bindings stay.

        Or of one of another policy over as large buffers, where nothing was evicted and no row is in the
        block that this one evicts first: then what the other kept beside rows is of no use.
        """
        self.count, self.position, self.observed = snapshot.count, snapshot.position, snapshot.observed
        for own, theirs in ((self.queries, snapshot.queries), (self.carried, snapshot.carried)):
            if own.shape == theirs.shape:
                own[:] = theirs
        for part, buffers in self.caches.items():
            for buffer, rows in zip(buffers, snapshot.caches[part], strict=True):
                buffer[:, :, : self.count] = rows
        self._forget()

    def close(self) -> None:
        """Give back the memory of the graphs (ONNX Runtime keeps each one's weights).

        A call opens its graph again.
        """
        self.sessions, self.programs, self.bound, self.pending = {}, {}, {}, {}

    @property
    def free(self) -> int:
        """Rows that still fit before a commit: no call may hold more valid rows (design section 4).

        Where the policy carries a score, rows before the end of the block.
        """
        left = self.cache.slots - self.count
        return (left - 1) % self.cache.block + 1 if left and self.carried.size else left

    @property
    def _place(self) -> int:
        """The position of the next token: of the text, or in the cache where positions are compact."""
        return self.count if self.cache.positions == "compact" else self.position

    def widths(self, kind: str) -> list[int]:
        """The exported widths of a kind, ascending."""
        return sorted({g.width for g in self.entry.graphs if g.kind == kind})

    def call(
        self,
        kind: str,
        tokens: Sequence[int],
        width: int | None = None,
        features: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """One graph call over these tokens, padded to the graph's width; the outputs that are not caches.

        `embeds` takes `features` [rows,hidden], which stand for tokens below 0. It and prefill give the
        logits of the last valid row, every other kind those of all rows. Nothing is accepted yet. InputError
        where the tokens would straddle a commit or leave the model's positions.
        """
        rows = len(tokens)
        width = width or next((w for w in self.widths(kind) if w >= rows), 0)
        if width not in self.widths(kind):
            raise InputError(
                f"{self.entry.name} has no {kind} graph of width {width or f'{rows} or more'}",
                f"its {kind} widths are {self.widths(kind)}",
            )
        if not 1 <= rows <= min(width, self.free):
            raise InputError(
                f"{rows} tokens in a call of width {width} with {self.free} free rows",
                "clamp the call to Engine.free rows",
            )
        if self._place + rows > self.spec.positions:
            raise InputError(
                f"position {self.position + rows} is beyond the {self.spec.positions} that "
                f"{self.entry.source} was trained on",
                "shorten the text, or truncate the conversation",
            )
        self._fit(self.count + rows)
        bound = self._binding((kind, width, self.bucket))
        arrays = bound.given
        arrays["tokens"][0, :rows], arrays["tokens"][0, rows:] = tokens, 0
        arrays["position"][0], arrays["count"][0] = self._place, self.count
        if kind in ABSORBING:
            arrays["row"][0] = rows - 1
        if kind == "embeds":
            arrays["features"][0, :rows] = 0 if features is None else features
        self.pending = bound.run()
        made = {name: self.pending[name] for name in GIVEN if name in self.pending}
        filled = int((self.context["context_ids"] >= 0).sum())
        return made | {"logits": made["logits"][..., : self.entry.head_rows + filled]}

    def look(self, entry: VisionEntry, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        """A picture's rows [1,rows,hidden], and a draft's where it sees pictures, by the bundle's image
        encoder, of pixels [1,3,size,size].
        """
        session = self._session(entry.graph, entry.weights)
        return tuple(session.run([t.name for t in entry.graph.outputs], {"pixels": pixels}))

    def fill_context(self, ids: Sequence[int]) -> None:
        """Give a draft's context rows to these tokens, in order, and empty the others; until it is done anew.

        `draft` calls then give their logits after those of the head's own rows. Which tokens a conversation
        fills them with is the native runtime's to decide.
        """
        rows = self.entry.context_rows
        if len(ids) > rows or len(set(ids)) < len(ids):
            raise InputError(f"{len(ids)} tokens for {rows} context rows", "give as many, each once")
        columns, names = self.context["context"], self.context["context_ids"]
        names[:] = -1
        if not len(ids):
            return
        (graph,) = (g for g in self.entry.graphs if g.kind == "context")
        for start in range(0, len(ids), graph.width):
            some = np.array(ids[start : start + graph.width], np.int32)
            tokens = np.zeros((1, graph.width), np.int32)
            tokens[0, : len(some)] = some
            (found,) = self._session(graph).run(["rows"], {"tokens": tokens})
            columns[:, start : start + len(some)] = found[0, : len(some)].T
            names[start : start + len(some)] = some

    def accept(self, rows: int) -> None:
        """Keep the first `rows` rows of the last call; commit if that filled the cache."""
        self._append(rows)
        if self.count == self.cache.slots and self.cache.policy != "none":
            self._commit()
        elif self.carried.size and self.count % self.cache.block == 0 and self.count > self.observed:
            self._observe()

    def commits(self, tokens: Sequence[int]) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """What the commit graph makes of caches full of a text: a layer's tensors by name, keep [KV,N].

        keys, values [KV,M,d]; queries [W,H,d], carried [H,M] (before this block) where the policy has them.
        """
        self.reset(self.cache.budget)
        text = list(tokens) * (1 + self.cache.slots // len(tokens))
        while self.count < self.cache.slots:
            rows = min(self.widths("prefill")[-1], self.free)
            self.call("prefill", text[self.count : self.count + rows])
            if self.count + rows < self.cache.slots:
                self.accept(rows)
            else:
                self._append(rows)
        for layer in range(self.spec.layers):
            given = self._layer(layer)
            given |= {part: given[part][0, :, : self.cache.slots] for part in ("keys", "values")}
            copied = {part: array.copy() for part, array in given.items()}
            yield copied, self._run_policy("commit", layer)["keep"]

    def _append(self, rows: int) -> None:
        if self.cache.contract == "rows":
            for part in ("keys", "values"):
                new = self.pending[f"new_{part}"]
                for layer, buffer in enumerate(self.caches[part]):
                    buffer[0, :, self.count : self.count + rows] = new[layer, :, :rows]
        for row in range(rows if self.cache.queries else 0):
            left = (self.cache.slots - self.count - row - 1) % self.cache.block  # rows of the block after it
            if left < self.cache.queries:
                self.queries[:, self.cache.queries - 1 - left] = self.pending["new_queries"][row]
        self.count += rows
        self.position += rows

    def prefill(self, tokens: Sequence[int], features: np.ndarray | None = None) -> np.ndarray:
        """Absorb a prompt in blocks, each clamped to the free rows; the logits [V] after its last token.

        With `features` [tokens,hidden] by `embeds`: they stand for tokens below 0.
        """
        if not len(tokens):
            raise InputError("the prompt is empty", "give at least one token")
        self.require(len(tokens))
        kind = "prefill" if features is None else "embeds"
        done, logits = 0, np.zeros(0, np.float32)
        while done < len(tokens):
            rows = min(self.widths("prefill")[-1], len(tokens) - done, self.free)
            given = None if features is None else features[done : done + rows]
            logits = self.call(kind, tokens[done : done + rows], features=given)["logits"][0, 0].copy()
            self.accept(rows)
            done += rows
        return logits

    def step(self, token: int) -> int:
        """The greedy token after this one; through `verify` where a one-row call would round otherwise."""
        kind = "decode" if self.entry.widths_agree else "verify"
        best = int(self.call(kind, [token])["argmax"][0, 0])
        self.accept(1)
        return best

    def require(self, tokens: int) -> None:
        """InputError unless so many tokens fit the model's positions and, without eviction, its cache."""
        if self.cache.positions == "absolute" and self.position + tokens > self.spec.positions:
            raise InputError(
                f"{self.position + tokens} tokens are more than the {self.spec.positions} positions that "
                f"{self.entry.source} was trained on",
                "shorten the prompt, generate fewer tokens, or export with --positions compact",
            )
        if self.cache.policy == "none" and tokens > self.free:
            raise InputError(
                f"{self.count + tokens} tokens are more than the {self.cache.slots} slots of a cache "
                "without eviction",
                "export with --policy keydiff, or with a larger --budget",
            )

    def _commit(self) -> None:
        """Move each layer's surviving rows to the front; sliding-window layers keep the newest N."""
        budget, slots = self.cache.budget, self.cache.slots
        newest = np.broadcast_to(np.arange(slots - budget, slots), (self.spec.kv_heads, budget))
        for layer, window in enumerate(self.spec.windows):
            made = {"keep": newest} if window else self._run_policy("commit", layer)
            kept = made["keep"]
            if "new_carried" in made:
                self.carried[layer] = made["new_carried"]
            keys, values = self.caches["keys"][layer], self.caches["values"][layer]
            for head in range(self.spec.kv_heads):
                keys[0, head, :budget], values[0, head, :budget] = (
                    keys[0, head, kept[head]],
                    values[0, head, kept[head]],
                )
            if self.cache.positions == "compact":
                keys[:, :, :budget] = made["kept_keys"]
        self.count = self.observed = budget
        self._forget()

    def _forget(self) -> None:
        """Under the `rows` contract a free slot holds zeros: in some formats it takes part, times one."""
        if self.cache.contract == "rows":
            for buffers in self.caches.values():
                for buffer in buffers:
                    buffer[:, :, self.count :] = 0

    def _observe(self) -> None:
        """Add the block that is full now to what the policy carries."""
        for layer, window in enumerate(self.spec.windows):
            if not window:
                self.carried[layer] = self._run_policy("observe", layer)["new_carried"]
        self.observed = self.count

    def _layer(self, layer: int) -> dict[str, np.ndarray]:
        """What a policy's graph may read of a layer."""
        keys, values = self.caches["keys"][layer], self.caches["values"][layer]
        given = {"keys": keys, "values": values, "count": np.array([self.count], np.int32)}
        if self.cache.queries:
            given["queries"] = self.queries[layer]
        if self.carried.size:
            given["carried"] = self.carried[layer]
        return given

    def _run_policy(self, kind: str, layer: int) -> dict[str, np.ndarray]:
        """What a commit or observe graph gives of a layer, by name."""
        bucket = self.cache.buckets[-1] if kind == "commit" else self.bucket
        (graph,) = self.steps[kind, self.cache.block, bucket]
        given = self._layer(layer)
        read = ("keep", "new_carried", *(["kept_keys"] if self.cache.positions == "compact" else []))
        wanted = [t.name for t in graph.outputs if t.name in read]
        made = self._session(graph).run(wanted, {t.name: given[t.name] for t in graph.inputs})
        return dict(zip(wanted, made, strict=True))

    def _fit(self, rows: int) -> None:
        """Grow to the smallest bucket whose slots hold this many rows."""
        bucket = next(b for b in self.cache.buckets if b + self.cache.block >= rows)
        if bucket > self.bucket:
            self._lay(bucket)

    def _lay(self, bucket: int) -> None:
        """Buffers of a bucket, with the filled rows of the old ones."""
        shape = (1, self.spec.kv_heads, self.cache.rows(bucket), self.spec.head_dim)
        fresh = {
            part: [np.zeros(shape, NUMPY[self.cache.dtype]) for _ in range(self.spec.layers)]
            for part in ("keys", "values")
        }
        for part in fresh if self.count else ():
            for old, new in zip(self.caches[part], fresh[part], strict=True):
                new[0, :, : self.count] = old[0, :, : self.count]
        self.caches, self.bucket, self.bound = fresh, bucket, {}

    def _binding(self, step: tuple[str, int, int]) -> Bound:
        """A step's graphs on fixed arrays; under `append` each buffer is input and output."""
        if step not in self.bound:
            caches = {f"{part}_{i}": b for part in self.caches for i, b in enumerate(self.caches[part])}
            self.bound[step] = bound_to(self.context | caches, self.steps[step], self._session)
        return self.bound[step]

    def _session(self, graph: GraphSpec, weights: str = "") -> Any:
        """What runs a graph, opened once: an InferenceSession, or a Method of a program over these weights
        (empty: the model's).
        """
        key = graph.file, graph.method
        if key not in self.sessions:
            path = self.folder / graph.file
            program = graph.method and self._program(path, weights or self.entry.weights)
            self.sessions[key] = program.method(graph) if program else self.opener(path)
        return self.sessions[key]

    def _program(self, path: Path, weights: str) -> Program:
        """An ExecuTorch program, opened once."""
        if path.name not in self.programs:
            self.programs[path.name] = Program(path, self.folder / weights, self.threads)
        return self.programs[path.name]

    def _open(self, path: Path) -> ort.InferenceSession:
        """A graph on this machine's processor."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        # Each graph has its own threads until the native runtime shares them: idle ones must not spin.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.cache.dtype == "int8":  # or products with coded weights round their activations to 8 bits
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise BackendError(
                f"ONNX Runtime cannot open {path.name}: {first}", "run edgespec check on the bundle"
            ) from error
