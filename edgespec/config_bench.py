"""What `edgespec bench` and `edgespec compare` can be told, checked before the first slow step."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from edgespec.config import THREADS
from edgespec.errors import InputError
from edgespec.flags import between, check_file, check_place, flag, flag_name
from edgespec.suite import SUITES


@dataclass(frozen=True)
class _Measuring:
    """What is measured, how often, and how it drafts."""

    bundle: str = flag("folder of the bundle", positional=True)
    suite: str = flag("prompts that ship with edgespec", "specbench", kw_only=True, choices=SUITES)
    prompts: str | None = flag("file of prompts instead: .jsonl, .json, .csv or .txt", None, kw_only=True)
    limit: int = flag("most prompts, balanced over their categories; 0: all", 0, kw_only=True)
    tokens: int = flag("most tokens of one answer", 128, kw_only=True)
    rounds: int = flag("times that every prompt is answered; eight prompts a process", 3, kw_only=True)
    threads: int = flag(THREADS, 0, kw_only=True)
    drafter: str = flag("who drafts", "auto", kw_only=True, choices=("auto", "draft", "ngram", "both"))
    stop_rule: str = flag(
        "when a draft ends", "cost", kw_only=True, choices=("cost", "adaedl", "confidence", "fixed")
    )
    draft_tokens: int = flag("most drafted tokens a round; 0: what the graphs hold", 0, kw_only=True)


@dataclass(frozen=True)
class BenchConfig(_Measuring):
    """`edgespec bench`: what to measure, beside what, for which devices, and where the report goes."""

    output: str = flag("file of the report; a run that was stopped goes on there", short="-o")
    profile: tuple[str, ...] = flag(
        "devices to predict for, by drafts that their costs end, or .toml files (default: all, by ours)", ()
    )
    html: str | None = flag("file of a page with tables and plots", None)
    against: str | None = flag("base bundle to measure in turns with this one", None)
    against_binary: str | None = flag("the base's own edgespec-runtime, where its code differs", None)

    @property
    def base_output(self) -> str:
        """Where the base's report goes: report.json has report.base.json beside it."""
        path = Path(self.output)
        return str(path.with_name(f"{path.stem}.base{path.suffix}"))

    def check(self) -> BenchConfig:
        """Itself, or an InputError for the first value that cannot work."""
        check_file("prompts", self.prompts)
        check_file("against_binary", self.against_binary)
        between("limit", self.limit, 0, 2**20)
        between("tokens", self.tokens, 2, 2**20)
        between("rounds", self.rounds, 1, 1000)
        between("threads", self.threads, 0, 256)
        between("draft_tokens", self.draft_tokens, 0, 2**20)
        check_writable("output", self.output)
        check_writable("html", self.html)
        return self


@dataclass(frozen=True)
class CompareConfig:
    """`edgespec compare`: the two reports, how much worse fails, and what to write."""

    base: str = flag("report of the base", positional=True)
    new: str = flag("report of the change", positional=True)
    profile: tuple[str, ...] = flag("devices to predict for, or .toml files (default: the base's)", ())
    fail_over: str = flag("measured figures fail where they are worse by more, surely", "3%")
    be_tolerance: str = flag("the same for block efficiency, which the processor's rounding may change", "5%")
    markdown: str | None = flag("file for the verdicts as Markdown", None)
    junit: str | None = flag("file for the verdicts as JUnit XML", None)
    github: bool = flag("print GitHub annotations, and add the Markdown to the step's summary", False)

    def check(self) -> CompareConfig:
        """Itself, or an InputError for the first value that cannot work."""
        for name in ("fail_over", "be_tolerance"):
            share(name, getattr(self, name))
        check_writable("markdown", self.markdown)
        check_writable("junit", self.junit)
        return self


def share(name: str, text: str) -> float:
    """`3%` or `0.03` as 0.03; InputError for anything that is no share from 0 to 100 %."""
    hint = f"write a percentage such as {flag_name(name)} 3%"
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?%?", text.strip()):
        raise InputError(f"{name} {text!r} is no percentage", hint)
    value = float(text.strip().removesuffix("%")) / (100 if "%" in text else 1)
    if value > 1:
        raise InputError(f"{name} {text} is more than 100 %", hint)
    return value


def check_writable(name: str, path: str | None) -> None:
    """InputError where a file cannot be written there."""
    if path is None:
        return
    check_place(name, path)
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise InputError(f"{name} {path!r} is a folder", f"give a file to {flag_name(name)}")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} is not writable", f"give another file to {flag_name(name)}")
