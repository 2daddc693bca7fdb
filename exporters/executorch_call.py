"""The modules that become an ExecuTorch program's methods: what looks up, masks and chooses around one
subgraph, in ExecuTorch's own kernels.

Knows a step graph's tensors and what a Lowering gave; nothing of a model's layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn

from edgespec.exporters.attention import MASKED
from edgespec.exporters.grids import int8_rows
from edgespec.exporters.lower_executorch import Lowering, columns, positive
from edgespec.spec import ABSORBING, TensorSpec

TORCH = {"float32": torch.float32, "int32": torch.int32}


class Call(nn.Module):
    """A step graph as the method that ExecuTorch runs: tensors in the order of `step_inputs`, results in that
    of `step_outputs`.
    """

    def __init__(self, low: Lowering, brings: bool) -> None:
        """`brings`: this method hands the stored arrays over to the program; one of a program's does."""
        super().__init__()
        payload, t = low.run(), low.target
        self.spec, self.target, self.lookups, self.windows = low.spec, t, low.lookups, low.windows
        self.inputs, self.outputs = t.tensors(low.spec)
        for name, of_tokens in low.lookups:
            form = low.stored.form("embedding", name) if of_tokens else "fp32"
            add_table(self, name, low.stored.read(name), form)
        if t.head_ids is not None:
            self.register_buffer("head_ids", torch.from_numpy(t.head_ids.astype(np.int32)))
        for i, array in enumerate(low.g.arrays):
            self.register_buffer(f"given_{i}", torch.from_numpy(array))
        self.arrays = len(low.g.arrays)
        shapes = [value.shape for value in low.g.inputs]
        data = low.stored.constants.output() if brings else None
        self.delegate = delegate(payload, shapes, low.outputs, data)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """One call."""
        t, given = self.target, dict(zip([i.name for i in self.inputs], tensors, strict=True))
        step = torch.arange(t.width, dtype=torch.int32)
        positions = (given["position"] + step).clamp(max=self.spec.positions - 1).unsqueeze(0)
        fed = []
        for name, of_tokens in self.lookups:
            ids = given["tokens"].clamp(min=0) if of_tokens else positions
            rows = rows_of(self, name, ids)
            if of_tokens and t.kind == "embeds":
                rows = torch.where((given["tokens"] < 0).unsqueeze(-1), given["features"], rows)
            fed.append(rows)
        own = given["count"] + step  # the slot of each row
        fed += [self.mask(own.view(-1, 1), window) for window in self.windows]
        slot = torch.arange(t.cache.rows(t.bucket), dtype=torch.int32).view(-1, 1)
        fed.append((slot == own).float().view(1, 1, -1, t.width))
        if t.kind in ABSORBING:
            fed.append((step == given["row"]).float().view(1, 1, -1))
        if t.context:
            fed.append(given["context"].unsqueeze(0))
        fed += [tensor for name, tensor in given.items() if name.startswith(("keys_", "values_"))]
        fed += [getattr(self, f"given_{i}") for i in range(self.arrays)]
        logits, *rest = self.delegate(*fed)
        return self.results(logits, rest, given)

    def mask(self, last: Tensor, window: int) -> Tensor:
        """What is added to each score, [1,1,group·S,columns]: 0 for slots up to the row's own, `last` [S,1].

        With a window w the slot's distance to the row must stay under w; slots stand in order of position.
        """
        t, group = self.target, self.spec.heads // self.spec.kv_heads
        slot = torch.arange(columns(t), dtype=torch.int32).view(1, -1)
        seen = slot <= last
        if window:
            seen = seen & (slot > last - window)
        added = torch.where(seen, 0.0, MASKED)
        return added.repeat(group, 1).view(1, 1, group * t.width, -1)

    def results(self, logits: Tensor, rest: list[Tensor], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Every output the specification names, from the subgraph's."""
        t = self.target
        ids = self.head_ids if t.head_ids is not None else None
        if t.context:
            filled = torch.cat([torch.ones(t.head_rows, dtype=torch.bool), given["context_ids"] > -1])
            logits = torch.where(filled, logits, MASKED)
            ids = torch.cat([ids, given["context_ids"]])
        named = lambda places: places.int() if ids is None else ids[places]  # noqa: E731
        made = {"logits": logits, "argmax": named(logits.argmax(-1))}
        if t.kind == "draft":
            log_p = logits.log_softmax(-1)
            p = log_p.exp()
            made["entropy"] = -(p * log_p).sum(-1)
            top = next(o for o in self.outputs if o.name == "top_ids").shape[-1]
            made["top_probabilities"], places = p.topk(top, -1)
            made["top_ids"] = named(places)
        if t.cache.queries:
            made["new_queries"], *rest = rest
        made["new_keys"], made["new_values"] = rest
        return tuple(made[o.name] for o in self.outputs)


class LookUp(nn.Module):
    """A context graph: tokens [1,S] -> their rows of the target's head, in its form."""

    def __init__(self, table: np.ndarray, form: str) -> None:
        super().__init__()
        add_table(self, "context", table, form)

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        """The rows [1,S,hidden]."""
        return (rows_of(self, "context", tokens),)


def add_table(module: nn.Module, name: str, table: np.ndarray, form: str) -> None:
    """Give a module a table's buffers; their names, the same in every method, are the weights file's keys."""
    name = table_name(name)
    if form != "int8":
        module.register_buffer(name, torch.from_numpy(table))
        return
    codes, scale = positive(*int8_rows(table))
    module.register_buffer(name, torch.from_numpy(codes.astype(np.int8)))
    module.register_buffer(f"{name}_scale", torch.from_numpy(scale).unsqueeze(-1).contiguous())


def rows_of(module: nn.Module, name: str, ids: Tensor) -> Tensor:
    """Rows [1,S,k] of a module's table."""
    name = table_name(name)
    rows = nn.functional.embedding(ids, getattr(module, name))
    if not hasattr(module, f"{name}_scale"):
        return rows
    return rows.float() * nn.functional.embedding(ids, getattr(module, f"{name}_scale"))


def table_name(name: str) -> str:
    """The name of a table's first buffer."""
    return "table_" + name.replace(".", "_")


def delegate(payload: bytes, inputs: Any, outputs: Any, data: Any) -> LoweredBackendModule:
    """The module that calls a subgraph; `data` are the arrays that it brings into the program, or None.

    From outside a delegate is its outputs' shapes, whatever is given.
    """
    graph = torch.fx.Graph()
    for i in range(len(inputs)):
        graph.placeholder(f"given_{i}")
    graph.output(tuple(graph.call_function(torch.zeros, (list(shape),)) for shape in outputs))
    given = tuple(torch.zeros(shape) for shape in inputs)
    outside = torch.export.export(torch.fx.GraphModule(nn.Module(), graph), given, strict=False)
    return LoweredBackendModule(outside, "XnnpackBackend", payload, [], data)


def example(tensors: tuple[TensorSpec, ...]) -> tuple[Tensor, ...]:
    """Zeros of these tensors' types and shapes."""
    return tuple(torch.zeros(t.shape, dtype=TORCH[t.dtype]) for t in tensors)
