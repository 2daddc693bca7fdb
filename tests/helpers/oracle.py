"""What the graphs must compute, written a second time: Transformers' model around a cache of plain tensors.

Shares no code with the exporter: Transformers' eager attention sees an explicit mask, positions and the
rows that this file kept, and eviction is spelled out head by head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

HIDDEN = torch.finfo(torch.float32).min


def own_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Transformers' logits [n,V] for a text: eager attention, no cache, its own masks."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]


def layer_windows(config: Any) -> list[int]:
    """Each layer's sliding window, 0 for full attention, from a Transformers config."""
    window = config.sliding_window if getattr(config, "sliding_window", None) else 0
    if not getattr(config, "use_sliding_window", True):
        window = 0
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def keydiff_scores(keys: Tensor) -> Tensor:
    """KeyDiff as PyPI's kvpress states it, in fp64: -cos(k, mean of normalised keys). [KV,M,d] -> [KV,M]."""
    keys = keys.double()
    anchor = F.normalize(keys, p=2, dim=-1).mean(dim=1, keepdim=True)
    return -F.cosine_similarity(keys, anchor, dim=-1)


def survivors(scores: Sequence[float], budget: int, sinks: int, recent: int) -> tuple[list[int], float]:
    """Ascending places of one head's rows that stay, and how far the worst kept beats the best dropped."""
    slots = len(scores)
    protected = [i for i in range(slots) if i < sinks or i >= slots - recent]
    others = sorted((i for i in range(slots) if i not in protected), key=lambda i: -scores[i])
    free = budget - len(protected)
    gap = scores[others[free - 1]] - scores[others[free]] if 0 < free < len(others) else float("inf")
    return sorted(protected + others[:free]), float(gap)


def without(share: Tensor, values: Tensor, gone: Sequence[int]) -> Tensor:
    """A head's attention output [d] with the rows `gone` really removed: the rest's shares sum to 1 again."""
    left = share.double().clone()
    left[list(gone)] = 0
    return left / left.sum() @ values.double()


def removal_scores(share: Tensor, values: Tensor) -> Tensor:
    """What removing each row does to the outputs of a group, summed over its heads: [G,M], [M,d] -> [M]."""
    change = torch.zeros(share.shape[1], dtype=torch.float64)
    for head in share:
        whole = head.double() @ values.double()
        for j in range(len(change)):
            change[j] += (without(head, values, [j]) - whole).norm()
    return change


def mean_value_scores(share: Tensor, values: Tensor) -> Tensor:
    """FastCAOTE: as if the output were the mean value. [G,M], [M,d] -> [M]."""
    far = (values.double() - values.double().mean(0)).norm(dim=-1)
    return sum((head / (1 - head) * far for head in share.double()), torch.zeros(len(far)))


@dataclass
class Attended:
    """What a layer's queries looked at, from the attention weights that Transformers computed.

    `rows` of the queries since the last commit [H,n]; over all queries the `total` weight [H,n] of every row
    held, and the number of the query that last gave it the even share (`last` [KV,n]).
    """

    rows: list[Tensor] = field(default_factory=list)
    total: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    last: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    queries: int = 0

    def take(self, weights: Tensor, kv: int) -> None:
        """One query's weights [H,n], n the rows that it saw, its own the last."""
        weights = weights.double()
        heads, n = weights.shape
        self.rows.append(weights)
        old = F.pad(self.total, (0, n - self.total.shape[1])) if self.queries else torch.zeros(heads, n)
        self.total = old + weights
        seen = weights.view(kv, heads // kv, n).amax(1) >= 1 / n
        seen[:, -1] = True
        last = F.pad(self.last, (0, n - self.last.shape[1])) if self.queries else torch.zeros(kv, n).long()
        self.last = torch.where(seen, self.queries, last)
        self.queries += 1

    def keep(self, places: list[list[int]]) -> None:
        """Only these places [KV][N] of the rows stay."""
        group = self.total.shape[0] // len(places)
        self.total = torch.stack([row[places[h // group]] for h, row in enumerate(self.total)])
        self.last = torch.stack([row[places[h]] for h, row in enumerate(self.last)])
        self.rows = []


@dataclass
class Layer:
    """One layer's rows in order of position: keys and values [KV,n,d], positions [KV,n]."""

    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass
class EvictingModel:
    """A Transformers model whose cache holds budget + block rows and then drops a block (design, section 4).

    `choices` holds, commit by commit, what each full-attention layer kept: places [KV][N].
    `narrowest` is the smallest margin by which a row was kept in any commit: where it is near fp32's
    rounding, another correct implementation may keep another row.
    """

    model: PreTrainedModel
    budget: int
    block: int
    policy: str
    sinks: int = 0
    recent: int = 0
    window: int = 4
    compact: bool = False
    position: int = 0
    commits: int = 0
    narrowest: float = float("inf")
    choices: list[list[list[int]]] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Rows held."""
        return self.layers[0].keys.shape[1] if self.layers else 0

    def feed(self, tokens: Sequence[int], chunk: int = 1) -> Tensor:
        """Logits [n,V] of every token, absorbed `chunk` at a time and never across a commit."""
        done, logits = 0, []
        while done < len(tokens):
            rows = min(chunk, len(tokens) - done, self.budget + self.block - self.count)
            logits.append(self._call(list(tokens[done : done + rows])))
            done += rows
        return torch.cat(logits)

    def _call(self, tokens: list[int]) -> Tensor:
        cache, config = DynamicCache(), self.model.config
        for i, layer in enumerate(self.layers):
            cache.update(layer.keys[None], layer.values[None], i)
        first = self.count if self.compact else self.position
        places = torch.arange(first, first + len(tokens))
        masks = [self._mask(i, places, window) for i, window in enumerate(layer_windows(config))]
        kinds = getattr(config, "layer_types", None)
        mask: Any = masks[0] if kinds is None else dict(zip(kinds, masks, strict=True))
        with torch.no_grad():
            made = self.model(
                input_ids=torch.tensor([tokens]),
                position_ids=places[None],
                past_key_values=cache,
                attention_mask=mask,
                use_cache=True,
                output_attentions=self.watches,
            )
        if self.watches:
            self.attended = self.attended or [Attended() for _ in made.attentions]
            for attended, weights in zip(self.attended, made.attentions, strict=True):
                for row in range(len(tokens)):
                    attended.take(weights[0, :, row, : self.count + row + 1], cache.layers[0].keys.shape[1])
        self._take(cache, places)
        return made.logits[0]

    @property
    def watches(self) -> bool:
        """The policy reads attention."""
        return self.policy not in ("none", "sinks", "keydiff")

    def _mask(self, layer: int, places: Tensor, window: int) -> Tensor:
        """0 where a row of this call sees a held or new row, a huge negative elsewhere: [1,1,S,n+S]."""
        held = self.layers[layer].positions[0] if self.layers else places[:0]
        rows = torch.cat([held, places]).view(1, -1)
        seen = rows <= places.view(-1, 1)
        if window:
            seen = seen & (rows > places.view(-1, 1) - window)
        return torch.where(seen, 0.0, HIDDEN)[None, None]

    def _take(self, cache: DynamicCache, places: Tensor) -> None:
        """Read the rows that the model appended; drop a block if that filled the cache."""
        fresh = []
        for i, layer in enumerate(cache.layers):
            held = self.layers[i].positions if self.layers else places.new_zeros(layer.keys.shape[1], 0)
            new = places.expand(layer.keys.shape[1], -1)
            fresh.append(Layer(layer.keys[0], layer.values[0], torch.cat([held, new], 1)))
        self.layers = fresh
        self.position += len(places)
        if self.count == self.budget + self.block and self.policy != "none":
            self.commits += 1
            windows = layer_windows(self.model.config)
            self.layers = [
                self._evict(i, layer, w) for i, (layer, w) in enumerate(zip(fresh, windows, strict=True))
            ]

    def _evict(self, index: int, layer: Layer, window: int) -> Layer:
        """The layer after a commit; a sliding-window layer keeps its newest rows whatever the policy."""
        if window:
            if self.watches:
                self.attended[index].keep([list(range(self.block, layer.keys.shape[1]))] * len(layer.keys))
            return Layer(*(t[:, self.block :] for t in (layer.keys, layer.values, layer.positions)))
        kept = []
        for scores in self._scores(index, layer):
            places, gap = survivors(scores, self.budget, self.sinks, self.recent)
            kept.append(places)
            self.narrowest = min(self.narrowest, gap)
        self.choices.append(kept)
        if self.watches:
            self.attended[index].keep(kept)
        pick = lambda t: torch.stack([t[h, places] for h, places in enumerate(kept)])  # noqa: E731
        keys, positions = pick(layer.keys), pick(layer.positions)
        if self.compact:
            fresh = torch.arange(self.budget).expand_as(positions)
            keys, positions = self._turned(self._turned(keys, positions, -1.0), fresh, 1.0), fresh
        return Layer(keys, pick(layer.values), positions)

    def _turned(self, keys: Tensor, positions: Tensor, way: float) -> Tensor:
        """Keys [KV,n,d] through the model's own rotary angles of these positions, forwards or backwards."""
        cos, sin = self.model.model.rotary_emb(keys, positions)
        half = keys.shape[-1] // 2
        return keys * cos + torch.cat([-keys[..., half:], keys[..., :half]], -1) * sin * way

    def _scores(self, index: int, layer: Layer) -> list[list[float]]:
        if self.policy == "sinks":
            return layer.positions.tolist()
        if self.policy == "keydiff":
            return keydiff_scores(layer.keys).tolist()
        attended, kv = self.attended[index], len(layer.keys)
        if self.policy == "lru":
            return (attended.last + torch.arange(attended.last.shape[1]) / 1e3).tolist()
        over, _, base = self.policy.rpartition("(")
        share = self._share(base.removesuffix(")"), attended).unflatten(0, (kv, -1))
        if not over:
            return share.mean(1).tolist()
        score = removal_scores if over == "caote" else mean_value_scores
        return [score(share[h], layer.values[h]).tolist() for h in range(kv)]

    def _share(self, base: str, attended: Attended) -> Tensor:
        """A base's attention over the rows held, summing to 1: [H,M]."""
        slots = self.budget + self.block
        if base == "h2o":
            return attended.total / attended.total.sum(-1, keepdim=True)
        rows = attended.rows[-(1 if base == "tova" else self.window) :]
        return torch.stack([F.pad(row, (0, slots - row.shape[1])) for row in rows]).mean(0)
