"""Puts a target's image encoder into a bundle: its graph with the projector, its weights, its processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgespec.config import ExportConfig
from edgespec.errors import InputError
from edgespec.exporters.checkpoint import Checkpoint
from edgespec.exporters.commit import exported
from edgespec.exporters.images import AGAIN, PROCESSOR_FILES, Pixels, Sight, image_files
from edgespec.exporters.tosa import evenly
from edgespec.exporters.vision import GRAPH, MEASURED, kind_of, prepared, pruning
from edgespec.exporters.vision_budget import shared_out
from edgespec.exporters.vision_encoder import Encoder
from edgespec.exporters.vision_language import Adapter, ForBoth, Projected, encoder_and_projector, images_of
from edgespec.spec import VISION, GraphSpec, VisionEntry, vision_tensors

PROCESSORS = "processor"  # the folder of a bundle that holds the model's own
SELECTORS = f"{VISION}-selectors.safetensors"


def pruned_as(
    encoder: Encoder, digest: str, method: str, keeps: Mapping[int, int], selectors: Path
) -> nn.Module:
    """The encoder pruned as a bundle says; `selectors` is read where the method is tosa."""
    if method == "whole":
        return encoder
    return pruning(encoder, digest, method, str(selectors) if method == "tosa" else "")(keeps)


def fitting(encoder: Encoder, processor: Path, images: Path) -> Tensor:
    """The first images of a folder as the processor makes them; InputError where the encoder takes others."""
    made = prepared(Pixels(processor), image_files(images)[:MEASURED])
    wanted = (3, encoder.size, encoder.size)
    if made.shape[1:] != wanted:
        raise InputError(f"the processor makes pictures of {tuple(made.shape[1:])}, not {wanted}", AGAIN)
    return made


def export_images(
    config: ExportConfig, target: Checkpoint, adapter: Adapter | None, folder: Path, progress: Any
) -> VisionEntry:
    """Write the target's image encoder with its projector (and a draft's adapter), and its processor, into a
    bundle's folder.

    InputError where the processor makes other pictures, or gives them other rows, than the model takes.
    """
    with progress.stage("vision: encoder"):
        side = images_of(target)
        encoder, projector, first = encoder_and_projector(side, target.source)
        test = fitting(encoder, side.folder, Path(config.vision_images)) if config.vision_images else None
    keeps = evenly(encoder, config.vision_keep, kind_of(config.vision_method))
    if config.vision_flops and test is not None:
        with progress.stage("vision: what each layer keeps"):
            pruned = pruning(encoder, target.digest, config.vision_method, config.vision_selectors or "")
            layers = kind_of(config.vision_method).layers(encoder)
            keeps = shared_out(layers, encoder, pruned, test, config.vision_flops)
    with progress.stage("vision: graph"), torch.no_grad():
        method, selectors = config.vision_method if keeps else "whole", ""
        if keeps and config.vision_selectors:
            selectors = SELECTORS
            (folder / SELECTORS).write_bytes(Path(config.vision_selectors).read_bytes())
        way = pruned_as(encoder, target.digest, method, keeps, folder / SELECTORS)
        whole: nn.Module = Projected(way, projector, first).eval()
        rows, hidden = whole(torch.zeros(1, 3, encoder.size, encoder.size)).shape[1:]
        draft: tuple[int, ...] = ()
        if adapter is not None:
            if rows % adapter.rows:
                said = f"a draft cannot see {adapter.rows} rows of a picture of {rows}"
                raise InputError(said, "train its adapter for this target")
            draft = (adapter.rows, adapter.linear.out_features)
            whole = ForBoth(Projected(way, projector, first), adapter).eval()
        tensors = vision_tensors(encoder.size, rows, hidden, *draft)
        (folder / PROCESSORS).mkdir()
        for name in PROCESSOR_FILES:
            if (side.folder / name).is_file():
                (folder / PROCESSORS / name).write_bytes((side.folder / name).read_bytes())
        entry = VisionEntry(
            side.config.model_type,
            encoder.size,
            rows,
            side.config.image_token_id,
            encoder.tokens,
            method,
            {str(number): count for number, count in getattr(way, "keeps", {}).items()},
            f"{VISION}.data",
            GraphSpec(GRAPH, VISION, rows, 0, *tensors),
            PROCESSORS,
            selectors,
            *draft[:1],
        )
        Sight(folder / PROCESSORS, entry).tried()
        if config.format == "onnx":
            ir.save(exported(whole, *tensors), folder / GRAPH, external_data=entry.weights)
            return entry
        from edgespec.exporters.executorch_file import write_delegated

        method, pixels = f"{VISION}_{rows}_0", torch.zeros(tensors[0][0].shape)
        write_delegated(whole, (pixels,), method, folder, VISION)
    graph = replace(entry.graph, file=f"{VISION}.pte", method=method)
    return replace(entry, weights=f"{VISION}.ptd", graph=graph)
