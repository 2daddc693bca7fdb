"""What the commands that make a draft can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from edgespec.errors import InputError
from edgespec.flags import (
    ascending,
    between,
    check_file,
    check_folder,
    check_model,
    check_place,
    flag,
    one_of,
)

LOSSES = ("kl", "tvd", "tvd++", "lk")
THREADS = "threads; 0: the machine's cores"
ANY = "any"  # a prompt whose first words are the target's too
ARITHMETIC = ("int8", "fp32", "fp16")  # of the target when it writes


def weights_flag() -> Any:
    """The arithmetic that a target writes in."""
    words = "the target's arithmetic: int8 is the shipped bundle's, fp16 a GPU's"
    return flag(words, "int8", choices=ARITHMETIC)


@dataclass(frozen=True)
class DraftPromptsConfig:
    """`edgespec draft prompts`: whose idea of a user's prompts, how many, and where they go."""

    target: str = flag("Hugging Face folder, .gguf file, or the word demo", positional=True)
    output: str = flag("folder of prompts.jsonl; a run that was stopped goes on there", short="-o")
    count: int = flag("prompts written; those without an end, and doubles, are then left out", 1000)
    begin: tuple[str, ...] = flag(f"first words of prompts, in equal parts; {ANY}: none given", (ANY,))
    exclude: tuple[str, ...] = flag("files of prompts that must not turn up: those of a test", ())
    temperature: float = flag("how far they stray", 1.0)
    max_new_tokens: int = flag("most tokens of one prompt", 192)
    batch: int = flag("prompts written side by side", 48)
    weights: str = weights_flag()
    seed: int = flag("of the sampling", 0)
    threads: int = flag(THREADS, 0)

    def check(self) -> DraftPromptsConfig:
        """Itself, or an InputError for the first value that cannot work."""
        check_model("target", self.target)
        if not self.begin:
            raise InputError("no first words are given", f"write --begin {ANY}, or leave it out")
        for path in self.exclude:
            check_file("exclude", path)
        between("count", self.count, 1, 2**24)
        between("temperature", self.temperature, 0.01, 10)
        between("max_new_tokens", self.max_new_tokens, 1, 2**16)
        between("batch", self.batch, 1, 2**14)
        between("threads", self.threads, 0, 256)
        check_folder("output", self.output)
        return self


@dataclass(frozen=True)
class DraftSamplesConfig:
    """`edgespec draft samples`: whose texts, from which prompts, and where they go."""

    target: str = flag("Hugging Face folder, .gguf file, or the word demo", positional=True)
    output: str = flag("folder of the samples; a run that was stopped goes on there", short="-o")
    prompts: tuple[str, ...] = flag("files of prompts (.jsonl, .json, .csv, .txt)", ())
    texts: tuple[str, ...] = flag("files of text, which it only reads, instead: to begin a fresh draft", ())
    max_new_tokens: int = flag("most tokens of one answer", 192)
    batch: int = flag("prompts answered side by side", 48)
    top: int = flag("the target's likeliest tokens that are kept for each place", 32)
    weights: str = weights_flag()
    share: str = flag("i/n writes every n-th batch from the i-th, for several machines", "0/1")
    seed: int = flag("of the order and the sampling", 0)
    threads: int = flag(THREADS, 0)

    @property
    def part(self) -> tuple[int, int]:
        """i and n of `share`."""
        first, _, second = self.share.partition("/")
        return int(first), int(second)

    def check(self) -> DraftSamplesConfig:
        """Itself, or an InputError for the first value that cannot work."""
        check_model("target", self.target)
        if bool(self.prompts) == bool(self.texts):
            both = "prompts and texts are both given" if self.texts else "no file of prompts is given"
            raise InputError(both, "name some with --prompts, or texts with --texts")
        for name in ("prompts", "texts"):
            for path in getattr(self, name):
                check_file(name, path)
        between("max_new_tokens", self.max_new_tokens, 1, 2**16)
        between("batch", self.batch, 1, 2**14)
        between("top", self.top, 1, 2**10)
        between("threads", self.threads, 0, 256)
        try:
            i, n = self.part
        except ValueError:
            i, n = 1, 0
        if not 0 <= i < n:
            raise InputError(f"share {self.share!r} is no part", "write 0/2 and 1/2 for two machines")
        check_folder("output", self.output)
        return self


@dataclass(frozen=True)
class DraftTrainConfig:
    """`edgespec draft train`: the target, its samples, and how long and on what loss a draft learns."""

    target: str = flag("Hugging Face folder, .gguf file, or the word demo", positional=True)
    samples: tuple[str, ...] = flag("folders that edgespec draft samples made, learned from together")
    output: str = flag("folder of the draft; a training that was stopped goes on there", short="-o")
    layers: tuple[int, ...] = flag("layers of the target that the draft begins as", ())
    init: str = flag("a trained draft to begin with instead", "")
    fresh: int = flag("layers with random weights to begin with instead", 0)
    draft_rows: int = flag("rows of the trimmed head, the samples' most frequent tokens", 8192)
    loss: str = flag(f"what is made small: {', '.join(LOSSES)}", "kl", choices=LOSSES)
    steps: int = flag("steps of the optimizer", 2000)
    rate: float = flag("the highest learning rate", 7e-4)
    tokens: int = flag("padded tokens of one step", 800)
    longest: int = flag("most tokens of a text; the beginning of a longer prompt is left out", 320)
    measure: int = flag("steps between two measurements of BE on held-out texts", 200)
    patience: int = flag("measurements without a better BE before it stops; 0: never", 0)
    seed: int = flag("of the order of the texts", 0)
    threads: int = flag(THREADS, 0)

    def check(self) -> DraftTrainConfig:
        """Itself, or an InputError for the first value that cannot work."""
        check_model("target", self.target)
        one_of("loss", self.loss, LOSSES)
        ascending("layers", self.layers)
        for layer in self.layers:
            between("layers", layer, 0, 2**20)
        between("draft_rows", self.draft_rows, 1, 2**24)
        between("steps", self.steps, 1, 2**30)
        between("rate", self.rate, 1e-8, 1)
        between("tokens", self.tokens, 16, 2**24)
        between("longest", self.longest, 2, 2**20)
        between("measure", self.measure, 1, 2**30)
        between("patience", self.patience, 0, 2**20)
        between("threads", self.threads, 0, 256)
        between("fresh", self.fresh, 0, 2**10)
        if sum(map(bool, (self.init, self.layers, self.fresh))) > 1:
            raise InputError("--init, --layers and --fresh each say what it begins as", "give one of them")
        if self.init and not os.path.isdir(self.init):
            raise InputError(f"init {self.init!r} is not a folder", "name one that draft train made")
        check_folder("output", self.output)
        return self


@dataclass(frozen=True)
class DraftCurveConfig:
    """`edgespec draft curve`: which trainings to show side by side."""

    drafts: tuple[str, ...] = flag(
        "folders that edgespec draft train made, or is making", positional=True, many=True
    )
    png: str | None = flag("picture of the curves to write", None)

    def check(self) -> DraftCurveConfig:
        """Itself, or an InputError for the first value that cannot work."""
        if self.png is not None:
            check_place("png", self.png)
        return self
