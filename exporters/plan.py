"""Decides an export before anything is written: opens checkpoints, refuses what cannot work, makes jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from edgespec import vocabulary
from edgespec.bundle import require_space
from edgespec.config import EXECUTORCH_PRECISIONS, ExportConfig
from edgespec.errors import BackendError, InputError
from edgespec.exporters.assemble import Job
from edgespec.exporters.calibrate import calibrate, grid_of, steps_of
from edgespec.exporters.checkpoint import Checkpoint, layer_of, open_checkpoint
from edgespec.exporters.draft_checkpoint import OWN, Borrowing, open_draft, vocabulary_of
from edgespec.exporters.forms import FORMS
from edgespec.exporters.head import by_frequency, from_file
from edgespec.exporters.random_weights import RandomWeights
from edgespec.exporters.self_draft import LayerView
from edgespec.exporters.spans import spans_of
from edgespec.exporters.step import model_spec
from edgespec.exporters.tokenizer import encoded, first_turn
from edgespec.exporters.weights import array_bytes
from edgespec.parts import division, fewest
from edgespec.policy import queries
from edgespec.soc import LARGEST_WEIGHTS
from edgespec.spec import CODED, CacheSpec, ModelSpec

DEFAULT_FORM = {"cpu": "int8", "npu": "int4"}
WIDE = {"cpu": "int8", "npu": "fp16"}  # what an int4 bundle stores its most sensitive weights in:
# the head, which alone costs more in int4 than all the rest, and the ends of a checkpoint that is on no grid
CONTEXT_ROWS = 256
DRAFT_ROWS = 16384
RULES = {"int4": grid_of, "w4a16": steps_of}  # of the forms that weights are calibrated for
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CALIBRATION_WINDOW, CALIBRATION_WINDOWS = 512, 32
WORKING_SET = 1.5e9  # bytes: the libraries, a trace, and the copies of one parameter while it is encoded


def plan(config: ExportConfig) -> list[Job]:
    """The target's job, then the draft's if there is one; every refusal is raised here."""
    target = open_checkpoint(config.target)
    spec = model_spec(target.config)
    cache = cache_spec(config, spec, "target", target.source)
    precision = precisions(config)
    fused, reads_images = config.device == "cpu", target.images is not None
    refuse_pruning(config, target)
    job = Job("target", target, spec, cache, precision, config.widths, fused, reads_images=reads_images)
    jobs = [in_parts(config, job, config.parts)]
    if config.draft is not None:
        jobs.append(draft_job(config, jobs[0]))
    require_room(config, jobs)
    return jobs


def refuse_pruning(config: ExportConfig, target: Checkpoint) -> None:
    """InputError where an image encoder is to be pruned that the target has not."""
    if config.prunes_vision and target.images is None:
        flag = "--vision-flops" if config.vision_flops else "--vision-keep"
        raise InputError(f"{target.source} reads no images, so none of it is pruned", f"leave {flag} out")


def draft_job(config: ExportConfig, target: Job) -> Job:
    """The draft, its head trimmed to the most useful rows, which its context rows join."""
    checkpoint = open_draft(config.draft or "", target.checkpoint)
    spec = model_spec(checkpoint.config)
    tokens, vocab = target.checkpoint.tokenizer, min(spec.vocab, target.spec.vocab)
    known = (tokens.tokenizer_json, tokens.stop_ids)
    own = vocabulary_of(checkpoint)
    if file := config.draft_vocab or (own if config.draft_rows is None else None):
        ids = from_file(Path(file), *known, vocab, tokens.chat_template)
    else:
        rows, first = min(config.draft_rows or DRAFT_ROWS, vocab), ranked(own, tokens.tokenizer_json, vocab)
        ids = by_frequency(*known, choice_text(config), rows, vocab, tokens.chat_template, first)
    whose = target.checkpoint.source if config.draft == OWN else checkpoint.source
    cache = cache_spec(config, spec, "draft", whose)
    head: np.ndarray | None = None if len(ids) == spec.vocab else ids
    precision = target.precision
    form = config.draft_weights
    if form is None and isinstance(checkpoint.weights, Borrowing):
        # A trained draft is on int8's grid: nothing is rounded again
        form = WIDE["cpu"] if config.device == "cpu" and precision["linear"] == "int4" else None
    if form is not None:
        precision = precision | {"linear": form}
    job = Job("draft", checkpoint, spec, cache, precision, (), target.fused, head)
    job = replace(job, reads_images=checkpoint.adapter is not None)
    return in_parts(config, replace(job, context_rows=context_rows(config, job, target)))


def in_parts(config: ExportConfig, job: Job, count: int | None = None) -> Job:
    """The job in so many parts, or, for a SoC, in as many as its contexts need."""
    source = job.checkpoint.source
    if count is None and not config.soc:
        return job
    if count is not None and count > job.spec.layers:
        what = f"parts {count} are more than the {job.spec.layers} layers of {source}"
        raise InputError(what, f"use --parts {job.spec.layers} or fewer")
    sizes = bytes_of_layers(job)
    if count is not None:
        return replace(job, counts=division(sizes, count))
    if not (counts := fewest(sizes, LARGEST_WEIGHTS)):
        raise InputError(
            f"a layer of {source} has {max(sizes) / 2**30:.1f} GiB, more than a compiled context may hold",
            "use --weights w4a16",
        )
    return replace(job, counts=counts)


def bytes_of_layers(job: Job) -> list[int]:
    """About the bytes of each layer's matrices as stored, the first's with the embedding, the last's with
    the head.
    """
    sizes = [0] * job.spec.layers
    for name in job.checkpoint.names():
        shape, layer = job.checkpoint.shape(name), layer_of(name)
        if layer is not None and len(shape) == 2:
            sizes[layer] += bytes_in(job.form("linear", name), shape)
    sizes[0] += bytes_in(job.precision["embedding"], (job.spec.vocab, job.spec.hidden))
    sizes[-1] += bytes_in(job.precision["head"], (job.head_rows, job.spec.hidden))
    return sizes


def bytes_in(form: str, shape: tuple[int, ...]) -> int:
    """Bytes of a matrix [outputs,inputs] in a form."""
    return sum(array_bytes(*array) for array in FORMS[form].parts(*shape).values())


def ranked(own: Path | None, tokenizer_json: bytes, vocab: int) -> tuple[int, ...]:
    """The ids of the vocabulary that came with a draft, most frequent first."""
    return vocabulary.read(own, tokenizer_json, vocab).token_ids if own else ()


def context_rows(config: ExportConfig, draft: Job, target: Job) -> int:
    """How many context rows the draft's head gets; InputError where some are asked for that cannot be."""
    if config.context_rows == 0:
        return 0
    why = None
    if draft.head_ids is None:
        why = "the draft's head is not trimmed", "use fewer --draft-rows"
    elif config.device == "npu" and target.precision["head"] == "int4":
        why = "an npu looks nothing up in an int4 head", "use --head fp16"
    elif not same_head(draft, target):
        why = f"the head of {draft.checkpoint.source} is not the target's", "train it with the target's head"
    if why is None:
        return min(config.context_rows or CONTEXT_ROWS, draft.spec.vocab - draft.head_rows)
    if config.context_rows is None:
        return 0
    raise InputError(
        f"context_rows {config.context_rows} cannot be: {why[0]}", f"{why[1]}, or --context-rows 0"
    )


def same_head(draft: Job, target: Job) -> bool:
    """True where the draft's whole head is the target's, value by value."""
    if isinstance(draft.checkpoint.weights, LayerView):  # the target's own layers
        return True
    ours, theirs = head_name(draft), head_name(target)
    if draft.checkpoint.shape(ours) != target.checkpoint.shape(theirs):
        return False
    return torch.equal(draft.checkpoint.tensor(ours), target.checkpoint.tensor(theirs))


def head_name(job: Job) -> str:
    """The checkpoint's name of the LM head's weight."""
    tied = job.spec.tied or HEAD not in job.checkpoint.names()
    return EMBEDDING if tied and EMBEDDING in job.checkpoint.names() else HEAD


def shipped(name: str) -> str:
    """A text of the package: `wikitext` (WikiText-2 test: checks) or `calibration` (validation: choices)."""
    return files("edgespec.exporters").joinpath(f"{name}.txt").read_text(encoding="utf-8")


def choice_text(config: ExportConfig) -> str:
    """The text for token frequencies and calibration: never the one that `check` measures on."""
    return Path(config.text).read_text(encoding="utf-8") if config.text else shipped("calibration")


def calibrated(config: ExportConfig, job: Job, advance: Callable[[int, int], None]) -> Job:
    """The job with GPTQ's grids, for a checkpoint that is on none.

    A target's first and last layer stay wide: measured on SmolLM2 off its grid, that takes
    perplexity from 3.7 to 2.8 % above fp32. A draft of two layers would have nothing left in int4.
    """
    ends = "w8a16" if job.precision["linear"] == "w4a16" else WIDE[config.device]
    wide = {"ends": ends} if job.name == "target" and job.spec.layers > 2 else {}
    job = replace(job, precision=job.precision | wide)
    if isinstance(job.checkpoint.weights, RandomWeights):  # any grid is as good
        return job
    windows = calibration_windows(config, job, CALIBRATION_WINDOWS)
    form = job.precision["linear"]
    rounded = lambda name: job.form("linear", name) == form  # noqa: E731
    return replace(job, grids=calibrate(job.checkpoint, windows, rounded, advance, RULES[form]))


def with_spans(
    config: ExportConfig, job: Job, render: Callable[..., str] | None, advance: Callable[[int, int], None]
) -> Job:
    """The job with the spans of its activations, over a quarter as many windows as weights are rounded by.

    Every other one begins as a user's turn of a chat: a template's own tokens may reach furthest of all.
    """
    windows = calibration_windows(config, job, CALIBRATION_WINDOWS // 4)
    tokenizer = job.checkpoint.tokenizer
    if render is not None and tokenizer.chat_template:
        for window in windows[::2]:
            words = tokenizer.encoder.decode(window.tolist()[: len(window) // 2])
            turn = encoded(tokenizer, first_turn(tokenizer, words, render))[: len(window)]
            window[: len(turn)] = torch.tensor(turn)
    return replace(job, spans=spans_of(job.checkpoint, windows, advance))


def calibration_windows(config: ExportConfig, job: Job, most: int) -> torch.Tensor:
    """Token ids [n, length] of the calibration text; InputError where it is empty."""
    ids = Tokenizer.from_str(job.checkpoint.tokenizer.tokenizer_json.decode())
    tokens = ids.encode(choice_text(config), add_special_tokens=False).ids
    length = min(CALIBRATION_WINDOW, job.spec.positions, len(tokens))
    if not length:
        raise InputError("the calibration text is empty", "give a text of a few thousand words with --text")
    count = min(len(tokens) // length, most)
    return torch.tensor(tokens[: count * length]).reshape(count, length)


def cache_spec(config: ExportConfig, spec: ModelSpec, name: str, source: str) -> CacheSpec:
    """A model's cache; refused where it would cut a sliding window or outgrow the model's positions."""
    draft = name == "draft"
    budget = config.draft_budget if draft else config.budget
    flag = "--draft-budget" if draft else "--budget"
    window = max(spec.windows)
    if budget < window and not config.truncate_window:
        raise InputError(
            f"budget {budget} is below {source}'s sliding window of {window} tokens",
            f"use {flag} {window} or more, or --truncate-window to shorten the window",
        )
    if budget + config.block > spec.positions:
        raise InputError(
            f"budget {budget} + block {config.block} are more slots than "
            f"{source}'s {spec.positions} positions",
            f"use {flag} {spec.positions - config.block} or less"
            if 2 * config.block <= spec.positions
            else f"use --block {spec.positions // 2} or less",
        )
    if config.positions == "compact" and window:
        raise InputError(
            f"compact positions need layers that all attend to the whole cache; {source} has sliding windows",
            "leave --positions out",
        )
    policy = config.draft_policy if draft else config.policy
    return CacheSpec(
        "append" if config.device == "cpu" and config.format == "onnx" else "rows",
        budget,
        config.block,
        policy,
        config.sinks,
        config.recent,
        (budget,) if draft else config.all_buckets,
        config.block,
        queries(policy, config.block, config.observed),
        config.positions,
        "int8" if config.coded else "float32",
    )


def precisions(config: ExportConfig) -> dict[str, str]:
    """The form of each layer class; a tied head and embedding share one table when they share a form."""
    if config.format == "executorch":
        linear = config.weights or EXECUTORCH_PRECISIONS[0]
        head = config.head or (WIDE["cpu"] if linear == "int4" else linear)
        return {"linear": linear, "head": head, "embedding": config.embedding or head}
    linear = config.weights or DEFAULT_FORM[config.device]
    head = config.head or (WIDE[config.device] if linear == "int4" else linear)
    if linear in CODED:
        head = config.head or "w8a16"
        return {"linear": linear, "head": head, "embedding": config.embedding or "w8a16"}
    embedding = config.embedding or (head if config.device == "cpu" else "fp16")
    return {"linear": linear, "head": head, "embedding": embedding}


def require_room(config: ExportConfig, jobs: list[Job]) -> None:
    """BackendError where the disk or the memory cannot hold what the export needs."""
    bytes_needed = sum(stored_bytes(job) for job in jobs)
    require_space(config.output, int(1.1 * bytes_needed))
    largest = max(int(np.prod(job.checkpoint.shape(name))) for job in jobs for name in job.checkpoint.names())
    available, needed = memory_available(), int(WORKING_SET + 16 * largest)
    if available is not None and available < needed:
        raise BackendError(
            f"the export needs {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free",
            "close other programs, or export on a larger machine",
        )


def stored_bytes(job: Job) -> int:
    """About the bytes of a job's weights file."""
    shapes = (job.checkpoint.shape(name) for name in job.checkpoint.names())
    return sum(bytes_in(job.precision["linear"], shape) for shape in shapes if len(shape) == 2)


def memory_available() -> int | None:
    """Bytes that this machine can still give, None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
