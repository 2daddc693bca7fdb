"""The work of `edgespec vision`: an image encoder's selectors, what pruning costs it, and its graph."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig

from edgespec.config_vision import (
    VisionEvalConfig,
    VisionExportConfig,
    VisionTrainConfig,
    VisionTuneConfig,
)
from edgespec.errors import InputError
from edgespec.exporters import selector_training
from edgespec.exporters.checkpoint import open_checkpoint
from edgespec.exporters.commit import exported
from edgespec.exporters.images import Pixels, image_files, open_image
from edgespec.exporters.tosa import (
    BySelector,
    Importance,
    Merged,
    Pruned,
    by_chance,
    by_norm,
    by_previous,
    by_truth,
    evenly,
    flops,
)
from edgespec.exporters.vision_budget import Way, features, likeness, shared_out
from edgespec.exporters.vision_encoder import FAMILIES, Encoder, encoder_of
from edgespec.exporters.vision_language import FAMILIES as WHOLE_MODELS
from edgespec.exporters.vision_language import encoder_and_projector, images_of
from edgespec.files import replaced, written_whole
from edgespec.spec import VISION, TensorSpec

GRAPH, FACTS, WEIGHTS = f"{VISION}.onnx", f"{VISION}.json", "model.safetensors"
INSIDE = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}  # a whole model's image encoder
HELD_OUT = 10  # every tenth image is measured on and not learned
MEASURED = 16  # images that a choice or a check is made with
UNUSED = ("pooler.", "head.", "embeddings.mask_token")  # parameters that features do not need


def open_encoder(word: str) -> tuple[Encoder, Pixels, str]:
    """An encoder for images of its processor's size, the processor, and the weights' SHA-256.

    Of a vision-language model it is the encoder up to the layer whose features are used.
    """
    folder = Path(word)
    if config_of(folder).model_type in WHOLE_MODELS:
        whole = open_checkpoint(word)
        return encoder_and_projector(images_of(whole), whole.source)[0], Pixels(folder), whole.digest
    model, _, pixels, digest = opened_model(word)
    return encoder_of(model, pixels.size), pixels, digest


def config_of(folder: Path) -> Any:
    """A folder's configuration; InputError where it is no model's."""
    if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
        hint = "name a Hugging Face folder of an image encoder"
        raise InputError(f"{folder} holds no config.json and {WEIGHTS}", hint)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(folder, error) from None


def unreadable(folder: Path, error: Exception) -> InputError:
    """What a folder is that Transformers does not read."""
    first = str(error).strip().split("\n")[0]
    return InputError(f"{folder.name} is no model that can be read ({first})", "download it again")


def opened_model(word: str) -> tuple[Any, set[str], Pixels, str]:
    """A Transformers image encoder, the parameters that its file lacks and features do not need, its
    processor, and the weights' SHA-256.
    """
    folder = Path(word)
    config = config_of(folder)
    pixels = Pixels(folder)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        kind = getattr(transformers, INSIDE[config.model_type]) if config.model_type in INSIDE else None
        if kind is None and config.model_type not in FAMILIES:
            raise InputError(
                f"{config.model_type} is no image encoder known here", f"use one of: {', '.join(FAMILIES)}"
            )
        model, loaded = (kind or transformers.AutoModel).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise unreadable(folder, error) from None
    if absent := sorted(name for name in loaded["missing_keys"] if not name.startswith(UNUSED)):
        hint = "use a checkpoint that holds the whole encoder"
        raise InputError(f"{folder.name} lacks {absent[0]} (of {len(absent)} that it needs)", hint)
    return model, set(loaded["missing_keys"]), pixels, sha256_of(folder / WEIGHTS)


def sha256_of(path: Path) -> str:
    """A file's digest, as hexadecimal digits."""
    return sha256(path.read_bytes()).hexdigest()


def train_selector(config: VisionTrainConfig, progress: Any) -> dict[str, Any]:
    """Train the selectors and write their file; what they learned."""
    with progress.stage("encoder"):
        encoder, pixels, digest = open_encoder(config.model)
    learned, held_out = parted(config.images)
    test = prepared(pixels, held_out)
    selectors = selector_training.fresh(encoder, config.seed)
    with progress.stage("held-out images, before"):
        before, first = measured(encoder, selectors, test)
    with progress.stage("training") as advance:
        losses = selector_training.train(
            encoder, selectors, endless(pixels, learned, config), config.rate, config.steps, advance
        )
    with progress.stage("held-out images, after"):
        after, last = measured(encoder, selectors, test)
    facts = {
        "images": len(learned),
        "held_out": len(held_out),
        "steps": len(losses),
        "kl_before": before,
        "kl_after": after,
        "overlap_before": first,
        "overlap_after": last,
    }
    selector_training.write(Path(config.output), selectors, digest, facts)
    return facts


def parted(images: str) -> tuple[list[Path], list[Path]]:
    """A folder's images to learn from, and those to measure on; InputError where there are too few."""
    files = image_files(Path(images))
    learned = [file for i, file in enumerate(files) if i % HELD_OUT]
    if not learned:
        raise InputError(f"{images} holds {len(files)} images", "two at least are needed")
    return learned, files[::HELD_OUT][:MEASURED]


@torch.no_grad()
def measured(encoder: Encoder, selectors: Mapping[int, Any], test: Tensor) -> tuple[float, float]:
    """The loss on images, and the part of the true choice of one half that the selectors make too."""
    losses = [float(selector_training.loss_of(encoder, selectors, one)) for one in test.split(4)]
    same = [selector_training.overlap(encoder, selectors, one, 0.5) for one in test.split(4)]
    return float(np.mean(losses)), float(np.mean(same))


def endless(
    pixels: Pixels, files: Sequence[Path], config: VisionTrainConfig | VisionTuneConfig
) -> Iterator[Tensor]:
    """Batches of the images, shuffled anew in every epoch."""
    draw = np.random.default_rng(config.seed)
    while True:
        order = draw.permutation(len(files))
        for start in range(0, len(order), config.batch):
            yield prepared(pixels, [files[i] for i in order[start : start + config.batch]])


def prepared(pixels: Pixels, files: Sequence[Path]) -> Tensor:
    """[n,3,S,S] of image files."""
    return pixels([open_image(path) for path in files])


@torch.no_grad()
def evaluate(config: VisionEvalConfig, progress: Any) -> dict[str, Any]:
    """Features of the pruned encoder beside the whole one's, for every method and part of the patches kept.

    `similarity` is the mean cosine of a token's features, `worst` that of the worst image; `flops` is the
    part of the whole layers' FLOPs.
    """
    with progress.stage("encoder"):
        encoder, pixels, digest = open_encoder(config.model)
        files = image_files(Path(config.images))[: config.limit]
        test = prepared(pixels, files)
        whole = features(encoder, test)
    methods: dict[str, Importance] = {
        "random": by_chance(config.seed),
        "norm": by_norm,
        "previous": by_previous,
        "true": by_truth,
    }
    selectors = None
    if config.selectors:
        selectors = selector_training.read(Path(config.selectors), encoder, digest)
        methods = {"tosa": BySelector(selectors)} | methods
    rows = []
    with progress.stage("methods") as advance:
        total = len(config.ratios) * (2 * len(methods) + 2)
        for ratio in config.ratios:
            keeps = evenly(encoder, ratio)
            ways = {n: Pruned(encoder, keeps, by) for n, by in methods.items()}
            ways |= {f"{n}+nearest": Pruned(encoder, keeps, by, "nearest") for n, by in methods.items()}
            ways["merged"] = Merged(encoder, keeps)
            ways["merged, all"] = Merged(encoder, evenly(encoder, ratio, Merged))
            for name, way in ways.items():
                part = {"method": name, "keep": ratio, "flops": flops(way) / flops(encoder)}
                rows.append(part | likeness(way, test, whole))
                advance(len(rows), total)
    if selectors and config.pictures:
        shown = Pruned(encoder, evenly(encoder, min(config.ratios)), BySelector(selectors), "nearest")
        draw_kept(shown, test[: config.pictures], Path(config.output))
    return {"images": len(files), "tokens": encoder.tokens, "rows": rows}


def draw_kept(way: Pruned, test: Tensor, folder: Path) -> None:
    """kept.png: every image once a pruned layer, with the patches that bypass it darkened."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    side, size = way.encoder.side, way.encoder.size
    figure, axes = pyplot.subplots(
        len(test), len(way.keeps), figsize=(1.7 * len(way.keeps), 1.9 * len(test)), squeeze=False
    )
    for row, image in enumerate(test):
        shown = (image - image.amin()) / (image.amax() - image.amin()).clamp_min(1e-6)
        for axis, (number, chosen) in zip(axes[row], kept_of(way, image[None]).items(), strict=True):
            mask = torch.zeros(side * side)
            mask[chosen[0, way.encoder.prefix :] - way.encoder.prefix] = 1.0
            mask = (
                mask.view(1, 1, side, side)
                .repeat_interleave(size // side, 2)
                .repeat_interleave(size // side, 3)
            )
            axis.imshow((shown * (0.2 + 0.8 * mask[0])).permute(1, 2, 0).numpy())
            axis.set_axis_off()
            if row == 0:
                axis.set_title(f"layer {number}", fontsize=8)
    figure.tight_layout()
    replaced(folder / "kept.png", lambda path: figure.savefig(path, format="png", dpi=90))
    pyplot.close(figure)


def kept_of(way: Pruned, pixels: Tensor) -> dict[int, Tensor]:
    """{layer: places of the tokens that take part [B, prefix + keep]}."""
    found: dict[int, Tensor] = {}

    class Watched(Pruned):
        def chosen(self, number: int, *given: Any) -> Tensor:
            found[number] = super().chosen(number, *given)
            return found[number]

    Watched(way.encoder, way.keeps, way.importance, way.bypass)(pixels)
    return found


def export(config: VisionExportConfig, progress: Any) -> dict[str, Any]:
    """Write the encoder's graph and its facts; the facts, with how far it is from PyTorch's numbers."""
    with progress.stage("encoder"):
        encoder, pixels, digest = open_encoder(config.model)
        kind = kind_of(config.method)
        pruned = pruning(encoder, digest, config.method, config.selectors, config.bypass)
        test = prepared(pixels, image_files(Path(config.images))[:MEASURED]) if config.images else None
    keeps = evenly(encoder, config.keep, kind)
    if config.flops and test is not None:
        with progress.stage("what each layer keeps"):
            keeps = shared_out(kind.layers(encoder), encoder, pruned, test, config.flops)
    way = pruned(keeps) if keeps else encoder
    size, dim = encoder.size, encoder.table.shape[-1]
    inputs = (TensorSpec("pixels", "float32", (1, 3, size, size)),)
    outputs = (TensorSpec("features", "float32", (1, encoder.tokens, dim)),)
    folder, compiling = Path(config.output), {}
    folder.mkdir(parents=True, exist_ok=True)
    with progress.stage("graph"), torch.no_grad():
        model = exported(way, inputs, outputs)
    with TemporaryDirectory(dir=folder) as place:  # nothing is left of a graph that is refused
        graph = Path(place) / GRAPH
        ir.save(model, graph)
        with progress.stage("check"):
            images = torch.randn(2, 3, size, size) if test is None else test[:4]
            off = furthest(graph, way, images)
        if config.soc:
            compiling = {"compiled": compiled(graph, config.soc, progress)}
        graph.replace(folder / GRAPH)
    facts = {
        "model_sha256": digest,
        "size": size,
        "tokens": encoder.tokens,
        "prefix": encoder.prefix,
        "method": config.method if keeps else "whole",
        "keeps": {str(n): count for n, count in getattr(way, "keeps", {}).items()},
        "bypass": getattr(way, "bypass", "plain"),
        "flops": flops(way),
        "flops_whole": flops(encoder),
        "furthest_from_pytorch": off,
    }
    if test is not None and keeps:
        with torch.no_grad():
            facts |= likeness(way, test, features(encoder, test))
    facts |= compiling
    written_whole(folder / FACTS, json.dumps(facts, indent=1) + "\n")
    return facts


def kind_of(method: str) -> type[Pruned]:
    """The class of a method."""
    return Merged if method == "merge" else Pruned


def pruning(encoder: Encoder, digest: str, method: str, selectors: str, bypass: str = "nearest") -> Way:
    """The way to prune that was asked for."""
    if method == "merge":
        return lambda keeps: Merged(encoder, keeps)
    if not selectors:
        return lambda keeps: Pruned(encoder, keeps, by_norm)  # of no layer: the configuration saw to that
    by = BySelector(selector_training.read(Path(selectors), encoder, digest))
    return lambda keeps: Pruned(encoder, keeps, by, bypass)


@torch.no_grad()
def furthest(graph: Path, way: nn.Module, images: Tensor) -> float:
    """The largest difference between ONNX Runtime's features and PyTorch's, of the largest feature's size."""
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    worst = 0.0
    for image in images:
        ours = session.run(None, {"pixels": image[None].numpy()})[0]
        theirs = way(image[None]).numpy()
        worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    return worst


def compiled(graph: Path, soc: str, progress: Any) -> dict[str, Any]:
    """What Qualcomm's compiler makes of the graph; InputError where it refuses a part of it."""
    from edgespec.exporters.qualcomm import COMPILER, outcome
    from edgespec.soc import SOCS

    with progress.stage(f"compile for {soc}"):
        found = outcome(graph, SOCS[soc])
    if found.refusal:
        raise InputError(f"Qualcomm's compiler refuses the graph: {found.refusal}", "leave --soc out")
    return {"soc": soc, "compiler": COMPILER, "nodes": found.nodes}
