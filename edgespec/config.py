"""What each command can be told: frozen dataclasses whose fields are the flags, checked without any model.

A field's metadata holds its help text: a flag that does nothing cannot exist. Paths, words and divisibility
are settled here, before the first slow step.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, get_args, get_origin, get_type_hints

from edgespec.bundle import check_output
from edgespec.errors import InputError
from edgespec.policy import NAMES as POLICIES
from edgespec.policy import check as check_policy
from edgespec.spec import DEVICES, POSITIONS, PRECISIONS
from edgespec.task_words import NAMES as TASKS

FORMATS = ("onnx",)
DEVICE_PRECISIONS = {"cpu": PRECISIONS, "npu": ("int4", "fp16")}
LARGEST_BUDGET = 2**20
WINDOW = 32
VIA = 'command that runs a shell line on the device, such as "adb shell" or "ssh phone"'
TO = "folder on the device (default: edgespec, with adb /data/local/tmp/edgespec)"
THREADS = "threads of all graphs together; 0: the machine's cores, at most 4"


def _flag(text: str, default: Any = MISSING, kw_only: bool = False, **more: Any) -> Any:
    given = {} if default is MISSING else {"default": default}
    return field(metadata={"help": text, **more}, kw_only=kw_only, **given)


@dataclass(frozen=True)
class ExportConfig:
    """`edgespec export`: what to export, how large its caches are, and in which form its weights are kept."""

    target: str = _flag("Hugging Face folder, .gguf file, or the word demo", positional=True)
    output: str = _flag("folder of the bundle to make", short="-o")
    draft: str | None = _flag("draft model: folder, .gguf file, or demo (two of the target's layers)", None)
    budget: int = _flag("cache rows that survive an eviction", 1024)
    block: int = _flag("cache rows evicted at once, and tokens of one prefill call", 128)
    widths: tuple[int, ...] = _flag("widths of the verify graphs", (2, 4, 8))
    policy: str = _flag(f"how evicted rows are chosen: {', '.join(POLICIES)}", "keydiff")
    sinks: int = _flag("first positions that are never evicted", 4)
    recent: int = _flag("newest rows that are never evicted", 32)
    window: int | None = _flag("last queries of a block that snapkv scores by (default: up to 32)", None)
    positions: str = _flag(
        "absolute, or compact: commits turn keys to their place in the cache, and a text may go on for ever",
        "absolute",
        choices=POSITIONS,
    )
    buckets: tuple[int, ...] = _flag("further, smaller cache budgets with their own graphs", ())
    truncate_window: bool = _flag("allow a budget below the model's sliding window", False)
    device: str = _flag("where the bundle runs", "cpu", choices=DEVICES)
    format: str = _flag("file format of the graphs", "onnx", choices=FORMATS)
    weights: str | None = _flag("form of the weights (default: the device's best)", None, choices=PRECISIONS)
    head: str | None = _flag("form of the LM head, where it differs", None, choices=PRECISIONS)
    embedding: str | None = _flag("form of the embedding, where it differs", None, choices=PRECISIONS)
    draft_vocab: str | None = _flag("file with one token id a line: the rows of the draft's head", None)
    draft_rows: int = _flag("rows of the draft's head when chosen by frequency", 16384)
    draft_budget: int = _flag("cache rows of the draft that survive an eviction", 256)
    draft_policy: str = _flag("how the draft's evicted rows are chosen, as --policy", "keydiff")
    text: str | None = _flag("text file for calibration and token frequencies", None)
    force: bool = _flag("replace the bundle at the output once the new one is complete", False)

    @property
    def all_buckets(self) -> tuple[int, ...]:
        """Every cache budget of the target, ascending; the last is `budget`."""
        return tuple(sorted({*self.buckets, self.budget}))

    @property
    def observed(self) -> int:
        """Rows of snapkv's window."""
        return min(WINDOW, self.block) if self.window is None else self.window

    def check(self) -> ExportConfig:
        """Itself, or an InputError for the first value that cannot work."""
        self._check_cache()
        self._check_draft()
        self._check_weights()
        for name in ("target", "draft"):
            _check_model(name, getattr(self, name))
        for name in ("text", "draft_vocab"):
            _check_file(name, getattr(self, name))
        check_output(Path(os.path.abspath(self.output)), self.force)
        return self

    def _check_cache(self) -> None:
        _between("budget", self.budget, 2, LARGEST_BUDGET)
        _between("block", self.block, 2, LARGEST_BUDGET)
        if self.block > self.budget:
            raise InputError(
                f"block {self.block} is larger than budget {self.budget}",
                f"use --block {max(2, self.budget // 2)}, or --budget {self.block}",
            )
        _ascending("widths", self.widths)
        if not self.widths or self.widths[0] < 2:
            raise InputError(f"widths {_listed(self.widths)} must be 2 or more", "use --widths 2,4,8")
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
        _ascending("buckets", self.buckets)
        check_policy(self.policy, self.sinks, self.recent, self.budget, self.block)
        _between("window", self.observed, 1, self.block)
        _one_of("positions", self.positions, POSITIONS)

    def _check_draft(self) -> None:
        if self.draft is None:
            for name in ("draft_vocab", "draft_rows", "draft_budget", "draft_policy"):
                if getattr(self, name) != _default(ExportConfig, name):
                    flag = _flag_name(name)
                    raise InputError(f"{flag} is given without a draft", f"add --draft, or leave {flag} out")
            return
        _between("draft_budget", self.draft_budget, 2, LARGEST_BUDGET)
        _between("draft_rows", self.draft_rows, 1, 2**24)
        if self.block > self.draft_budget:
            raise InputError(
                f"block {self.block} is larger than draft_budget {self.draft_budget}",
                f"use --draft-budget {self.block} or more, or --block {max(2, self.draft_budget)}",
            )
        check_policy(self.draft_policy, self.sinks, self.recent, self.draft_budget, self.block)

    def _check_weights(self) -> None:
        _one_of("device", self.device, DEVICES)
        _one_of("format", self.format, FORMATS)
        for name in ("weights", "head", "embedding"):
            form = getattr(self, name)
            # An NPU looks nothing up in a table of codes (GatherBlockQuantized).
            allowed = (
                ("fp16",) if (self.device, name) == ("npu", "embedding") else DEVICE_PRECISIONS[self.device]
            )
            if form is not None and form not in allowed:
                _one_of(name, form, PRECISIONS)
                hint = f"use --{name} {' or '.join(allowed)}, or --device cpu"
                raise InputError(f"{name} {form} cannot run on device {self.device}", hint)


@dataclass(frozen=True)
class InspectConfig:
    """`edgespec inspect`."""

    bundle: str = _flag("folder of the bundle", positional=True)


@dataclass(frozen=True)
class CheckConfig:
    """`edgespec check`: the bundle, and what to compare it with."""

    bundle: str = _flag("folder of the bundle", positional=True)
    source: str | None = _flag("checkpoint to compare with (default: where the bundle came from)", None)
    draft_source: str | None = _flag("the same for a draft with a checkpoint of its own", None)
    text: str | None = _flag("text file for the numeric checks", None)
    ops: str | None = _flag("operator set (default: the bundle's device)", None, choices=DEVICES)
    self_only: bool = _flag("only test, on this machine, that widths agree bitwise", False, flag="--self")

    def check(self) -> CheckConfig:
        """Itself, or an InputError for the first value that cannot work."""
        _check_model("source", self.source)
        _check_model("draft_source", self.draft_source)
        _check_file("text", self.text)
        return self


@dataclass(frozen=True)
class _Answering:
    """What every command that lets a model speak can be told."""

    bundle: str = _flag("folder of the bundle", positional=True)
    max_new_tokens: int = _flag("most tokens of one answer", 256, kw_only=True)
    temperature: float = _flag("0 is greedy", 0.0, kw_only=True)
    top_k: int = _flag("sample among the k likeliest tokens; 0: all", 0, kw_only=True)
    top_p: float = _flag("sample among the likeliest tokens that make up this much", 1.0, kw_only=True)
    repetition_penalty: float = _flag("above 1 makes tokens already said less likely", 1.0, kw_only=True)
    seed: int = _flag("of the sampling: the same seed repeats a text", 0, kw_only=True)
    threads: int = _flag(THREADS, 0, kw_only=True)
    via: str = _flag(f"{VIA}; answer there, after edgespec push", "", kw_only=True)
    to: str = _flag(TO, "", kw_only=True)

    def check(self) -> Self:
        """Itself, or an InputError for the first value that cannot work."""
        _between("max_new_tokens", self.max_new_tokens, 1, 2**20)
        _between("temperature", self.temperature, 0, 100)
        _between("top_k", self.top_k, 0, 2**30)
        _between("top_p", self.top_p, 1e-6, 1)
        _between("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _between("seed", self.seed, 0, 2**62)
        _between("threads", self.threads, 0, 256)
        return self


@dataclass(frozen=True)
class GenerateConfig(_Answering):
    """`edgespec generate`: the bundle, the prompt and how to sample and draft."""

    prompt: str = _flag("what to say to the model", positional=True)
    min_p: float = _flag("leave out tokens below this share of the likeliest one's probability", 0.0)
    drafter: str = _flag("who drafts", "auto", choices=("auto", "draft", "ngram", "both", "none"))
    no_draft: bool = _flag("decode plainly, the same as --drafter none", False)
    stop_rule: str = _flag("when a draft ends", "cost", choices=("cost", "adaedl", "confidence", "fixed"))
    draft_tokens: int = _flag("most drafted tokens a round; 0: as many as the graphs hold", 0)
    stats: bool = _flag("print what it took on stderr", False)
    trace: str | None = _flag("file for a JSON line about every prompt and round", None)
    raw: bool = _flag("continue the prompt as plain text, without the chat template", False)

    def check(self) -> GenerateConfig:
        """Itself, or an InputError for the first value that cannot work."""
        if not self.prompt.strip():
            raise InputError("the prompt is empty", 'write one: edgespec generate BUNDLE "..."')
        super().check()
        _between("min_p", self.min_p, 0, 1)
        _between("draft_tokens", self.draft_tokens, 0, 2**20)
        if self.trace is not None and not os.path.isdir(os.path.dirname(os.path.abspath(self.trace))):
            raise InputError(
                f"trace {self.trace!r} is in no folder", "give --trace a file in an existing one"
            )
        return self


@dataclass(frozen=True)
class ChatConfig(_Answering):
    """`edgespec chat`: the bundle and how to sample."""

    max_new_tokens: int = _flag("most tokens of one answer", 512, kw_only=True)


@dataclass(frozen=True)
class BuildConfig:
    """`edgespec build`."""

    sanitize: bool = _flag(
        "with AddressSanitizer and UndefinedBehaviorSanitizer: slow, for finding bugs", False
    )
    arch: str = _flag("for another Linux machine's processor, such as aarch64", "")


@dataclass(frozen=True)
class PushConfig:
    """`edgespec push`: which bundle, and how to reach the device."""

    bundle: str = _flag("folder of the bundle", positional=True)
    via: str = _flag(VIA)
    to: str = _flag(TO, "")
    binary: str = _flag("folder with a runtime and its library that were built for the device", "")
    threads: int = _flag(THREADS, 0)

    def check(self) -> PushConfig:
        """Itself, or an InputError for the first value that cannot work."""
        _between("threads", self.threads, 0, 256)
        return self


@dataclass(frozen=True)
class TuneConfig:
    """`edgespec tune`: whose calls to measure."""

    bundle: str = _flag("folder of the bundle", positional=True)
    runs: int = _flag("timed calls of each width", 20)
    threads: int = _flag(THREADS, 0)

    def check(self) -> TuneConfig:
        """Itself, or an InputError for the first value that cannot work."""
        _between("runs", self.runs, 1, 10_000)
        _between("threads", self.threads, 0, 256)
        return self


@dataclass(frozen=True)
class EvalConfig:
    """`edgespec eval`: whose policies to evaluate, on what, and where the results go."""

    bundle: str = _flag("folder of the bundle", positional=True)
    output: str = _flag("folder of the results; a run that was stopped goes on there", short="-o")
    policies: tuple[str, ...] = _flag(
        "policies to evaluate beside lru and sinks (default: all that the bundle can run)", ()
    )
    tasks: tuple[str, ...] = _flag(f"some of {', '.join(TASKS)} (default: all)", ())
    lengths: tuple[int, ...] = _flag("context lengths in tokens (default: 1024 and 2048, as they fit)", ())
    budgets: tuple[int, ...] = _flag("budgets in percent of the length (default: 25, 50 and 75)", ())
    seeds: int = _flag("contexts of each task and length: the error bars are over them", 3)
    sinks: int | None = _flag("first positions that are never evicted (default: the bundle's)", None)
    recent: int | None = _flag("newest rows that are never evicted (default: the bundle's)", None)
    text: str | None = _flag("text file for contexts and perplexity (default: the shipped WikiText-2)", None)
    threads: int = _flag(THREADS, 0)

    def check(self) -> EvalConfig:
        """Itself, or an InputError for the first value that cannot work without looking at the bundle."""
        if "none" in self.policies:
            raise InputError(
                "policy 'none' is what the others are compared with, and always runs",
                "leave it out of --policies",
            )
        for name in self.policies:
            _one_of("policy", name, tuple(p for p in POLICIES if p != "none"))
        for name in self.tasks:
            _one_of("task", name, TASKS)
        for name in ("policies", "tasks"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"{name} names one twice", f"name each once in {_flag_name(name)}")
        for name in ("lengths", "budgets"):
            _ascending(name, getattr(self, name))
        for percent in self.budgets:
            _between("budgets", percent, 1, 99)
        for length in self.lengths:
            _between("lengths", length, 16, LARGEST_BUDGET)
        _between("seeds", self.seeds, 1, 1000)
        _between("sinks", self.sinks or 0, 0, LARGEST_BUDGET)
        _between("recent", self.recent or 0, 0, LARGEST_BUDGET)
        _between("threads", self.threads, 0, 256)
        _check_file("text", self.text)
        parent = os.path.dirname(os.path.abspath(self.output))
        if not os.path.isdir(parent):
            raise InputError(f"{parent}, where the results should go, is not a folder", f"mkdir -p {parent}")
        if os.path.lexists(self.output) and not os.path.isdir(self.output):
            raise InputError(f"{self.output} exists and is no folder", "choose another folder with -o")
        return self


def add_flags(parser: argparse.ArgumentParser, kind: type) -> None:
    """Give the parser one argument for each field of a config."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        _add_flag(parser, item, hints[item.name])


def _add_flag(parser: argparse.ArgumentParser, item: Field, hint: Any) -> None:
    extra: dict[str, Any] = {"help": item.metadata["help"]}
    if choices := item.metadata.get("choices"):
        extra["choices"] = choices
    if item.metadata.get("positional"):
        parser.add_argument(item.name, metavar=item.name.upper(), **extra)
        return
    long = item.metadata.get("flag", _flag_name(item.name))
    names = [item.metadata["short"], long] if "short" in item.metadata else [long]
    if hint is bool:
        parser.add_argument(*names, action="store_true", dest=item.name, **extra)
        return
    extra |= {"dest": item.name, "required": item.default is MISSING, "default": item.default}
    if item.default is MISSING:
        extra.pop("default")
    elif item.default not in (None, ()):
        shown = _listed(item.default) if isinstance(item.default, tuple) else item.default
        extra["help"] += f" (default: {shown})"
    if "choices" not in extra:
        words = {
            int: "N",
            int | None: "N",
            float: "X",
            tuple[int, ...]: "N,N,...",
            tuple[str, ...]: "NAME,...",
        }
        extra["metavar"] = words.get(hint, item.name.upper())
    parser.add_argument(*names, type=_parser_of(hint), **extra)


def from_values(kind: type, values: dict[str, Any]) -> Any:
    """The config of these values, types checked; a key that is no field is an InputError."""
    hints = get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise InputError(f"unknown setting {unknown[0]!r}", f"use one of: {', '.join(hints)}")
    for item in fields(kind):
        if item.default is MISSING and item.name not in values:
            raise InputError(f"{item.name} is missing", f"give {_flag_name(item.name)}")
    for name, value in values.items():
        wanted = get_args(hints[name]) or (hints[name],)
        right = (
            isinstance(value, tuple) and all(type(v) is wanted[0] for v in value)
            if get_origin(hints[name]) is tuple
            else type(value) in wanted
        )
        if not right:
            raise InputError(
                f"{name} is {value!r}, which has the wrong type", f"see edgespec --help for {name}"
            )
    return kind(**values)


def _parser_of(hint: Any) -> Any:
    if hint in (int, float):
        return hint
    return {int | None: int, tuple[int, ...]: _int_list, tuple[str, ...]: _word_list}.get(hint, str)


def _word_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _int_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 2,4,8") from None


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(kind: type, name: str) -> Any:
    return next(item.default for item in fields(kind) if item.name == name)


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def _between(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InputError(f"{name} {value} is not {least} to {most}", f"use another {_flag_name(name)}")


def _ascending(name: str, values: tuple[int, ...]) -> None:
    if list(values) != sorted(set(values)):
        tidy = _listed(tuple(sorted(set(values))))
        raise InputError(f"{name} {_listed(values)} must ascend", f"use {_flag_name(name)} {tidy}")


def _one_of(name: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words:
        raise InputError(f"unknown {name} {value!r}", f"use one of: {', '.join(words)}")


def _check_model(name: str, value: str | None) -> None:
    if value is not None and value != "demo" and not os.path.exists(value):
        raise InputError(
            f"{name} {value!r} does not exist", "give a model folder, a .gguf file, or the word demo"
        )


def _check_file(name: str, value: str | None) -> None:
    if value is not None and not os.path.isfile(value):
        raise InputError(f"{name} {value!r} is not a file", f"give an existing file to {_flag_name(name)}")
