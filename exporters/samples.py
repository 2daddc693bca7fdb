"""Texts that a target wrote, with the likeliest tokens it saw at every place: a draft is made from them.

A folder holds one .npz file a batch of prompts, each written whole, so that a run that was stopped goes on
and several machines share the work (`share`). Knows tokens and a Transformers model, nothing of drafts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from edgespec.errors import InputError
from edgespec.exporters.writer import write
from edgespec.files import replaced, written_whole

SETTINGS = "samples.json"
ROUNDS = 2  # files hold so many times the prompts that are answered side by side


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

    `batch` are written side by side where no prompt is longer than an answer may be, and fewer where one is,
    so that their cache has the same size.
    """

    max_new_tokens: int = 192
    batch: int = 48
    top: int = 32
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.7, 1.0)
    seed: int = 0

    def rows(self, longest: int) -> int:
        """How many texts are written side by side after prompts of at most `longest` tokens."""
        return max(1, min(self.batch, int(2 * self.batch / (longest / self.max_new_tokens + 1))))


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
    batches = batched(prompts, settings)
    for number in range(share[0], len(batches), share[1]):
        path = folder / f"batch-{number:05d}.npz"
        if not path.exists():
            rows = [
                (prompts[i], settings.temperatures[i % len(settings.temperatures)]) for i in batches[number]
            ]
            seed = settings.seed * 1_000_003 + number
            some = seen(model, rows, settings) if given else answers(model, rows, stop_ids, settings, seed)
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
    """Numbers of the prompts of each file: shuffled, then prompts of like length together, little padding.

    The files are shuffled too, so that a run that is stopped has prompts of every length.
    """
    draw = np.random.default_rng(settings.seed)
    order = draw.permutation(len(prompts))
    window = 8 * ROUNDS * settings.batch
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        group: list[int] = []
        for i in sorted(order[start : start + window], key=lambda i: len(prompts[i][0])):
            if len(group) >= ROUNDS * settings.rows(len(prompts[i][0])):
                batches.append(group)
                group = []
            group.append(int(i))
        batches.append(group)
    return [batches[i] for i in draw.permutation(len(batches))]


def answers(
    model: Any,
    rows: Sequence[tuple[tuple[Sequence[int], str], float]],
    stop_ids: Sequence[int],
    settings: Settings,
    seed: int,
) -> list[Sample]:
    """The answers to ((token ids, category), temperature), written side by side."""
    prompts, heat = [ids for (ids, _), _ in rows], [temperature for _, temperature in rows]
    most, top = settings.max_new_tokens, settings.top
    out = write(model, prompts, heat, stop_ids, settings.rows(max(map(len, prompts))), most, top, seed)
    tables = (table.numpy() for table in (out.length, out.text, out.top_ids, out.top_logp))
    return [sample(*one) for one in zip(rows, *tables, strict=True)]


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
