"""`edgespec bench` and `edgespec compare`: the first measures and predicts, the second is the gate."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from edgespec.config_bench import BenchConfig, CompareConfig, share
from edgespec.console import load, print_json, verified, written
from edgespec.errors import InputError
from edgespec.progress import Progress

NEW, BASE = "new", "base"
WARM_UP = 1  # prompts of every new process that count for nothing


def bench(config: BenchConfig, as_json: bool, progress: Progress) -> int:
    """Measure a bundle on prompts, with and without speculation, and predict its speed on devices."""
    config.check()
    from edgespec.bench_figures import texts_different
    from edgespec.bench_report import to_json, write
    from edgespec.bench_table import to_table

    log, reports = _measured(config, progress)
    for name, path in ((BASE, config.base_output), (NEW, config.output)):
        if name in reports:
            write(reports[name], path)
    report = reports[NEW]
    if config.html:
        from edgespec.bench_page import page

        with written(config.html) as file:
            file.write(page(report))
    log.remove()
    if as_json:
        print_json("report", to_json(report))
    else:
        print(to_table(report), end="")
    base = config.base_output if BASE in reports else "BASE.json"
    progress.note(f"next: edgespec compare {base} {config.output}")
    return 1 if texts_different(report.samples) else 0


def compare(config: CompareConfig, as_json: bool, progress: Progress) -> int:
    """Judge a report against a base; exit 1 if anything got worse."""
    config.check()
    from edgespec.bench_report import read
    from edgespec.gate import Rules
    from edgespec.gate import compare as judge
    from edgespec.gate_facts import refuse_different
    from edgespec.gate_report import github, junit, markdown, table, to_json

    base, new = read(config.base), read(config.new)
    rules = Rules(share("fail_over", config.fail_over), share("be_tolerance", config.be_tolerance))
    refuse_different(base, new)
    verdict = judge(base, new, _replayed(base, new, config.profile, progress), rules)
    for path, text in ((config.markdown, markdown), (config.junit, junit)):
        if path:
            with written(path) as file:
                file.write(text(verdict))
    if config.github:
        print("\n".join(github(verdict)), file=sys.stderr if as_json else sys.stdout)
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            with suppress(OSError), open(summary, "a", encoding="utf-8") as file:
                file.write(markdown(verdict))
    if as_json:
        print_json("verdict", to_json(verdict))
    elif not config.github:
        print(table(verdict), end="")
    return 0 if verdict.passed else 1


def opened(
    bundle: Any, threads: int, progress: Progress, command: Sequence[str] = (), costs: Path | None = None
) -> Any:
    """The runtime of a bundle; `command` starts another binary, `costs` is another table of call costs."""
    runtime_type = load("edgespec.runtime.session", "Runtime", extra="onnx")
    return runtime_type.open(bundle.path, threads, command=command, note=progress.note, costs=costs)


def _replayed(base: Any, new: Any, wanted: Sequence[str], progress: Progress) -> list[Any]:
    """The base's traces on both bundles, under the devices asked for, or else those of the base."""
    from edgespec.gate_facts import predicted
    from edgespec.predict import predict, works
    from edgespec.profiles import load as profile_of

    devices = profiles(wanted) if wanted else []
    for name in () if wanted else (p.profile for p in base.predicted):
        try:
            devices.append(profile_of(name))
        except InputError as error:
            progress.note(f"{name} is left out: {error.message}; give its file to --profile")
    return predicted(*(predict(base.traces, works(r.counted), devices) for r in (base, new)))


def _measured(config: BenchConfig, progress: Progress) -> tuple[Any, dict[str, Any]]:
    """The log, and the report of each contender, of a benchmark that is run or goes on."""
    from edgespec.bench import Contender, run
    from edgespec.bench_log import BenchLog
    from edgespec.bench_report import PLAIN, SPECULATIVE
    from edgespec.suite import digest, items

    devices = profiles(config.profile)
    chosen = items(config.suite, config.prompts, config.limit)
    bundles = {NEW: verified(config.bundle, progress)}
    if config.against or config.against_binary:
        bundles[BASE] = verified(config.against or config.bundle, progress)
    starts = {name: partial(_start, config, name, bundle, progress) for name, bundle in bundles.items()}
    environment, costs = machine(starts)
    names = ("tokens", "rounds", "drafter", "stop_rule", "draft_tokens")
    settings = {name: getattr(config, name) for name in names} | {
        "suite": Path(config.prompts).name if config.prompts else config.suite,
        "prompts": len(chosen),
        "prompts_sha256": digest(chosen),
        "warm_up": WARM_UP,
        "threads": environment.threads,
    }
    manifests = {name: digest_of(bundle) for name, bundle in bundles.items()}
    same = {**settings, "costs": costs, "bundles": manifests, "cpu": environment.cpu}
    log = BenchLog(Path(f"{config.output}.part"), same, asdict(environment))
    settings_type = load("edgespec.runtime.session", "Settings", extra="onnx")
    how = {
        "stop_rule": config.stop_rule,
        "draft_tokens": config.draft_tokens,
        "max_new_tokens": config.tokens,
    }
    drafters = {PLAIN: "none", SPECULATIVE: config.drafter}
    ways = {way: settings_type(drafter=drafter, **how) for way, drafter in drafters.items()}
    run(
        [Contender(name, start) for name, start in starts.items()], chosen, ways, config.rounds, log, progress
    )
    if config.stop_rule == "cost":
        for word, device in zip(config.profile, devices if config.profile else (), strict=True):
            decided(starts, bundles, word, device.name, chosen, ways[SPECULATIVE], log, progress)
    reports = {}
    for name, bundle in bundles.items():
        with progress.stage(f"predictions of the {name} bundle"):
            given = {**settings, "costs": costs[name]}
            reports[name] = _report(name, bundle, manifests[name], given, log, chosen, devices, progress)
    return log, reports


def decided(
    starts: Mapping[str, Callable[..., Any]],
    bundles: Mapping[str, Any],
    word: str,
    device: str,
    chosen: Any,
    how: Any,
    log: Any,
    progress: Progress,
) -> None:
    """Every prompt once more, its drafts ended by a device's predicted costs: so it would decode there."""
    from edgespec.bench import Contender, run
    from edgespec.bench_report import SPECULATIVE
    from edgespec.commands_latency import predicted_costs

    contenders = []
    with ExitStack() as stack:
        for name, bundle in bundles.items():
            try:
                costs = stack.enter_context(predicted_costs(str(bundle.path), word))
            except InputError:  # it lacks the bundle's arithmetic, which its prediction will say
                return
            contenders.append(Contender(name, partial(starts[name], costs=costs)))
        run(contenders, chosen, {SPECULATIVE: how}, 1, log, progress, device)


def _report(
    name: str,
    bundle: Any,
    digest: str,
    settings: Any,
    log: Any,
    chosen: Sequence[Any],
    devices: Sequence[Any],
    progress: Progress,
) -> Any:
    """One contender's report, from the log."""
    from edgespec.bench import entries
    from edgespec.bench_report import BenchSettings, Environment, Report, bundle_facts
    from edgespec.predict import counted
    from edgespec.work import of_bundle

    done = entries(log, chosen)
    left_out = tuple(dict.fromkeys(e.left_out for e in done if e.left_out))
    samples = tuple(s for e in done for s in e.samples.get(name, ()))
    if not samples:
        raise InputError(f"no prompt could be answered: {left_out[0]}", "give shorter prompts with --prompts")
    traces = tuple(t for e in done for t in e.traces.get(name, ()))
    works = of_bundle(bundle)
    return Report(
        log.head["run"],
        log.head["made"],
        Environment(**log.head["facts"]),
        bundle_facts(bundle, digest),
        tuple(counted(work) for work in works.values()),
        BenchSettings(**settings),
        left_out,
        predictions(works, traces, devices, progress),
        samples,
        traces,
    )


def predictions(
    works: Mapping[str, Any], traces: Sequence[Any], devices: Sequence[Any], progress: Progress
) -> tuple[Any, ...]:
    """Each device's figures by replay of the traces; one that lacks the bundle's arithmetic is left out."""
    from edgespec.predict import predict

    found: list[Any] = []
    for device in devices:
        try:
            found += predict(traces, works, [device])
        except InputError as error:
            progress.note(f"{device.name} is left out: {error.message}")
    return tuple(found)


def _start(config: BenchConfig, name: str, bundle: Any, progress: Progress, costs: Path | None = None) -> Any:
    """A contender's runtime; a base's own binary gets the table of call costs that ours would."""
    command: list[str] = []
    if name == BASE and config.against_binary:
        command = [config.against_binary]
        table = load("edgespec.runtime.machine", "table_of", extra="onnx")(bundle.path)
        costs = costs or (table if table.is_file() else None)
    return opened(bundle, config.threads, progress, command, costs)


def machine(starts: Mapping[str, Callable[[], Any]]) -> tuple[Any, dict[str, str]]:
    """The machine, and the costs that each contender reckons with: each is started once to tell."""
    from edgespec import environment as here
    from edgespec.bench_report import Environment

    load_start, ready = here.load(), {}
    for name, start in starts.items():
        with start() as runtime:
            ready[name] = runtime.process.ready
    cpu, cores = load("edgespec.runtime.session", "cpu", extra="onnx")(), os.cpu_count() or 1
    threads = int(ready[NEW]["threads"])
    warmth = here.temperature_c()
    found = Environment(
        cpu, cores, threads, here.system(), here.governor(), load_start, warmth, here.packages()
    )
    return found, {name: str(answer["table"]) for name, answer in ready.items()}


def profiles(wanted: Sequence[str]) -> list[Any]:
    """The devices asked for, or all that are known."""
    from edgespec.profiles import load as profile_of
    from edgespec.profiles import names

    return [profile_of(name) for name in wanted or names()]


def digest_of(bundle: Any) -> str:
    """SHA-256 of the manifest, which holds those of all files."""
    from edgespec.bundle import MANIFEST

    return hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()


COMMANDS: tuple[tuple[Callable[..., int], type], ...] = ((bench, BenchConfig), (compare, CompareConfig))
GROUPS: dict[str, str] = {}
