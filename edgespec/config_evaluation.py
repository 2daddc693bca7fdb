"""What `edgespec eval` can be told, checked before any bundle is looked at."""

from __future__ import annotations

from dataclasses import dataclass

from edgespec.config import DRAFTS, LARGEST_BUDGET, THREADS
from edgespec.errors import InputError
from edgespec.flags import ascending, between, check_file, check_folder, check_model, flag, flag_name, one_of
from edgespec.policy import NAMES as POLICIES
from edgespec.task_words import NAMES as TASKS


@dataclass(frozen=True)
class EvalConfig:
    """`edgespec eval`: whose policies, or drafts, to evaluate, on what, and where the results go."""

    bundle: str = flag("folder of the bundle", positional=True)
    output: str = flag("folder of the results; a run that was stopped goes on there", short="-o")
    policies: tuple[str, ...] = flag(
        "policies to evaluate beside lru and sinks (default: all that the bundle can run)", ()
    )
    tasks: tuple[str, ...] = flag(f"some of {', '.join(TASKS)} (default: all)", ())
    lengths: tuple[int, ...] = flag("context lengths in tokens (default: 1024 and 2048, as they fit)", ())
    budgets: tuple[int, ...] = flag("budgets in percent of the length (default: 25, 50 and 75)", ())
    seeds: int = flag("contexts of each task and length: the error bars are over them", 3)
    sinks: int | None = flag("first positions that are never evicted (default: the bundle's)", None)
    recent: int | None = flag("newest rows that are never evicted (default: the bundle's)", None)
    text: str | None = flag("text file for contexts and perplexity (default: the shipped WikiText-2)", None)
    threads: int = flag(THREADS, 0)
    speculation: bool = flag("evaluate drafts instead, on the shipped part of Spec-Bench", False)
    prompts: str | None = flag("with --speculation: file of prompts instead of Spec-Bench's", None)
    limit: int = flag("with --speculation: most prompts, balanced over their categories; 0: all", 0)
    tokens: int = flag("with --speculation: most tokens of one answer", 128)
    temperatures: tuple[str, ...] = flag(
        "with --speculation: of the sampling; 0 is greedy", ("0", "0.7", "1")
    )
    beside: str | None = flag(
        "with --speculation: a bundle of the same target to show beside, such as the draft's whole head", None
    )
    baseline: str | None = flag(
        "with --speculation: also Transformers' assisted generation, greedy, from the checkpoints",
        None,
        choices=("transformers",),
    )
    source: str | None = flag("with --baseline: the target's checkpoint (default: where it came from)", None)
    draft_source: str | None = flag("with --baseline: the same for the draft", None)

    @property
    def heats(self) -> tuple[float, ...]:
        """The temperatures as numbers."""
        return tuple(float(t) for t in self.temperatures)

    def check(self) -> EvalConfig:
        """Itself, or an InputError for the first value that cannot work without looking at the bundle."""
        check_file("prompts", self.prompts)
        check_model("source", self.source)
        check_model("draft_source", self.draft_source, DRAFTS)
        for name in ("beside", "baseline"):
            if getattr(self, name) and not self.speculation:
                raise InputError(
                    f"{name} {getattr(self, name)} is to compare drafts with", "add --speculation"
                )
        between("limit", self.limit, 0, 2**20)
        between("tokens", self.tokens, 2, 2**20)
        try:
            heats = self.heats
        except ValueError:
            heats = ()
        if not heats or len(set(heats)) < len(heats) or not all(0 <= t <= 100 for t in heats):
            given = ",".join(self.temperatures)
            hint = "use --temperatures 0,0.7,1"
            raise InputError(f"temperatures {given} are no numbers from 0 to 100, each once", hint)
        if "none" in self.policies:
            raise InputError(
                "policy 'none' is what the others are compared with, and always runs",
                "leave it out of --policies",
            )
        for name in self.policies:
            one_of("policy", name, tuple(p for p in POLICIES if p != "none"))
        for name in self.tasks:
            one_of("task", name, TASKS)
        for name in ("policies", "tasks"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"{name} names one twice", f"name each once in {flag_name(name)}")
        for name in ("lengths", "budgets"):
            ascending(name, getattr(self, name))
        for percent in self.budgets:
            between("budgets", percent, 1, 99)
        for length in self.lengths:
            between("lengths", length, 16, LARGEST_BUDGET)
        between("seeds", self.seeds, 1, 1000)
        between("sinks", self.sinks or 0, 0, LARGEST_BUDGET)
        between("recent", self.recent or 0, 0, LARGEST_BUDGET)
        between("threads", self.threads, 0, 256)
        check_file("text", self.text)
        check_folder("the results", self.output)
        return self
