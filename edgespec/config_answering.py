"""What the commands that let a model speak can be told: once, in a terminal, or in a workload's own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from edgespec.config import DRAFTERS, THREADS, TO, VIA
from edgespec.errors import InputError
from edgespec.flags import between, check_file, flag, one_of
from edgespec.soc import NAMES as SOCS


@dataclass(frozen=True)
class Answering:
    """What every command that lets a model speak can be told."""

    bundle: str = flag("folder of the bundle", positional=True)
    max_new_tokens: int = flag("most tokens of one answer", 256, kw_only=True)
    temperature: float = flag("0 is greedy", 0.0, kw_only=True)
    top_k: int = flag("sample among the k likeliest tokens; 0: all", 0, kw_only=True)
    top_p: float = flag("sample among the likeliest tokens that make up this much", 1.0, kw_only=True)
    repetition_penalty: float = flag("above 1 makes tokens already said less likely", 1.0, kw_only=True)
    seed: int = flag("of the sampling: the same seed repeats a text", 0, kw_only=True)
    threads: int = flag(THREADS, 0, kw_only=True)
    soc: str = flag("run an npu bundle on this Qualcomm SoC's NPU, emulated here", "", kw_only=True)
    via: str = flag(f"{VIA}; answer there, after edgespec push", "", kw_only=True)
    to: str = flag(TO, "", kw_only=True)

    def check(self) -> Self:
        """Itself, or an InputError for the first value that cannot work."""
        if self.soc:
            one_of("soc", self.soc, SOCS)
        if self.soc and self.via:
            raise InputError("a device reached by --via runs its own SoC", "leave --soc or --via out")
        between("max_new_tokens", self.max_new_tokens, 1, 2**20)
        between("temperature", self.temperature, 0, 100)
        between("top_k", self.top_k, 0, 2**30)
        between("top_p", self.top_p, 1e-6, 1)
        between("repetition_penalty", self.repetition_penalty, 0.01, 100)
        between("seed", self.seed, 0, 2**62)
        between("threads", self.threads, 0, 256)
        return self


@dataclass(frozen=True)
class GenerateConfig(Answering):
    """`edgespec generate`: the bundle, the prompt and how to sample and draft."""

    prompt: str = flag("what to say to the model", positional=True)
    image: tuple[str, ...] = flag(
        "an image that the prompt is about, before its words; may be given several times", (), repeated=True
    )
    min_p: float = flag("leave out tokens below this share of the likeliest one's probability", 0.0)
    drafter: str = flag("who drafts", "auto", choices=DRAFTERS)
    no_draft: bool = flag("decode plainly, the same as --drafter none", False)
    stop_rule: str = flag("when a draft ends", "cost", choices=("cost", "adaedl", "confidence", "fixed"))
    draft_tokens: int = flag("most drafted tokens a round; 0: as many as the graphs hold", 0)
    stats: bool = flag("print what it took on stderr", False)
    trace: str | None = flag("file for a JSON line about every prompt and round", None)
    raw: bool = flag("continue the prompt as plain text, without the chat template", False)
    profile: str = flag("let the cost rule decide by this device's predicted call costs", "")

    def check(self) -> GenerateConfig:
        """Itself, or an InputError for the first value that cannot work."""
        if not self.prompt.strip():
            raise InputError("the prompt is empty", 'write one: edgespec generate BUNDLE "..."')
        super().check()
        for image in self.image:
            check_file("image", image)
        between("min_p", self.min_p, 0, 1)
        between("draft_tokens", self.draft_tokens, 0, 2**20)
        if self.profile and self.via:
            raise InputError("a device reached by --via has its own call costs", "leave --profile out")
        if self.trace is not None and not os.path.isdir(os.path.dirname(os.path.abspath(self.trace))):
            raise InputError(
                f"trace {self.trace!r} is in no folder", "give --trace a file in an existing one"
            )
        return self


@dataclass(frozen=True)
class ChatConfig(Answering):
    """`edgespec chat`: the bundle and how to sample."""

    max_new_tokens: int = flag("most tokens of one answer", 512, kw_only=True)
