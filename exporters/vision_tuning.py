"""`edgespec vision tune`: an encoder trained on with fewer tokens in its layers, without labels."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from edgespec.config_vision import VisionTuneConfig
from edgespec.errors import InputError
from edgespec.exporters import selector_training
from edgespec.exporters.images import PROCESSOR_FILES
from edgespec.exporters.tosa import BySelector, Pruned, evenly, flops
from edgespec.exporters.vision import (
    WEIGHTS,
    endless,
    kind_of,
    opened_model,
    parted,
    prepared,
    pruning,
    sha256_of,
)
from edgespec.exporters.vision_budget import features, likeness
from edgespec.exporters.vision_encoder import encoder_of

SELECTORS = "selectors.safetensors"
LOOKS = 6  # at the held-out images while it learns


def loss_of(ours: Tensor, whole: Tensor) -> Tensor:
    """How far features [B,N,D] are from the whole encoder's: 1 - their mean cosine, and the squared error
    as a part of the whole's mean square. 0 where they are the same.
    """
    turned = 1 - torch.cosine_similarity(ours, whole, dim=-1).mean()
    return turned + (ours - whole).square().mean() / whole.square().mean()


def tune(config: VisionTuneConfig, progress: Any) -> dict[str, Any]:
    """Train the encoder's layers until, pruned as asked, they give what they gave whole; write the model.

    The paper (ToSA, arXiv 2406.08816) trains on with its task's labels; here the whole encoder is the
    teacher (feature distillation), so that images are enough. The embedding, positions, class and register
    tokens stay as they are, and so do selectors, which the new model's folder gets too. InputError where a
    loss is no number, or for a model that is more than an encoder.

    Held-out images choose which of a few looks is kept, so that `similarity_after` flatters a little.
    """
    with progress.stage("encoder"):
        model, absent, pixels, digest = opened_model(config.model)
        encoder = encoder_of(model, pixels.size)
        teacher = copy.deepcopy(encoder)
    learned, held_out = parted(config.images)
    keeps = evenly(encoder, config.keep, kind_of(config.method))
    way = pruning(encoder, digest, config.method, config.selectors, config.bypass)(keeps)
    test = prepared(pixels, held_out)

    @torch.no_grad()
    def judged() -> dict[str, float]:
        return likeness(way, test, whole)

    with progress.stage("held-out images, before"), torch.no_grad():
        whole = features(teacher, test)
        before = judged()
    weights = [*encoder.layers.parameters(), *encoder.last.parameters()]
    with progress.stage("training") as advance:
        batches = endless(pixels, learned, config)
        best, after = _train(way, teacher, weights, batches, config, judged, before, advance)
    if best == 0:
        hint = "use a lower --rate, or more --steps"
        raise InputError("no step of the training made the held-out images' features any more alike", hint)
    facts = {
        "images": len(learned),
        "held_out": len(held_out),
        "steps": config.steps,
        "best_step": best,
        "flops": flops(way) / flops(encoder),
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
    }
    _write(config, model, absent, way, facts)
    return facts


def _train(
    way: nn.Module,
    teacher: nn.Module,
    weights: list[nn.Parameter],
    batches: Any,
    config: VisionTuneConfig,
    judged: Callable[[], dict[str, float]],
    figures: dict[str, float],
    advance: Any,
) -> tuple[int, dict[str, float]]:
    """AdamW, its rate rising over a tenth of the steps and falling as a cosine; LOOKS times the encoder is
    judged, and the weights left are those of the best, whose step and figures are returned (0: as it came).
    """
    optimizer = torch.optim.AdamW(weights, lr=config.rate, weight_decay=0.0)
    warm, whole_way = max(1, config.steps // 10), math.pi / config.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warm, (1 + math.cos(done * whole_way)) / 2)
    )
    best, kept = 0, [p.detach().clone() for p in weights]
    for step, images in zip(range(1, config.steps + 1), batches, strict=False):
        with torch.no_grad():
            whole = teacher(images)
        loss = loss_of(way(images), whole)
        if not torch.isfinite(loss):
            raise InputError(f"the loss of step {step} is {loss.item()}", "use a lower --rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        advance(step, config.steps)
        if step * LOOKS // config.steps > (step - 1) * LOOKS // config.steps:
            found = judged()
            if found["similarity"] > figures["similarity"]:
                best, figures, kept = step, found, [p.detach().clone() for p in weights]
    with torch.no_grad():
        for parameter, value in zip(weights, kept, strict=True):
            parameter.copy_(value)
    return best, figures


def _write(
    config: VisionTuneConfig, model: Any, absent: set[str], way: Pruned, facts: dict[str, Any]
) -> None:
    """The folder of the tuned model, by one rename: its weights, its processor, selectors bound to it."""
    output, source = Path(config.output), Path(config.model)
    with TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.") as place:
        folder = Path(place) / "model"
        held = {name: tensor for name, tensor in model.state_dict().items() if name not in absent}
        model.save_pretrained(folder, state_dict=held)
        for name in PROCESSOR_FILES:
            if (source / name).is_file() and not (folder / name).exists():
                shutil.copy(source / name, folder / name)
        if isinstance(way.importance, BySelector):
            selectors = {int(number): one for number, one in way.importance.selectors.items()}
            selector_training.write(folder / SELECTORS, selectors, sha256_of(folder / WEIGHTS), facts)
        os.rename(folder, output)
