"""What a model's activations reach on texts: the spans of their codes (lower_codes.Spans)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgespec.exporters.checkpoint import Checkpoint
from edgespec.exporters.lower_codes import Span, Spans
from edgespec.exporters.streaming import streamed

ATTENTION = "edgespec-spans"


def spans_of(checkpoint: Checkpoint, windows: Tensor, advance: Callable[[int, int], None]) -> Spans:
    """The spans over windows [n, length] of token ids, one layer in memory at a time (see `streamed`).

    Windows begin at positions all over the trained ones: a key's numbers depend on how far it is turned.
    """
    layers = checkpoint.config.num_hidden_layers
    found: dict[str, Span] = {}
    heads: dict[tuple[str, int], np.ndarray] = {}
    sizes: dict[tuple[str, int], float] = {}

    def widen(name: str, x: Tensor) -> None:
        low, high = found.get(name, (0.0, 0.0))
        found[name] = (min(low, float(x.min())), max(high, float(x.max())))

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            widen(f"{name} in", given[0])
            widen(f"{name} out", made if module.bias is None else made - module.bias)

        return look

    @contextlib.contextmanager
    def around(part: nn.Module, path: str) -> Iterator[None]:
        linears = [(name, m) for name, m in part.named_modules() if isinstance(m, nn.Linear)]
        names = [".".join(filter(None, (path, name, "weight"))) for name, _ in linears]
        handles = [m.register_forward_hook(hook(n)) for n, (_, m) in zip(names, linears, strict=True)]
        yield
        for handle in handles:
            handle.remove()
        advance(min(len(heads) // 2, layers), layers)

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, None]:
        layer, scale = int(module.layer_idx), given.get("scaling") or query.shape[-1] ** -0.5  # type: ignore[arg-type]
        for part, rows in (("keys", key), ("values", value)):
            heads[part, layer] = rows.abs().amax((0, 2, 3)).clamp_min(1e-12).numpy()
        sizes["queries", layer] = float((query * scale).abs().max())
        outs, most = [], 0.0
        for q, k, v in zip(query, key, value, strict=True):
            out, reached = attended(q * scale, k, v, given.get("sliding_window"), given.get("softcap"))
            outs.append(out)
            most = max(most, reached)
        sizes["scores", layer] = most
        return torch.stack(outs).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    count, length = windows.shape
    most = max(0, getattr(checkpoint.config, "max_position_embeddings", length) - length)
    first = torch.linspace(0, most, count).long() if count > 1 else torch.zeros(1, dtype=torch.int64)
    positions = first[:, None] + torch.arange(length)
    streamed(checkpoint, windows, around, positions, head=True, attention=ATTENTION)
    names = {name.removesuffix(" in") for name in found if name.endswith(" in")}
    return Spans(
        {name: (found[f"{name} in"], found[f"{name} out"]) for name in names},
        [heads["keys", i] for i in range(layers)],
        [heads["values", i] for i in range(layers)],
        [sizes["queries", i] for i in range(layers)],
        [sizes["scores", i] for i in range(layers)],
    )


def attended(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None
) -> tuple[Tensor, float]:
    """Causal attention of one text, q [H,S,d], k and v [KV,S,d] -> [H,S,d], and the largest size of a score
    that a row sees.
    """
    group, rows = len(q) // len(k), torch.arange(q.shape[1])
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2)
    apart = rows[:, None] - rows
    seen = (apart >= 0) & (apart < window) if window else apart >= 0
    reached = float(scores.masked_fill(~seen, 0).abs().max())
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 0), reached
