"""Texts that a target wrote, with the likeliest tokens it saw at every place: a draft is made from them.

A folder holds one .npz file a batch of prompts, each written whole, so that a run that was stopped goes on
and several machines share the work (`share`). Knows tokens and a Transformers model, nothing of drafts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgespec.errors import InputError
from edgespec.files import replaced, written_whole

NAME = "edgespec-grouped"
SETTINGS = "samples.json"
CHUNK = 16  # columns of a batch's prompts that a processor absorbs at once: they stay in its caches
ABSORBED = 2**16  # tokens that an accelerator absorbs at once
LEAST_BUSY = 0.25  # a batch ends when fewer of its rows are still being written: the rest stay as they are
MOST_ENDED = 0.125  # rows that have ended are computed along until they are this part: taking them out copies


@dataclass(frozen=True)
class Sample:
    """One text: `tokens` int32 [T], of which the first `prompt` were given and the rest were written.

    top_ids int32 and top_logp float16 [T - prompt, K]: the target's K likeliest tokens for each written
    place and their log-probabilities (of the whole vocabulary, temperature 1), falling. `temperature` 0 is
    greedy.
    """

    tokens: np.ndarray
    prompt: int
    top_ids: np.ndarray
    top_logp: np.ndarray
    temperature: float
    category: str


@dataclass(frozen=True)
class Settings:
    """How texts are written; prompt i is written at temperature `temperatures[i % len(temperatures)]`.

    A batch has `batch` rows where no prompt is longer than an answer may be, and fewer where one is, so that
    its cache has the same size.
    """

    max_new_tokens: int = 192
    batch: int = 48
    top: int = 32
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.7, 1.0)
    seed: int = 0


def generate(
    model: Any,
    prompts: Sequence[tuple[Sequence[int], str]],
    stop_ids: Sequence[int],
    folder: Path,
    settings: Settings,
    advance: Callable[[int, int], None],
    share: tuple[int, int] = (0, 1),
    given: bool = False,
) -> None:
    """Write the target's answers to (token ids, category) prompts into the folder, batch by batch.

    What the folder holds already is kept; InputError where it came from other prompts or settings. `share`
    (i, n) writes every n-th batch from the i-th. `given`: the prompts are texts, which the target only reads.
    `model` is put to another attention function (the same numbers).
    """
    require_same(folder, prompts, settings)
    model.set_attn_implementation(NAME)
    batches = batched(prompts, settings)
    for number in range(share[0], len(batches), share[1]):
        path = folder / f"batch-{number:05d}.npz"
        if not path.exists():
            rows = [
                (prompts[i], settings.temperatures[i % len(settings.temperatures)]) for i in batches[number]
            ]
            seed = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
            some = seen(model, rows, settings) if given else write(model, rows, stop_ids, settings, seed)
            save(path, some)
        advance(number + 1, len(batches))


def read(folder: Path) -> Iterator[Sample]:
    """Every text of a folder, in a fixed order; InputError where there is none or a file is damaged."""
    paths = sorted(folder.glob("batch-*.npz"))
    if not paths:
        raise InputError(
            f"{folder} holds no samples", "make some: edgespec draft samples TARGET --prompts FILE"
        )
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as file:
                held = {name: file[name] for name in file.files}
            yield from unpacked(held)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            hint = "delete the file and make the samples again: the others are kept"
            raise InputError(f"{path} is no file of samples ({error})", hint) from None


def require_same(folder: Path, prompts: Sequence[tuple[Sequence[int], str]], settings: Settings) -> None:
    """Begin the folder, or InputError where it was begun with other prompts or settings."""
    digest = sha256(json.dumps([[list(map(int, ids)), name] for ids, name in prompts]).encode()).hexdigest()
    wanted = json.dumps(asdict(settings) | {"prompts_sha256": digest}, indent=1) + "\n"
    path = folder / SETTINGS
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        written_whole(path, wanted)
    elif path.read_text(encoding="utf-8") != wanted:
        hint = "choose another folder, or go on with the same prompts and settings"
        raise InputError(f"{folder} holds samples of other prompts or settings", hint)


def batched(prompts: Sequence[Any], settings: Settings) -> list[list[int]]:
    """Numbers of the prompts of each batch: shuffled, then prompts of like length together, little
    padding."""
    order = np.random.default_rng(settings.seed).permutation(len(prompts))
    window = 8 * settings.batch
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        group: list[int] = []
        for i in sorted(order[start : start + window], key=lambda i: len(prompts[i][0])):
            columns = max(len(prompts[i][0]) / settings.max_new_tokens, 1) + 1
            if len(group) == settings.batch or (group and columns * (len(group) + 1) > 2 * settings.batch):
                batches.append(group)
                group = []
            group.append(int(i))
        batches.append(group)
    return batches


@torch.inference_mode()
def write(
    model: Any,
    rows: Sequence[tuple[tuple[Sequence[int], str], float]],
    stop_ids: Sequence[int],
    settings: Settings,
    seed: torch.Generator,
) -> list[Sample]:
    """The answers to a batch of ((token ids, category), temperature), left-padded and written side by
    side."""
    device, most = model.device, settings.max_new_tokens
    longest = max(len(ids) for (ids, _), _ in rows)
    given = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest + most, dtype=torch.long)
    for row, ((ids, _), _) in enumerate(rows):
        given[row, longest - len(ids) :] = torch.tensor(list(ids))
        mask[row, longest - len(ids) :] = 1
    given, mask = given.to(device), mask.to(device)
    heat = torch.tensor([temperature for _, temperature in rows], device=device)
    stops = torch.tensor(sorted(stop_ids), device=device)
    cache = Cache(layer_class_to_replicate=partial(Filled, longest + most))
    text = given.new_zeros(len(rows), most, dtype=torch.int32)
    ids_seen = text.new_zeros(len(rows), most, settings.top)
    logp_seen = ids_seen.new_zeros(ids_seen.shape, dtype=torch.float16)
    length, busy = given.new_zeros(len(rows)), torch.arange(len(rows), device=device)
    going = torch.ones_like(busy, dtype=torch.bool)
    chunk = CHUNK if device.type == "cpu" else max(CHUNK, ABSORBED // len(rows))
    for start in range(0, longest - 1, chunk):
        absorb(model, given[:, start : min(start + chunk, longest - 1)], mask, start, cache)
    tokens = given[:, -1:]
    for step in range(most):
        logits = absorb(model, tokens, mask[busy], longest - 1 + step, cache)
        logp = logits.float().log_softmax(-1)
        top_logp, top_ids = logp.topk(settings.top)
        chosen = choose(logp, top_ids, heat[busy], seed)
        text[busy, step], ids_seen[busy, step] = chosen.int(), top_ids.int()
        logp_seen[busy, step] = top_logp.half()
        length[busy] += going
        going &= ~torch.isin(chosen, stops)
        count = int(going.sum())
        if count < max(1, LEAST_BUSY * len(rows)):
            break
        if len(busy) - count > MOST_ENDED * len(busy):
            busy, chosen = busy[going], chosen[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
            going = going[going]
        tokens = chosen[:, None]
    if not torch.isfinite(logp_seen).all():
        raise InputError("the target's logits are no numbers in this arithmetic", "use --weights fp32")
    arrays = (length, text, ids_seen, logp_seen)
    return [sample(*one) for one in zip(rows, *(a.cpu().numpy() for a in arrays), strict=True)]


@torch.inference_mode()
def seen(
    model: Any, rows: Sequence[tuple[tuple[Sequence[int], str], float]], settings: Settings
) -> list[Sample]:
    """What the target sees in texts that others wrote: samples that count as written from the second token.

    One text at a time, since a batch's logits would fill the memory; their temperature is 1, for no text of
    these is greedy.
    """
    found = []
    for (ids, category), _ in rows:
        tokens = torch.tensor([list(ids)], device=model.device)
        logp = model(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        top_logp, top_ids = (x.cpu().numpy() for x in logp.topk(settings.top))
        kinds = (np.array(ids, np.int32), 1, top_ids.astype(np.int32), top_logp.astype(np.float16))
        found.append(Sample(*kinds, 1.0, category))
    return found


def absorb(model: Any, tokens: Tensor, mask: Tensor, start: int, cache: Cache) -> Tensor:
    """Logits [rows, V] of the last of `tokens` [rows, S], which stand at columns `start`... of the mask."""
    seen = mask[:, : start + tokens.shape[1]]
    places = (seen.cumsum(1) - 1).clamp_min(0)[:, start:]
    out = model(
        input_ids=tokens,
        attention_mask=seen,
        position_ids=places,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1]


def choose(logp: Tensor, top_ids: Tensor, temperature: Tensor, seed: torch.Generator) -> Tensor:
    """The next token of every row: the likeliest at temperature 0, else one drawn at its temperature."""
    warm = temperature > 0
    chosen = top_ids[:, 0].clone()
    if warm.any():
        below = (logp[warm] / temperature[warm, None]).softmax(-1).double().cumsum(-1)
        drawn = torch.rand(len(below), 1, generator=seed, dtype=torch.float64).to(below.device)
        drawn *= below[:, -1:]
        chosen[warm] = torch.searchsorted(below, drawn, right=True)[:, 0].clamp_max(logp.shape[1] - 1)
    return chosen


def sample(
    row: tuple[tuple[Sequence[int], str], float],
    length: int,
    text: np.ndarray,
    top_ids: np.ndarray,
    top_logp: np.ndarray,
) -> Sample:
    """A row's text with what was seen at its first `length` places."""
    (ids, category), temperature = row
    tokens = np.concatenate([np.array(ids, np.int32), text[:length]])
    return Sample(tokens, len(ids), top_ids[:length], top_logp[:length], temperature, category)


def save(path: Path, samples: list[Sample]) -> None:
    """Write a batch's file whole or not at all."""
    arrays: dict[str, Any] = {
        "tokens": np.concatenate([s.tokens for s in samples]),
        "lengths": np.array([len(s.tokens) for s in samples], np.int64),
        "prompts": np.array([s.prompt for s in samples], np.int64),
        "top_ids": np.concatenate([s.top_ids for s in samples]),
        "top_logp": np.concatenate([s.top_logp for s in samples]),
        "temperatures": np.array([s.temperature for s in samples]),
        "categories": np.array([s.category for s in samples]),
    }

    def to_file(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    replaced(path, to_file)


def unpacked(held: dict[str, np.ndarray]) -> Iterator[Sample]:
    """The samples of a file's arrays."""
    ends = np.cumsum(held["lengths"])
    written = held["lengths"] - held["prompts"]
    tops = np.cumsum(written)
    if len(held["tokens"]) != ends[-1] or len(held["top_ids"]) != tops[-1] or (written < 1).any():
        raise ValueError("its arrays do not fit together")
    for i, (end, top) in enumerate(zip(ends, tops, strict=True)):
        yield Sample(
            held["tokens"][end - held["lengths"][i] : end],
            int(held["prompts"][i]),
            held["top_ids"][top - written[i] : top],
            held["top_logp"][top - written[i] : top],
            float(held["temperatures"][i]),
            str(held["categories"][i]),
        )


class Filled(CacheLayerMixin):
    """A layer's keys and values in buffers of a given length: a step copies its own row only."""

    is_sliding = False  # a window is in the mask

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.count = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty buffers for these heads."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append rows [B,KV,S,d]; every row so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.count + key_states.shape[2]
        self.keys[:, :, self.count : end] = key_states
        self.values[:, :, self.count : end] = value_states
        self.count = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these texts only."""
        self.keys, self.values = self.keys[indices], self.values[indices]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next call will see, and the first one's number."""
        return self.count + query_length, 0

    def get_seq_length(self) -> int:
        """Rows so far."""
        return self.count

    def get_max_length(self) -> int:
        """Rows that fit."""
        return self.room


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


ALL_ATTENTION_FUNCTIONS.register(NAME, grouped)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
