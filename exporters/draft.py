"""From a target to a draft: its prompts and samples, the training, and the folder that an export reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from edgespec.config_draft import ANY, DraftPromptsConfig, DraftSamplesConfig, DraftTrainConfig
from edgespec.errors import InputError
from edgespec.exporters.checkpoint import Checkpoint, open_checkpoint
from edgespec.exporters.distill import MODEL, Training, train
from edgespec.exporters.draft_checkpoint import open_draft, save_draft, tables
from edgespec.exporters.head import always_kept
from edgespec.exporters.rounded import rounded
from edgespec.exporters.samples import Sample, Settings, generate, read
from edgespec.exporters.self_draft import draft_of
from edgespec.exporters.tokenizer import asked, decoder, pieces, unasked
from edgespec.exporters.trim import Corpus, chosen, ranked, scores
from edgespec.files import written_whole
from edgespec.prompts import Prompt, digest

HELD_OUT = 20  # every 20th text is measured on and not learned
MOST_HELD_OUT = 2000  # texts
SHORTEST = 8  # characters of a prompt
PROMPTS = "prompts.jsonl"
ENDS = 2  # layers of the target's beginning, and of its end, that a draft begins as


def write_prompts(
    config: DraftPromptsConfig, excluded: Collection[str], render: Callable[..., str], progress: Any
) -> dict[str, Any]:
    """Let the target write what a user might ask it; the file, and how many prompts it holds.

    Magpie (arXiv 2406.08464): the target goes on from where its chat template's user begins to speak.
    `excluded` are digests of prompts that are left out.
    """
    set_threads(config.threads)
    with progress.stage("checkpoint"):
        target = open_checkpoint(config.target)
        model = writing(target, config.weights)
    begun = unasked(target.tokenizer, ["" if words == ANY else words for words in config.begin], render)
    settings = Settings(config.max_new_tokens, config.batch, 1, (config.temperature,), config.seed)
    folder = Path(config.output)
    with progress.stage("prompts") as advance:
        rows = [begun[i % len(begun)] for i in range(config.count)]
        generate(model, rows, target.tokenizer.stop_ids, folder, settings, advance)
    stops, found = set(target.tokenizer.stop_ids), dict[str, dict[str, str]]()
    text_of = decoder(target.tokenizer)
    for s in read(folder):
        start = text_of(s.tokens[: s.prompt].tolist())
        text = (s.category + text_of(s.tokens.tolist()).removeprefix(start)).strip()
        if int(s.tokens[-1]) in stops and len(text) >= SHORTEST and digest(text) not in excluded:
            found.setdefault(digest(text), {"prompt": text, "category": s.category or ANY})
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in found.values()]
    written_whole(folder / PROMPTS, "".join(lines))
    return {"file": str(folder / PROMPTS), "prompts": len(lines), "written": config.count}


def write_samples(
    config: DraftSamplesConfig, prompts: Sequence[Prompt], render: Callable[..., str], progress: Any
) -> dict[str, Any]:
    """Write the target's answers to the prompts, or what it sees in the texts; how many texts and tokens the
    folder then holds. InputError where the texts hold nothing."""
    set_threads(config.threads)
    with progress.stage("checkpoint"):
        target = open_checkpoint(config.target)
        model = writing(target, config.weights)
        most = target.config.get_text_config().max_position_embeddings // 2
        rows = [one for one in asked(target.tokenizer, prompts, render) if len(one[0]) <= most]
        rows = read_texts(config, target) if config.texts else rows
    settings = Settings(config.max_new_tokens, config.batch, config.top, seed=config.seed)
    folder, stops = Path(config.output), target.tokenizer.stop_ids
    with progress.stage("samples") as advance:
        generate(model, rows, stops, folder, settings, advance, config.part, given=bool(config.texts))
    texts = list(read(folder))
    return {
        "folder": str(folder),
        "texts": len(texts),
        "tokens": sum(len(s.tokens) - s.prompt for s in texts),
    }


def read_texts(config: DraftSamplesConfig, target: Checkpoint) -> list[tuple[list[int], str]]:
    """The texts in pieces as long as a prompt's last token and an answer."""
    try:
        texts = [(Path(path).stem, Path(path).read_text(encoding="utf-8")) for path in config.texts]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"texts cannot be read: {error}", "give files of UTF-8 text") from None
    if rows := pieces(target.tokenizer, texts, config.max_new_tokens + 1):
        return rows
    raise InputError("the texts hold fewer than two tokens", "give longer ones")


def train_draft(config: DraftTrainConfig, progress: Any) -> dict[str, Any]:
    """Train, then write the best checkpoint as a draft's folder; its facts."""
    from accelerate import Accelerator

    set_threads(config.threads)
    folder, work = Path(config.output), Path(config.output) / "training"
    with progress.stage("checkpoint"):
        target = open_checkpoint(config.target)
        first = beginning(config, target)
        model = first.load_model()
        if config.fresh:
            forget(model, target, config.seed)
    with progress.stage("samples"):
        texts = [sample for folder in config.samples for sample in read(Path(folder))]
        kept_of_each = {s.top_ids.shape[1] for s in texts}
        if len(kept_of_each) > 1:
            counts = " and ".join(map(str, sorted(kept_of_each)))
            raise InputError(f"the samples keep {counts} tokens a place", "make them with one --top")
        every = max(HELD_OUT, len(texts) // MOST_HELD_OUT)
        held_out = texts[::every]
        learned_from = [s for i, s in enumerate(texts) if i % every]
        kept = frequent(target, learned_from, config.draft_rows)
    training = Training(
        config.steps, config.loss, config.rate, min(50, config.steps // 10), config.tokens,
        longest=config.longest, seed=config.seed, measure=config.measure, patience=config.patience,
    )  # fmt: skip
    gpu = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not gpu, mixed_precision="bf16" if gpu else "no")
    note = progress.note if accelerator.is_main_process else lambda _: None
    with progress.stage("training") as advance:
        state = train(
            model,
            learned_from,
            held_out,
            np.array(sorted(kept)),
            work,
            training,
            accelerator,
            advance,
            note,
        )
    if accelerator.is_main_process:
        facts = {
            "block_efficiency": state["best"],
            "drafts": training.drafts,
            "tokens_learned": state["tokens"],
            "samples": len(learned_from),
            "training": asdict(training),
            "begins_as": Path(config.init).name if config.init else list(layers(config, target)),
            "fresh": config.fresh > 0,
        }
        save_draft(folder, target, first.config, load_file(work / MODEL), kept, facts)
    accelerator.wait_for_everyone()
    return json.loads((folder / "draft.json").read_text(encoding="utf-8"))


def beginning(config: DraftTrainConfig, target: Checkpoint) -> Checkpoint:
    """What the draft is before the first step; `fresh` layers are still the target's first."""
    if config.init:
        return open_draft(config.init, target)
    return draft_of(target, layers(config, target))


def layers(config: DraftTrainConfig, target: Checkpoint) -> tuple[int, ...]:
    """The target's layers that the draft begins as: those given, its first, or its first and last two."""
    count = target.config.get_text_config().num_hidden_layers
    ends = sorted({*range(min(ENDS, count)), *range(max(0, count - ENDS), count)})
    chosen = config.layers or tuple(range(config.fresh)) or tuple(ends)
    if chosen[-1] >= count:
        raise InputError(f"{target.source} has no layer {chosen[-1]}", f"use --layers below {count}")
    return chosen


def forget(model: Any, target: Checkpoint, seed: int) -> None:
    """Give the model random weights as its class makes them, but for the embedding and the LM head."""
    torch.manual_seed(seed)
    fresh, kept = dict(type(model)(model.config).named_parameters()), tables(target)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in kept:
                parameter.copy_(fresh[name])


def frequent(target: Checkpoint, texts: Sequence[Sample], rows: int) -> tuple[int, ...]:
    """The ids of a head of `rows`, most frequent first, by the rule of `edgespec trim`."""
    vocab, tokens = target.config.get_text_config().vocab_size, target.tokenizer
    kept = always_kept(tokens.tokenizer_json, tokens.stop_ids, tokens.chat_template, vocab)
    score = scores([Corpus("samples", 1, tuple(texts))], vocab)
    return chosen(ranked(score, kept), score, max(rows, len(kept)))


def writing(target: Checkpoint, weights: str) -> Any:
    """The target's model ready to write in this arithmetic, on a GPU where there is one."""
    gpu = torch.cuda.is_available()
    if gpu and weights == "int8":
        raise InputError("a GPU does not write in int8", "use --weights fp16")
    model = target.load_model()
    if weights == "fp16":
        for parameter in model.parameters():  # not the buffers: angles need their float32
            parameter.data = parameter.data.half()
    return model.cuda() if gpu else rounded(model) if weights == "int8" else model


def set_threads(threads: int) -> None:
    """PyTorch's threads, 0 leaves its default; on a GPU float32 products may round to tf32."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    if threads:
        torch.set_num_threads(threads)
