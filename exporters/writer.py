"""Writes many texts side by side: one that ends gives its row to the next prompt.

Every row stands at a place of its own, so rows of all ages share a step, and prompts enter many at once.
Knows tokens and a Transformers model, nothing of files.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgespec.errors import InputError

NAME = "edgespec-rows"
ABSORBED = 768  # tokens of prompts that a processor absorbs at once: they stay in its caches
ABSORBED_GPU = 2**16
LOOK_GPU = 8  # steps between two looks at the rows that have ended: each look waits for the device
FREE = 0.125  # part of the rows that is free before prompts enter
LEAST_BUSY = 0.25  # with no prompt left, part of the rows below which the texts at work stay as they are
ALIGNED = 8  # a cache's length is a multiple, which attention kernels of GPUs ask for


@dataclass(frozen=True)
class Written:
    """What was written after each of n prompts: its `length`, its tokens, and what the target saw.

    length int64 [n]; text int32 [n, most]; top_ids int32 and top_logp float16 [n, most, K].
    """

    length: Tensor
    text: Tensor
    top_ids: Tensor
    top_logp: Tensor


class Board:
    """Where the rows of a cache stand: how many tokens each holds, and which rows prompts are entering."""

    def __init__(self, rows: int, room: int, device: Any) -> None:
        self.rows, self.room, self.seen = rows, room, room
        self.every = torch.arange(rows, device=device)
        self.column = torch.arange(room, device=device)
        self.held = torch.zeros(rows, dtype=torch.long, device=device)
        self.entering: Tensor | None = None

    def mask(self) -> Tensor:
        """Which columns [rows, seen] a row sees, its next token's with them."""
        return self.column[: self.seen] <= self.held[:, None]


@torch.inference_mode()
def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    stop_ids: Collection[int],
    rows: int,
    most: int,
    top: int,
    seed: int,
) -> Written:
    """Up to `most` tokens after each prompt, `rows` texts at a time; InputError where logits are no numbers.

    `model` is put to another attention function (the same numbers).
    """
    model.set_attn_implementation(NAME)
    device, nobody = model.device, len(prompts)
    rows = min(rows, len(prompts))
    room = -(-(max(map(len, prompts)) + most) // ALIGNED) * ALIGNED
    board = Board(rows, room, device)
    cache = Cache(layer_class_to_replicate=partial(Rows, board))
    draw = torch.Generator(device).manual_seed(seed)
    stops = torch.tensor(sorted(stop_ids), device=device)
    heat = torch.tensor([*temperatures, 0.0], device=device)
    text = torch.zeros(nobody + 1, most, dtype=torch.int32, device=device)
    ids = text.new_zeros(nobody + 1, most, top)
    logp = text.new_zeros(nobody + 1, most, top, dtype=torch.float16)
    length = torch.zeros(nobody + 1, dtype=torch.long, device=device)
    number, token = torch.full_like(board.held, nobody), torch.zeros_like(board.held)
    waiting = sorted(range(nobody), key=lambda i: len(prompts[i]))  # the longest enters first
    look = LOOK_GPU if device.type == "cuda" else 1
    for step in range(len(prompts) * most * look + 1):
        if step % look == 0:
            free = (number == nobody).nonzero()[:, 0]
            if waiting and len(free) >= FREE * rows:
                chosen = [waiting.pop() for _ in range(min(len(free), len(waiting)))]
                enter(model, cache, board, free[: len(chosen)], [prompts[i] for i in chosen])
                number[free[: len(chosen)]] = torch.tensor(chosen, device=device)
                last = torch.tensor([prompts[i][-1] for i in chosen], device=device)
                token[free[: len(chosen)]] = last
            elif not waiting and rows - len(free) < max(1, LEAST_BUSY * rows):
                break
            board.seen = min(room, int(board.held.max()) + look)
        logits = model(
            input_ids=token[:, None],
            attention_mask=board.mask(),
            position_ids=board.held[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        best, best_ids = logits.topk(top)
        token = choose(logits, best_ids[:, 0], heat[number], draw)
        place = length[number]
        text[number, place], ids[number, place] = token.int(), best_ids.int()
        logp[number, place] = (best.float() - logits.float().logsumexp(-1, keepdim=True)).half()
        length[number] = place + 1
        ended = torch.isin(token, stops) | (place + 1 == most)
        # a row that nobody has stays at its first place: it may wait longer than a row has places
        board.held = (board.held + 1).masked_fill(ended | (number == nobody), 0)
        number = number.masked_fill(ended, nobody)
        length[nobody] = 0
    if not torch.isfinite(logp).all():
        raise InputError("the target's logits are no numbers in this arithmetic", "use --weights fp32")
    return Written(*(table[:nobody].cpu() for table in (length, text, ids, logp)))


def enter(model: Any, cache: Cache, board: Board, free: Tensor, prompts: Sequence[Sequence[int]]) -> None:
    """Put all but the last token of each prompt into the free rows of the cache, the longest prompt first."""
    at_once = ABSORBED_GPU if board.held.is_cuda else ABSORBED
    start = 0
    while start < len(prompts):
        columns = len(prompts[start]) - 1
        some = prompts[start : start + max(1, at_once // max(1, columns))]
        board.entering = free[start : start + len(some)]
        board.held[board.entering] = torch.tensor([len(ids) - 1 for ids in some], device=free.device)
        if columns:
            given = torch.zeros(len(some), columns, dtype=torch.long)  # after a prompt: written over later
            for row, ids in enumerate(some):
                given[row, : len(ids) - 1] = torch.tensor(list(ids)[:-1])
            places = board.column[None, :columns].expand(len(some), -1)
            given = given.to(free.device)
            more = {"position_ids": places, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            model(input_ids=given, **more)
        start += len(some)
    board.entering = None


def choose(logits: Tensor, likeliest: Tensor, temperature: Tensor, draw: torch.Generator) -> Tensor:
    """The next token of every row: the likeliest at temperature 0, else one drawn at its temperature.

    Of -log E_x + logit(x) / T, E_x exponential, the largest is x with its probability (Gumbel's maximum).
    """
    if not (logits.is_cuda or temperature.any()):
        return likeliest
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=draw).log_()
    warm = temperature > 0
    drawn = (logits / temperature.where(warm, 1.0)[:, None] - noise).argmax(-1)
    return drawn.where(warm, likeliest)


class Rows(CacheLayerMixin):
    """A layer's keys and values, a row of `room` places for each text; the board says where a step writes."""

    is_sliding = False  # a window is in the mask

    def __init__(self, board: Board) -> None:
        super().__init__()
        self.board = board

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty rows for these heads."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            x.new_zeros(self.board.rows, x.shape[1], self.board.room, x.shape[3])
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values [n,KV,S,d] of prompts that enter, or [rows,KV,1,d] of next tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        board = self.board
        if board.entering is not None:
            columns = key_states.shape[2]
            self.keys[board.entering, :, :columns] = key_states
            self.values[board.entering, :, :columns] = value_states
            return key_states, value_states
        self.keys[board.every, :, board.held] = key_states[:, :, 0]
        self.values[board.every, :, board.held] = value_states[:, :, 0]
        return self.keys[:, :, : board.seen], self.values[:, :, : board.seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next call will see, and the first one's number."""
        return (query_length if self.board.entering is not None else self.board.seen), 0

    def get_seq_length(self) -> int:
        """Rows before a prompt's first; places are always given by name."""
        return 0

    def get_max_length(self) -> int:
        """Places of a row."""
        return self.board.room


def own_places(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **rest: Any
) -> Tensor | None:
    """The mask of a call by the model's own rule: of prompts that enter, or of tokens at the rows' places.

    `attention_mask` [rows, columns] has a row's own place as its last true one.
    """
    if attention_mask is None:
        return sdpa_mask(batch_size, q_length, kv_length, attention_mask=None, **rest)
    row = torch.arange(batch_size, device=attention_mask.device)[:, None, None, None]
    column = torch.arange(kv_length, device=attention_mask.device)[None, None, None]
    place = attention_mask.sum(1)[:, None, None, None] - 1
    return rest["mask_function"](row, 0, place, column)


def grouped(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in which a group's query heads share one product, without a copy of the keys for each.

    query [B,H,S,d], key and value [B,KV,n,d], boolean mask [B,1,S,n] or None for causal -> [B,S,H,d].
    """
    batch, heads, rows, dim = query.shape
    kv, seen = key.shape[1], key.shape[2]
    if query.is_cuda and not softcap:
        return fused(query, key, value, attention_mask, scaling), None
    scale = dim**-0.5 if scaling is None else scaling
    q = (query * scale).reshape(batch, kv, heads // kv * rows, dim)
    scores = (q @ key.transpose(-1, -2)).view(batch, kv, heads // kv, rows, seen)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None:
        full = torch.ones(rows, seen, dtype=torch.bool, device=query.device)
        attention_mask = full.tril(seen - rows)[None, None]
    scores = scores.masked_fill(~attention_mask[:, :, None], torch.finfo(scores.dtype).min)
    p = scores.softmax(-1).view(batch, kv, heads // kv * rows, seen)
    out = (p @ value).view(batch, heads, rows, value.shape[-1])
    return out.transpose(1, 2).contiguous(), None


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """`grouped` by a GPU's fused kernel; of one token a row, a group's heads are the kernel's queries."""
    attend = partial(torch.nn.functional.scaled_dot_product_attention, scale=scaling)
    batch, heads, rows, dim = query.shape
    if rows > 1 or mask is None:
        out = attend(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(1, 2).contiguous()
    kv = key.shape[1]
    group = query.view(batch, kv, heads // kv, dim)
    return attend(group, key, value, attn_mask=mask.expand(-1, 1, heads // kv, -1)).view(batch, 1, heads, -1)


ALL_ATTENTION_FUNCTIONS.register(NAME, grouped)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, own_places)
