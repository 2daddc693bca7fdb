"""`edgespec eval --speculation`: how good a bundle's drafts are, beside another's and Transformers' own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from edgespec.commands_bench import BASE, NEW, digest_of, machine, opened
from edgespec.config_evaluation import EvalConfig
from edgespec.console import load, print_json, verified, written
from edgespec.errors import InputError
from edgespec.progress import Progress


def speculation(config: EvalConfig, as_json: bool, progress: Progress) -> int:
    """`edgespec eval --speculation`: all drafters and stop rules; exit 1 if a greedy text changed."""
    from edgespec.bench_figures import ALL
    from edgespec.speculation import ASSISTED, ratios, rows, to_table

    bundles, folder = {NEW: verified(config.bundle, progress)}, Path(config.output)
    if config.beside:
        bundles[BASE] = verified(config.beside, progress)
        _refuse_others(config, bundles)
    models: Sequence[Any] = ()
    if config.baseline:
        words = config.source, config.draft_source
        models = load("edgespec.exporters.assisted", "sources")(bundles[NEW], *words)
    folder.mkdir(exist_ok=True)
    ways, settings, samples = _drafted(config, bundles, folder / "speculation.jsonl", progress)
    found = {
        name: rows(bundle.path.name, samples[name], ways, _by_parameters(bundle))
        for name, bundle in bundles.items()
    }
    ours, beside = found[NEW], found.get(BASE, [])
    loads = [s.load for some in samples.values() for s in some]
    facts = {
        "prompts": len({s.prompt for s in samples[NEW]}),
        "threads": settings["threads"],
        "cpu": settings["cpu"],
    }
    facts |= {"load": f"{min(loads):.1f}..{max(loads):.1f}"}
    if models:
        theirs = _assisted(config, models, settings, samples[NEW], folder / "transformers.jsonl", progress)
        ours += rows(bundles[NEW].path.name, theirs, [ASSISTED], _by_parameters(bundles[NEW]))
        facts["transformers"] = load("edgespec.exporters.assisted", "how")()
    result = {"facts": facts, "settings": settings, "rows": [row.to_json() for row in (*ours, *beside)]}
    if beside:
        result["ratios"] = [r.to_json() for r in ratios(ours, beside)]
    with written(str(folder / "speculation.json")) as file:
        json.dump({"schema": "edgespec.speculation/1", **result}, file, indent=1)
    if as_json:
        print_json("speculation", result)
    else:
        print(to_table(ours, facts, beside), end="")
    return 1 if any(r.texts_different for r in (*ours, *beside) if r.figures.category == ALL) else 0


def _refuse_others(config: EvalConfig, bundles: Mapping[str, Any]) -> None:
    """InputError where two bundles have one name, are not of one target, or have no draft to compare."""
    if len({b.path.name for b in bundles.values()}) == 1:
        raise InputError(f"both bundles are named {bundles[NEW].path.name}", "give one another name")
    hint = "export both from one checkpoint with the same settings but for the draft's"
    targets = [
        (b.manifest.files[b.model("target").weights].sha256, b.model("target").cache)
        for b in bundles.values()
    ]
    if targets[0] != targets[1]:
        raise InputError(f"{config.beside} has another target than {config.bundle}, or another cache", hint)
    for bundle in bundles.values():
        if len(bundle.manifest.models) < 2:
            raise InputError(f"{bundle.path.name} has no draft", hint)


def _by_parameters(bundle: Any) -> float:
    """c of a bundle as the VocabTrim paper counts it."""
    from edgespec.bench_figures import c_parameters
    from edgespec.bench_report import bundle_facts
    from edgespec.predict import counted
    from edgespec.work import of_bundle

    works = tuple(counted(work) for work in of_bundle(bundle).values())
    return c_parameters(bundle_facts(bundle, digest_of(bundle)).models, works)


def _drafted(
    config: EvalConfig, bundles: Mapping[str, Any], path: Path, progress: Progress
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Every way to draft, how it was measured, and each bundle's samples, from a record: a stopped run goes
    on.
    """
    from edgespec.bench import Contender, entries, run
    from edgespec.bench_log import BenchLog
    from edgespec.speculation import ways_of
    from edgespec.suite import digest, items

    chosen = items("specbench", config.prompts, config.limit)
    starts = {name: partial(opened, bundle, config.threads, progress) for name, bundle in bundles.items()}
    environment, costs = machine(starts)
    names = {m.name for m in bundles[NEW].manifest.models}
    most = min(_widest(bundle) for bundle in bundles.values()) - 1
    ways = ways_of("draft" in names, config.heats, most)
    settings = {"prompts_sha256": digest(chosen), "tokens": config.tokens, "ways": [w.name for w in ways]}
    settings |= {"costs": costs[NEW], "bundle": digest_of(bundles[NEW]), "threads": environment.threads}
    settings |= {"cpu": environment.cpu}
    if BASE in bundles:
        settings |= {"costs_beside": costs[BASE], "beside": digest_of(bundles[BASE])}
    log = BenchLog(path, settings, asdict(environment))
    settings_type = load("edgespec.runtime.session", "Settings", extra="onnx")
    how = {w.name: settings_type(max_new_tokens=config.tokens, **asdict(w)) for w in ways}
    run([Contender(name, start) for name, start in starts.items()], chosen, how, 1, log, progress)
    done = entries(log, chosen)
    samples = {name: [s for e in done for s in e.samples.get(name, ())] for name in bundles}
    if not samples[NEW]:
        raise InputError(
            f"no prompt could be answered: {done[0].left_out}", "give shorter ones with --prompts"
        )
    return ways, settings, samples


def _widest(bundle: Any) -> int:
    """Rows of a target's widest verify call."""
    return max(g.width for g in bundle.model("target").graphs if g.kind == "verify")


def _assisted(
    config: EvalConfig, models: Sequence[Any], settings: Any, ours: Any, path: Path, progress: Progress
) -> Any:
    """Transformers' assisted generation on the prompts that we answered: its samples, from its own record."""
    from edgespec.bench import Contender, entries, run
    from edgespec.bench_log import BenchLog
    from edgespec.speculation import ASSISTED
    from edgespec.suite import items

    answered = {s.prompt for s in ours}
    chosen = [i for i in items("specbench", config.prompts, config.limit) if i.name in answered]
    assisted, how = (load("edgespec.exporters.assisted", name) for name in ("Assisted", "how"))
    render = load("edgespec.runtime.text", "render", extra="onnx")
    start = partial(assisted, *models, max(s.c for s in ours), settings["threads"], render)
    same = {
        name: value
        for name, value in settings.items()
        if name not in ("ways", "costs", "costs_beside", "beside")
    }
    log = BenchLog(path, {**same, "how": how()}, {})
    run([Contender(ASSISTED.drafter, start)], chosen, {ASSISTED.name: config.tokens}, 1, log, progress)
    return [s for e in entries(log, chosen) for s in e.samples.get(ASSISTED.drafter, ())]
