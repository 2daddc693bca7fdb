"""The parts of a Transformers model that the step graph replaces: attention, the cache, the rotary table.

The model's code stays Transformers' own. It calls the attention function that is registered here (the public
AttentionInterface) and a Cache whose update() hands back the call's own rows; neither knows a model family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgespec.errors import InputError

NAME = "edgespec"
MASKED = -1e4  # finite: an NPU turns -inf into gibberish, and fp16 ends at 65,504
# What Transformers passes to every attention function and what changes nothing in this graph.
HARMLESS = frozenset(
    {
        "dropout",
        "is_causal",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "position_embeddings",
        "past_key_values",
        "return_dict",
        "output_hidden_states",
        "num_items_in_batch",
        "layer_idx",
        "softmax_scale",
    }
)


@torch.library.custom_op("edgespec::attend", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows attend to the cache's first `count` slots and to the rows before them in their own call.

    query [1,H,S,d], key/value [1,KV,S,d], keys/values [1,KV,slots,d] (slots >= count), count [1] ->
    out [1,S,H,d], and the call's own key and value rows (copies: an operator's output may not be its input).
    window w > 0: row r sees only the last w of (slots < count, rows <= r); slots stand in order of position.
    """
    _, heads, rows, dim = query.shape
    kv, slots = key.shape[1], keys.shape[2]
    q = query.reshape(1, kv, heads // kv, rows, dim) * scale
    scores = torch.cat([q @ keys.unsqueeze(2).transpose(-1, -2), q @ key.unsqueeze(2).transpose(-1, -2)], -1)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    slot, row = torch.arange(slots), torch.arange(rows)
    seen = torch.cat([(slot < count).expand(rows, slots), row.view(1, -1) <= row.view(-1, 1)], 1)
    if window:
        place = torch.cat([slot.expand(rows, slots), (count + row).expand(rows, rows)], 1)
        seen = seen & (place > (count + row).view(-1, 1) - window)
    p = torch.where(seen, scores, MASKED).softmax(-1)
    out = p[..., :slots] @ values.unsqueeze(2) + p[..., slots:] @ value.unsqueeze(2)
    return out.reshape(1, heads, rows, dim).transpose(1, 2).contiguous(), key.clone(), value.clone()


@attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _, heads, rows, dim = query.shape
    return query.new_empty(1, rows, heads, dim), torch.empty_like(key), torch.empty_like(value)


class StepCache(Cache):
    """A call's view of the caches: 2L buffers and the count.

    Collects what each layer computed: its new rows, and its queries, not yet multiplied by the `scales`.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], count: Tensor) -> None:
        self.keys, self.values, self.count = keys, values, count
        self.new_keys: dict[int, Tensor] = {}
        self.new_values: dict[int, Tensor] = {}
        self.queries: dict[int, Tensor] = {}
        self.scales: dict[int, float] = {}
        self.layers: list[Any] = []
        self.offloading = False

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        """0: nothing outside this graph may depend on the count."""
        return 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: unbounded, as a dynamic cache says."""
        return -1

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The call's own rows, unchanged."""
        return key, value


@dataclass
class Call:
    """What the attention function and the rotary function need to know of the call under way."""

    cache: StepCache | None = None
    angles: list[tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=list
    )  # (cos as the model sees it, half cos, half sin)


CALL = Call()


@contextlib.contextmanager
def calling(cache: StepCache) -> Iterator[StepCache]:
    """Within it the registered attention function uses this cache."""
    CALL.cache, CALL.angles = cache, []
    try:
        yield cache
    finally:
        CALL.cache, CALL.angles = None, []


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function over the step cache; refuses what it cannot honour by name."""
    cache = CALL.cache
    if cache is None:
        raise RuntimeError("the edgespec attention runs inside calling(cache) only")
    layer = module.layer_idx
    refuse(module, key, value, attention_mask, kwargs)
    if key.shape[1::2] != cache.keys[layer].shape[1::2]:
        computed, named = tuple(key.shape[1::2]), tuple(cache.keys[layer].shape[1::2])
        raise InputError(
            f"{type(module).__name__} computes {computed[0]} key-value heads of {computed[1]} dimensions, "
            f"its configuration names {named[0]} of {named[1]}",
            "choose a model whose num_key_value_heads and head_dim are those of its every layer",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out, new_key, new_value = attend(
        query,
        key,
        value,
        cache.keys[layer],
        cache.values[layer],
        cache.count,
        layer,
        scale,
        sliding_window or 0,
        float(softcap or 0),
    )
    cache.new_keys[layer], cache.new_values[layer] = new_key, new_value
    cache.queries[layer], cache.scales[layer] = query, scale
    return out, None


def refuse(module: Any, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
    """InputError for the first attention feature that the step graph does not have."""
    name = type(module).__name__
    what = None
    if mask is not None:
        what = "passes its own attention mask"
    elif getattr(module, "is_causal", True) is False:
        what = "is not causal"
    elif key.shape[-1] != value.shape[-1]:
        what = f"has keys of {key.shape[-1]} and values of {value.shape[-1]} dimensions"
    else:
        for word, given in kwargs.items():
            if given is not None and word not in HARMLESS:
                what = f"needs the attention feature {word!r}"
    if what:
        raise InputError(
            f"{name} {what}, which a fixed-shape step graph does not have",
            "choose a model without it; nothing was exported",
        )


ALL_ATTENTION_FUNCTIONS.register(
    NAME, attention
)  # no mask function of this name: Transformers then builds no mask
