"""What the commands about image encoders can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass

from edgespec.errors import InputError
from edgespec.flags import between, check_file, check_folder, check_place, flag, flag_name, one_of
from edgespec.soc import NAMES

MODEL = "Hugging Face folder of an image encoder (ViT, DeiT, DINOv2, SigLIP, CLIP)"
METHODS = ("tosa", "merge")
BYPASS = ("nearest", "plain")
SELECTORS = "file of edgespec vision train-selector"
METHOD = "tosa leaves patches out by selectors, merge lets alike ones pass as one"
BYPASSING = "what a left-out patch takes of a layer (tosa): the change of the patch most like it, or nothing"


def check_pruning(
    keep: float, flops: float, method: str, selectors: str | None, images: str | None, whose: str = ""
) -> None:
    """InputError where what is said of an encoder's patches cannot be done; names begin with `whose`."""
    between(f"{whose}keep", keep, 0.01, 1)
    between(f"{whose}flops", flops, 0, 1)
    one_of(f"{whose}method", method, METHODS)
    option = flag_name(whose)
    if flops and keep < 1:
        raise InputError(f"{whose}keep and {whose}flops both say how many patches stay", "give one of them")
    if flops and not images:
        raise InputError("what each layer keeps is chosen on images", f"give a folder with {option}images")
    if (flops or keep < 1) and method == "tosa" and not selectors:
        hint = f"train them (edgespec vision train-selector), or use {option}method merge"
        raise InputError("patches are chosen by selectors", hint)


@dataclass(frozen=True)
class VisionTrainConfig:
    """`edgespec vision train-selector`: which encoder, on what images, and for how long."""

    model: str = flag(MODEL, positional=True)
    images: str = flag("folder of images to learn from; every tenth is measured on instead")
    output: str = flag("the file of selectors", short="-o")
    steps: int = flag("steps of the optimizer", 300)
    rate: float = flag("the highest learning rate", 3e-3)
    batch: int = flag("images of one step", 4)
    seed: int = flag("of the order of the images", 0)

    def check(self) -> VisionTrainConfig:
        """Itself, or an InputError for the first value that cannot work."""
        between("steps", self.steps, 1, 2**24)
        between("rate", self.rate, 1e-8, 1)
        between("batch", self.batch, 1, 2**12)
        check_place("output", self.output)
        return self


@dataclass(frozen=True)
class VisionTuneConfig:
    """`edgespec vision tune`: which encoder, pruned how, on what images, and for how long."""

    model: str = flag(MODEL, positional=True)
    images: str = flag("folder of images to learn from; every tenth is measured on instead")
    output: str = flag("the tuned model's folder, which must not exist", short="-o")
    keep: float = flag("part of the patches that stays in a pruned layer")
    method: str = flag(METHOD, "merge", choices=METHODS)
    selectors: str = flag(SELECTORS + "; tosa needs it", "")
    bypass: str = flag(BYPASSING, "nearest", choices=BYPASS)
    steps: int = flag("steps of the optimizer", 300)
    rate: float = flag("the highest learning rate", 2e-5)
    batch: int = flag("images of one step", 4)
    seed: int = flag("of the order of the images", 0)

    def check(self) -> VisionTuneConfig:
        """Itself, or an InputError for the first value that cannot work."""
        between("keep", self.keep, 0.01, 0.99)
        between("steps", self.steps, 1, 2**24)
        between("rate", self.rate, 1e-8, 1)
        between("batch", self.batch, 1, 2**12)
        check_pruning(self.keep, 0.0, self.method, self.selectors, self.images)
        check_selectors(self.method, self.selectors)
        check_place("output", self.output)
        if os.path.lexists(self.output):
            raise InputError(f"{self.output} exists", "choose another folder with -o")
        return self


@dataclass(frozen=True)
class VisionEvalConfig:
    """`edgespec vision eval`: what pruning costs in features, by method and by part of the patches kept."""

    model: str = flag(MODEL, positional=True)
    images: str = flag("folder of images")
    output: str = flag("folder of vision.json, and of kept.png: what the selectors chose", short="-o")
    selectors: str = flag(SELECTORS, "")
    keep: tuple[str, ...] = flag(
        "parts of the patches that stay in every second layer", ("0.8", "0.6", "0.4", "0.3")
    )
    limit: int = flag("most images", 64)
    pictures: int = flag("images on which kept patches are drawn", 3)
    seed: int = flag("of the random choice", 0)

    @property
    def ratios(self) -> tuple[float, ...]:
        """The parts kept, as numbers."""
        return tuple(map(float, self.keep))

    def check(self) -> VisionEvalConfig:
        """Itself, or an InputError for the first value that cannot work."""
        try:
            ratios = self.ratios
        except ValueError:
            ratios = ()
        if not ratios or not all(0 < r < 1 for r in ratios):
            raise InputError(
                f"keep {','.join(self.keep)!r} is no list of parts", "write parts of 1, such as 0.8,0.5"
            )
        between("limit", self.limit, 1, 2**20)
        between("pictures", self.pictures, 0, 100)
        check_folder("output", self.output)
        if self.selectors:
            check_file("selectors", self.selectors)
        return self


@dataclass(frozen=True)
class VisionExportConfig:
    """`edgespec vision export`: which encoder, how many patches stay, and where the graph goes."""

    model: str = flag(MODEL, positional=True)
    output: str = flag("folder of vision.onnx and vision.json", short="-o")
    method: str = flag(METHOD, "tosa", choices=METHODS)
    selectors: str = flag(SELECTORS + "; tosa needs it", "")
    keep: float = flag("part of the patches that stays in a pruned layer; 1: all", 1.0)
    flops: float = flag(
        "part of the layers' FLOPs instead: each layer keeps what serves best; needs --images", 0.0
    )
    bypass: str = flag(BYPASSING, "nearest", choices=BYPASS)
    images: str = flag("folder of images: to choose by, and to check the graph with", "")
    soc: str = flag("compile for this Qualcomm chip too", "", choices=("", *NAMES))

    def check(self) -> VisionExportConfig:
        """Itself, or an InputError for the first value that cannot work."""
        check_folder("output", self.output)
        check_pruning(self.keep, self.flops, self.method, self.selectors, self.images)
        check_selectors(self.method, self.selectors)
        return self


def check_selectors(method: str, selectors: str) -> None:
    """InputError where a file of selectors is not there, or has no use."""
    if selectors and method == "merge":
        raise InputError("merging has no use for selectors", "leave --selectors or --method out")
    if selectors:
        check_file("selectors", selectors)
