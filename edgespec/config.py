"""What each command can be told: frozen dataclasses whose fields are the flags, checked without any model.

Paths, words and divisibility are settled here, before the first slow step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from edgespec.bundle import check_output
from edgespec.config_vision import METHODS, check_pruning
from edgespec.errors import InputError
from edgespec.flags import (
    ascending,
    between,
    check_file,
    check_model,
    default_of,
    flag,
    flag_name,
    listed,
    one_of,
)
from edgespec.parts import MOST_PARTS
from edgespec.policy import NAMES as POLICIES
from edgespec.policy import check as check_policy
from edgespec.soc import NAMES as SOCS
from edgespec.spec import CODED, DEVICES, FORMATS, POSITIONS, PRECISIONS

DRAFTS = ("demo", "layers")  # drafts that are no path: the shipped one, and the target's own layers
DEVICE_PRECISIONS = {
    "cpu": tuple(p for p in PRECISIONS if p not in CODED),
    "npu": ("int4", "fp16", *CODED),
}
EXECUTORCH_PRECISIONS = ("int8", "int4", "fp32")
MISCOMPILED = 16  # rows of coded activations: onnxruntime-qnn 2.7.0 gets these wrong, and no other number
LARGEST_BUDGET = 2**20
STATIC_BUCKET = 256  # a static cache is read and written whole in every call: short texts get a smaller one
WINDOW = 32
VIA = 'command that runs a shell line on the device, such as "adb shell" or "ssh phone"'
TO = "folder on the device (default: edgespec, with adb /data/local/tmp/edgespec)"
PHONES = ("snapdragon-8-elite", "dimensity-9400", "apple-a18-pro")  # whose speed workloads predict
DRAFTERS = ("auto", "draft", "ngram", "both", "none")
THREADS = "threads of all graphs together; 0: the machine's cores, at most 4"


def check_socs(names: tuple[str, ...]) -> None:
    """InputError for a name that is no SoC's, or that stands there twice."""
    for name in names:
        one_of("soc", name, SOCS)
    if len(set(names)) < len(names):
        raise InputError(f"soc {','.join(names)} names one twice", "name each once in --soc")


def either(words: tuple[str, ...]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


@dataclass(frozen=True)
class ExportConfig:
    """`edgespec export`: what to export, how large its caches are, and in which form its weights are kept."""

    target: str = flag(
        "Hugging Face folder, .gguf file, or the word demo; random:FOLDER: random weights in the shape of "
        "its config.json",
        positional=True,
    )
    output: str = flag("folder of the bundle to make", short="-o")
    draft: str | None = flag(
        "draft model: demo (the shipped one), a folder, a .gguf file, or layers (two of the target's own)",
        None,
    )
    budget: int = flag("cache rows that survive an eviction", 1024)
    block: int = flag("cache rows evicted at once, and tokens of one prefill call", 128)
    widths: tuple[int, ...] = flag("widths of the verify graphs", (2, 4, 8))
    policy: str = flag(f"how evicted rows are chosen: {', '.join(POLICIES)}", "keydiff")
    sinks: int = flag("first positions that are never evicted", 4)
    recent: int = flag("newest rows that are never evicted", 32)
    window: int | None = flag("last queries of a block that snapkv scores by (default: up to 32)", None)
    positions: str = flag(
        "absolute, or compact: commits turn keys to their place in the cache, and a text may go on for ever",
        "absolute",
        choices=POSITIONS,
    )
    buckets: tuple[int, ...] = flag(
        "further, smaller cache budgets with their own graphs "
        f"(default: none; with --format executorch one of {STATIC_BUCKET} rows)",
        (),
    )
    truncate_window: bool = flag("allow a budget below the model's sliding window", False)
    device: str = flag("where the bundle runs", "cpu", choices=DEVICES)
    soc: tuple[str, ...] = flag(
        f"with --device npu: Qualcomm SoCs to compile the graphs for, some of {', '.join(SOCS)}", ()
    )
    parts: int | None = flag(
        "parts that the target's layers are cut into, each with graphs and compiled contexts of its own "
        "(default: 1, with --soc as many as its contexts need)",
        None,
    )
    format: str = flag("file format of the graphs", "onnx", choices=FORMATS)
    weights: str | None = flag("form of the weights (default: the device's best)", None, choices=PRECISIONS)
    head: str | None = flag("form of the LM head, where it differs", None, choices=PRECISIONS)
    embedding: str | None = flag("form of the embedding, where it differs", None, choices=PRECISIONS)
    draft_vocab: str | None = flag("file with one token id a line: the rows of the draft's head", None)
    draft_rows: int | None = flag(
        "rows of the draft's head, the most frequent (default: the vocabulary that came with the draft, else "
        "16384 rows)",
        None,
    )
    context_rows: int | None = flag(
        "further rows of the draft's head, which hold tokens of the conversation; 0: none (default: 256 "
        "where the head is trimmed and the target's own)",
        None,
    )
    draft_weights: str | None = flag(
        "form of the draft's own weights, such as w4a16 beside w8a16 (default: as --weights)",
        None,
        choices=PRECISIONS,
    )
    draft_budget: int = flag("cache rows of the draft that survive an eviction", 256)
    draft_policy: str = flag("how the draft's evicted rows are chosen, as --policy", "keydiff")
    vision_keep: float = flag(
        "of a target that reads images: part of the patches that stays in a pruned layer of its encoder", 1.0
    )
    vision_method: str = flag(
        "merge lets alike patches pass as one; tosa leaves patches out by selectors", "merge", choices=METHODS
    )
    vision_flops: float = flag(
        "part of the encoder's FLOPs instead of --vision-keep: each layer keeps what serves best", 0.0
    )
    vision_images: str | None = flag("folder of images that --vision-flops chooses by", None)
    vision_selectors: str | None = flag("file of edgespec vision train-selector TARGET; tosa needs it", None)
    text: str | None = flag("text file for calibration and token frequencies", None)
    force: bool = flag("replace the bundle at the output once the new one is complete", False)

    @property
    def all_buckets(self) -> tuple[int, ...]:
        """Every cache budget of the target, ascending; the last is `budget`."""
        smaller = STATIC_BUCKET // self.block * self.block
        static = self.format == "executorch" and not self.buckets and 0 < smaller < self.budget
        return tuple(sorted({*self.buckets, *((smaller,) if static else ()), self.budget}))

    @property
    def prunes_vision(self) -> bool:
        """Whether patches are to be left out of layers of an image encoder."""
        return self.vision_keep < 1 or self.vision_flops > 0

    @property
    def coded(self) -> bool:
        """Whether activations are codes, and caches too."""
        return self.weights in CODED

    @property
    def observed(self) -> int:
        """Rows of snapkv's window."""
        return min(WINDOW, self.block) if self.window is None else self.window

    def check(self) -> ExportConfig:
        """Itself, or an InputError for the first value that cannot work."""
        self._check_cache()
        self._check_draft()
        self._check_weights()
        check_model("target", self.target)
        check_model("draft", self.draft, DRAFTS)
        self._check_vision()
        for name in ("text", "draft_vocab", "vision_selectors"):
            check_file(name, getattr(self, name))
        check_output(Path(os.path.abspath(self.output)), self.force)
        return self

    def _check_cache(self) -> None:
        between("budget", self.budget, 2, LARGEST_BUDGET)
        between("block", self.block, 2, LARGEST_BUDGET)
        if self.block > self.budget:
            raise InputError(
                f"block {self.block} is larger than budget {self.budget}",
                f"use --block {max(2, self.budget // 2)}, or --budget {self.block}",
            )
        ascending("widths", self.widths)
        if not self.widths or self.widths[0] < 2:
            raise InputError(f"widths {listed(self.widths)} must be 2 or more", "use --widths 2,4,8")
        if self.widths[-1] > self.block:
            raise InputError(
                f"width {self.widths[-1]} is larger than block {self.block}",
                f"use --block {self.widths[-1]} or more, or narrower --widths",
            )
        for bucket in self.buckets:
            if bucket != self.budget and (bucket > self.budget or bucket % self.block or bucket == 0):
                raise InputError(
                    f"bucket {bucket} is not a multiple of block {self.block} up to budget {self.budget}",
                    f"use --buckets {self.block}, or leave --buckets out",
                )
        ascending("buckets", self.buckets)
        check_policy(self.policy, self.sinks, self.recent, self.budget, self.block)
        between("window", self.observed, 1, self.block)
        one_of("positions", self.positions, POSITIONS)
        if self.positions == "compact" and self.policy == "none":
            raise InputError(
                "positions compact turn keys when rows are evicted, and policy none evicts none",
                "use --policy keydiff, or leave --positions out",
            )

    def _check_draft(self) -> None:
        if self.draft is None:
            rows = ("draft_vocab", "draft_rows", "context_rows")
            for name in (*rows, "draft_weights", "draft_budget", "draft_policy"):
                if getattr(self, name) != default_of(ExportConfig, name):
                    word = flag_name(name)
                    raise InputError(f"{word} is given without a draft", f"add --draft, or leave {word} out")
            return
        between("draft_budget", self.draft_budget, 2, LARGEST_BUDGET)
        if self.draft_rows is not None:
            between("draft_rows", self.draft_rows, 1, 2**24)
            if self.draft_vocab is not None:
                raise InputError(
                    "--draft-vocab names the rows that --draft-rows would choose", "leave one of them out"
                )
        between("context_rows", self.context_rows or 0, 0, 2**16)
        if self.block > self.draft_budget:
            raise InputError(
                f"block {self.block} is larger than draft_budget {self.draft_budget}",
                f"use --draft-budget {self.block} or more, or --block {max(2, self.draft_budget)}",
            )
        check_policy(
            self.draft_policy, self.sinks, self.recent, self.draft_budget, self.block, whose="draft-"
        )

    def _check_vision(self) -> None:
        given = (self.vision_keep, self.vision_flops, self.vision_method, self.vision_selectors)
        check_pruning(*given, self.vision_images, "vision_")
        if self.vision_selectors is not None and not (self.prunes_vision and self.vision_method == "tosa"):
            raise InputError(
                "selectors are given, and no patch is left out by them",
                "add --vision-method tosa --vision-keep 0.6, or leave --vision-selectors out",
            )
        if self.vision_images is not None and not self.vision_flops:
            hint = "add --vision-flops 0.8, or leave --vision-images out"
            raise InputError("images are given, and nothing is chosen by them", hint)

    def _check_weights(self) -> None:
        one_of("device", self.device, DEVICES)
        check_socs(self.soc)
        if self.soc and self.device != "npu":
            raise InputError(
                f"soc {','.join(self.soc)} is given for device {self.device}",
                "add --device npu, or leave --soc out",
            )
        one_of("format", self.format, FORMATS)
        if self.format == "executorch" and self.device != "cpu":
            raise InputError(
                f"format executorch is given for device {self.device}", "leave --device out, or --format"
            )
        between("parts", 1 if self.parts is None else self.parts, 1, MOST_PARTS)
        if self.format == "executorch" and self.parts not in (None, 1):
            raise InputError(
                f"parts {self.parts} are given for format executorch, whose programs are whole",
                "leave --parts out, or --format",
            )
        for name in ("weights", "draft_weights", "head", "embedding"):
            form, word = getattr(self, name), name.replace("_", "-")
            allowed = self._forms(name)
            if form is not None and form not in allowed:
                one_of(name, form, PRECISIONS)
                onnx = "--device cpu" if self.format == "onnx" else "--format onnx"
                where = f"on device {self.device}" if self.format == "onnx" else "in an ExecuTorch program"
                hint = f"use --{word} {either(allowed)}, or {onnx}"
                raise InputError(f"{word} {form} cannot run {where}", hint)
        if self.draft_weights is not None and (self.draft_weights in CODED) != self.coded:
            theirs = self.weights or "left out"
            raise InputError(
                f"draft-weights {self.draft_weights} do not fit weights {theirs}: one codes activations",
                f"use {either(CODED)} for both, or for neither",
            )
        if self.coded and MISCOMPILED in (self.block, *self.widths):
            raise InputError(
                f"weights {self.weights} cannot have calls of {MISCOMPILED} rows, which Qualcomm's compiler "
                "gets wrong",
                f"use another --{'block' if self.block == MISCOMPILED else 'widths'}",
            )
        if self.coded and self.positions == "compact":
            raise InputError(
                f"weights {self.weights} keep rows as codes, which no commit turns to another position",
                "leave --positions out, or use --weights fp16",
            )

    def _forms(self, name: str) -> tuple[str, ...]:
        """The forms that `weights`, `draft_weights`, `head` or `embedding` may have beside the others.

        An NPU looks nothing up in a table of 4-bit codes, and codes of 8 bits need coded activations.
        """
        linear = name in ("weights", "draft_weights")
        if self.format == "executorch":
            return tuple(p for p in EXECUTORCH_PRECISIONS if linear or p != "int4")
        if self.device == "npu" and not linear:
            return ("fp16", *(("w8a16",) if self.coded else ("int4",) if name == "head" else ()))
        return DEVICE_PRECISIONS[self.device]


@dataclass(frozen=True)
class InspectConfig:
    """`edgespec inspect`."""

    bundle: str = flag("folder of the bundle", positional=True)


@dataclass(frozen=True)
class CheckConfig:
    """`edgespec check`: the bundle, and what to compare it with."""

    bundle: str = flag("folder of the bundle", positional=True)
    source: str | None = flag("checkpoint to compare with (default: where the bundle came from)", None)
    draft_source: str | None = flag("the same for a draft with a checkpoint of its own", None)
    text: str | None = flag("text file for the numeric checks", None)
    ops: str | None = flag("operator set (default: the bundle's device)", None, choices=DEVICES)
    self_only: bool = flag("only test, on this machine, that widths agree bitwise", False, flag="--self")
    npu: str | None = flag(
        "also compile every graph with this maker's compiler, and emulate steps", None, choices=("qualcomm",)
    )
    soc: tuple[str, ...] = flag(
        f"with --npu: SoCs to compile for, some of {', '.join(SOCS)} (default: those that the bundle is "
        "compiled for, else all)",
        (),
    )

    def check(self) -> CheckConfig:
        """Itself, or an InputError for the first value that cannot work."""
        check_model("source", self.source)
        check_model("draft_source", self.draft_source, DRAFTS)
        check_file("text", self.text)
        check_socs(self.soc)
        if self.soc and self.npu is None:
            raise InputError(f"soc {','.join(self.soc)} is given without npu", "add --npu qualcomm")
        return self
