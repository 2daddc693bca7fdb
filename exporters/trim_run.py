"""`edgespec trim`, step by step: the target answers or texts are read, tokens counted, sizes judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgespec import vocabulary
from edgespec.config_trim import TrimConfig
from edgespec.errors import InputError
from edgespec.exporters.checkpoint import Checkpoint, open_checkpoint
from edgespec.exporters.draft_checkpoint import OWN, open_draft
from edgespec.exporters.forms import FORMS
from edgespec.exporters.head import always_kept
from edgespec.exporters.plan import EMBEDDING, HEAD
from edgespec.exporters.samples import Sample, Settings, generate, read
from edgespec.exporters.tokenizer import Tokenizer, asked
from edgespec.exporters.trim import Corpus, Logits, chosen, curve, judged, ranked, scores, sizes_of
from edgespec.prompts import read as read_prompts
from edgespec.trim_result import TrimResult, best
from edgespec.vocabulary import Vocabulary

FORM = "int8"  # what bytes are counted in; c is nearly the same in any form that both models share
Render = Callable[[str, Sequence[dict[str, str]], str, str], str]


def trim(config: TrimConfig, render: Render, progress: Any) -> tuple[TrimResult, Vocabulary]:
    """The curve over sizes and the vocabulary of the one chosen. `render` fills a chat template."""
    target = open_checkpoint(config.target)
    draft = None if config.draft is None else open_draft(config.draft, target)
    tokens, vocab = target.tokenizer, target.config.vocab_size
    kept = always_kept(tokens.tokenizer_json, tokens.stop_ids, tokens.chat_template, vocab)
    sizes = sizes_of(len(kept), vocab, config.rows)
    corpora = answered(config, target, render, progress)
    counted, held_out = zip(*(corpus.split() for corpus in corpora), strict=True)
    score = scores(counted, vocab)
    order = ranked(score, kept)
    model = draft or open_draft(OWN, target)
    fits = model.config.hidden_size == target.config.hidden_size  # else the target's rows are no rows of its
    context_rows = config.context_rows if fits else 0
    costs = cost_of(target, model)
    logits = None if draft is None else logits_of(draft)
    ways = sorted({0, context_rows})
    total = sum(len(c.samples) for c in held_out)
    with progress.stage("sizes") as advance:
        done = iter(range(1, total + 1))
        figures = [
            judged(c, order, sizes, ways, logits, lambda _: advance(next(done), total)) for c in held_out
        ]
    whole = np.average(figures, axis=0, weights=[c.weight for c in corpora])
    rows = curve(whole, sizes, ways, costs)
    apart = {c.name: tuple(curve(f, sizes, ways, costs)) for c, f in zip(corpora, figures, strict=True)}
    most = best([r for r in rows if r.context_rows == context_rows])
    size = config.rows or most.size
    result = TrimResult(
        target.source,
        f"the proposals of {draft.source}" if draft else "coverage: a draft that is right wherever it can be",
        {c.name: c.weight for c in corpora},
        sum(c.tokens for c in counted if c.weight),
        sum(c.tokens for c in held_out),
        len(kept),
        size,
        "given" if config.rows else "the largest MBSU",
        tuple(rows),
        apart,
        bool(config.texts),
    )
    return result, made(target, result, chosen(order, score, size))


def made(target: Checkpoint, result: TrimResult, ids: tuple[int, ...]) -> Vocabulary:
    """The vocabulary file's contents."""
    how = {
        "target": target.source,
        "target_sha256": target.digest,
        "corpora": json.dumps(result.corpora),
        "tokens_counted": str(result.tokens_counted),
        "size": f"{result.size} ({result.chosen})",
        "measured_with": result.measured_with,
        "context_rows": str(max(r.context_rows for r in result.rows)),
    }
    return Vocabulary(vocabulary.SCHEMA, vocabulary.hash_of(target.tokenizer.tokenizer_json), ids, how)


def answered(config: TrimConfig, target: Checkpoint, render: Render, progress: Any) -> list[Corpus]:
    """The target's answers to every file of prompts; those in the folder already are not written again."""
    folder = Path(config.samples or f"{config.output}.samples")
    weights = config.weights_of or (1,) * config.corpora
    if config.texts:
        found = [as_read(target.tokenizer, Path(name), config.limit) for name in config.texts]
        return [
            Corpus(Path(name).name, w, s) for name, w, s in zip(config.texts, weights, found, strict=True)
        ]
    if not config.prompts:
        return [Corpus(folder.name, weights[0], checked(folder, target))]
    files = [
        (Path(name), spread(asked(target.tokenizer, read_prompts(name), render), config.limit))
        for name in config.prompts
    ]
    corpora, model = [], None
    for number, ((path, prompts), weight) in enumerate(zip(files, weights, strict=True), 1):
        place = folder / f"{number}-{path.name.split('.')[0]}"
        with progress.stage(f"{path.name}: answers") as advance:
            model = model or target.load_model()
            generate(model, prompts, target.tokenizer.stop_ids, place, Settings(), advance)
        corpora.append(Corpus(path.name, weight, checked(place, target)))
    return corpora


def as_read(tokenizer: Tokenizer, path: Path, limit: int) -> tuple[Sample, ...]:
    """A file's texts, each written from its second token on, of which no model has seen anything."""
    found = []
    for text in spread(read_prompts(path, answers=True), limit):
        ids = np.array(tokenizer.encoder.encode(text.text, add_special_tokens=False).ids, np.int32)
        if len(ids) > 1:
            unseen = np.zeros((len(ids) - 1, 0), np.int32), np.zeros((len(ids) - 1, 0), np.float16)
            found.append(Sample(ids, 1, *unseen, 0.0, text.category))
    return tuple(found)


def checked(folder: Path, target: Checkpoint) -> tuple[Sample, ...]:
    """A folder's samples; InputError where they cannot be this target's."""
    samples, vocab = tuple(read(folder)), target.config.vocab_size
    largest = max(max(int(s.tokens.max()), int(s.top_ids.max())) for s in samples)
    if largest >= vocab:
        raise InputError(
            f"{folder} holds the token {largest}, and {target.source} has {vocab}",
            "give the samples of this target",
        )
    return samples


def spread(prompts: list[Any], limit: int) -> list[Any]:
    """At most so many, evenly over the whole."""
    if len(prompts) <= limit:
        return prompts
    return [prompts[i * len(prompts) // limit] for i in range(limit)]


def logits_of(draft: Checkpoint) -> Logits:
    """What a draft, as Transformers runs it with its whole head, proposes at each written place of a text."""
    model = draft.load_model()

    @torch.inference_mode()
    def logits(sample: Sample) -> np.ndarray:
        tokens = torch.from_numpy(sample.tokens[:-1].astype(np.int64))[None]
        keep = len(sample.tokens) - sample.prompt
        found: np.ndarray = model(tokens, logits_to_keep=keep).logits[0].float().numpy()
        return found

    return logits


def cost_of(target: Checkpoint, draft: Checkpoint) -> Callable[[int, int], float]:
    """c of a draft with so many head rows and context rows: bytes that its call reads / the target's."""
    hidden = draft.config.hidden_size
    own, whole = body(draft), body(target) + stored(target.config.vocab_size, target.config.hidden_size)
    filled = lambda size, rows: min(rows, draft.config.vocab_size - size)  # a whole head lacks nothing  # noqa: E731
    return lambda size, rows: (own + stored(size, hidden) + 4 * filled(size, rows) * hidden) / whole


def body(checkpoint: Checkpoint) -> int:
    """Bytes that a call reads of a model but for its head: an embedding row is looked up, not streamed."""
    shapes = [checkpoint.shape(n) for n in checkpoint.names() if n not in (HEAD, EMBEDDING)]
    return sum(stored(*s) if len(s) == 2 else 4 * int(np.prod(s)) for s in shapes)


def stored(n: int, k: int) -> int:
    """Bytes of an [n,k] weight."""
    parts = FORMS[FORM].parts(n, k).values()
    return sum(np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in parts)
