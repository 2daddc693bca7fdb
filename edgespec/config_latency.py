"""What the commands about latency can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass

from edgespec.errors import InputError
from edgespec.flags import between, check_file, flag

PROFILE = "device profile: a name of `edgespec profile list`, or a .toml file"


@dataclass(frozen=True)
class EstimateConfig:
    """`edgespec estimate`: which model, on which device, how it drafts."""

    model: str = flag("folder of a bundle, a config.json, or a folder with one", positional=True)
    profile: str = flag(PROFILE)
    precision: str | None = flag("how a config.json's model is stored (default: w4a16)", None)
    context: int = flag("tokens in the cache (a config.json's model: slots, all read in every call)", 4096)
    prompt: int = flag("tokens of the prompt that the time to the first token is for", 128)
    images: int = flag("pictures in the prompt, each of which adds its rows (a bundle that reads images)", 0)
    draft: str | None = flag("a config.json's draft model: another config.json", None)
    draft_rows: int = flag("rows of the draft's head; 0: one for every token", 0)
    width: int = flag("rows of a verify call: a round drafts one token less", 1)
    be: float | None = flag("tokens emitted a verify call (block efficiency)", None)
    acceptance: float | None = flag("instead of --be: how likely a drafted token is accepted", None)
    trace: str | None = flag("replay this trace of the bundle instead", None)
    search: bool = flag("table of the best settings: tokens/s against memory", False)
    ray: bool = flag("search on Ray's workers", False)

    def check(self) -> EstimateConfig:
        """Itself, or an InputError for the first value that cannot work."""
        between("context", self.context, 1, 2**24)
        between("prompt", self.prompt, 1, 2**24)
        between("draft_rows", self.draft_rows, 0, 2**24)
        between("images", self.images, 0, 2**16)
        between("width", self.width, 1, 256)
        check_file("trace", self.trace)
        if self.be is not None and self.acceptance is not None:
            raise InputError("be and acceptance say the same thing", "give --be or --acceptance")
        speculates = self.be is not None or self.acceptance is not None
        if (self.width > 1 or self.draft or self.search) and not speculates:
            raise InputError("how much is accepted is not said", "give --be 2.2 or --acceptance 0.6")
        if speculates and self.width == 1:
            raise InputError("nothing is drafted at width 1", "give --width 4")
        if self.be is not None:
            between("be", self.be, 1, self.width)
        if self.acceptance is not None:
            between("acceptance", self.acceptance, 0, 1)
        if self.ray and not self.search:
            raise InputError("ray is given without a search", "add --search, or leave --ray out")
        if self.trace is not None and (speculates or self.draft or self.search):
            raise InputError("a trace says itself what was drafted", "leave --be, --draft and --search out")
        return self


@dataclass(frozen=True)
class ProfileListConfig:
    """`edgespec profile list`."""


@dataclass(frozen=True)
class ProfileShowConfig:
    """`edgespec profile show`."""

    name: str = flag("a name of `edgespec profile list`, or a .toml file", positional=True)


@dataclass(frozen=True)
class ProfileFitConfig:
    """`edgespec profile fit`: which device, and where the result goes."""

    name: str = flag("profile of the device, whose fitted figures are replaced", positional=True)
    output: str | None = flag("file for the fitted profile", None, short="-o")

    def check(self) -> ProfileFitConfig:
        """Itself, or an InputError where the file could not be written."""
        _check_written(self.output)
        return self


@dataclass(frozen=True)
class ProfileMeasureConfig:
    """`edgespec profile measure`: by which bundle, and where the profile goes."""

    bundle: str = flag("bundle whose calls are timed", positional=True)
    output: str | None = flag("file for the profile (default: ~/.cache/edgespec/profiles)", None, short="-o")
    runs: int = flag("timed calls of each graph", 20)
    threads: int = flag("threads of all graphs together; 0: the machine's cores, at most 4", 0)

    def check(self) -> ProfileMeasureConfig:
        """Itself, or an InputError for the first value that cannot work."""
        between("runs", self.runs, 3, 10_000)
        between("threads", self.threads, 0, 256)
        _check_written(self.output)
        return self


def _check_written(path: str | None) -> None:
    if path is None:
        return
    if not path.endswith(".toml"):
        raise InputError(f"{path!r} is no .toml file", "give a profile's file the ending .toml")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise InputError(f"{path!r} is in no folder", "give a file in an existing one")
