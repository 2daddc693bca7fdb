"""`edgespec eval --speculation`: how good a bundle's drafts are, and beside them Transformers' own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from edgespec.commands_bench import NEW, digest_of, machine, opened
from edgespec.config import EvalConfig
from edgespec.console import load, print_json, verified, written
from edgespec.errors import InputError
from edgespec.progress import Progress


def speculation(config: EvalConfig, as_json: bool, progress: Progress) -> int:
    """`edgespec eval --speculation`: all drafters and stop rules; exit 1 if a greedy text changed."""
    from edgespec.bench_figures import ALL, c_parameters
    from edgespec.bench_report import bundle_facts
    from edgespec.predict import counted
    from edgespec.speculation import ASSISTED, rows, to_table
    from edgespec.work import of_bundle

    bundle, folder = verified(config.bundle, progress), Path(config.output)
    models: Sequence[Any] = ()
    if config.baseline:
        models = load("edgespec.exporters.assisted", "sources")(bundle, config.source, config.draft_source)
    folder.mkdir(exist_ok=True)
    ways, settings, samples = _drafted(config, bundle, folder / "speculation.jsonl", progress)
    works = tuple(counted(work) for work in of_bundle(bundle).values())
    ratio = c_parameters(bundle_facts(bundle, settings["bundle"]).models, works)
    found = rows(samples, ways, ratio)
    if models:
        theirs = _assisted(config, models, settings, samples, folder / "transformers.jsonl", progress)
        found += rows(theirs, [ASSISTED], ratio)
    loads = [s.load for s in samples]
    facts = {
        "prompts": len({s.prompt for s in samples}),
        "threads": settings["threads"],
        "cpu": settings["cpu"],
    }
    facts |= {"load": f"{min(loads):.1f}..{max(loads):.1f}"}
    if models:
        facts["transformers"] = load("edgespec.exporters.assisted", "how")()
    result = {"facts": facts, "settings": settings, "rows": [row.to_json() for row in found]}
    with written(str(folder / "speculation.json")) as file:
        json.dump({"schema": "edgespec.speculation/1", **result}, file, indent=1)
    if as_json:
        print_json("speculation", result)
    else:
        print(to_table(found, facts), end="")
    return 1 if any(r.texts_different for r in found if r.figures.category == ALL) else 0


def _drafted(
    config: EvalConfig, bundle: Any, path: Path, progress: Progress
) -> tuple[Any, dict[str, Any], Any]:
    """Every way to draft, how it was measured, and its samples, from a record: a stopped run goes on."""
    from edgespec.bench import Contender, entries, run
    from edgespec.bench_log import BenchLog
    from edgespec.speculation import ways_of
    from edgespec.suite import digest, items

    chosen = items("specbench", config.prompts, config.limit)
    start = partial(opened, bundle, config.threads, progress)
    environment, costs = machine({NEW: start})
    models = {m.name: m for m in bundle.manifest.models}
    most = max(g.width for g in models["target"].graphs if g.kind == "verify") - 1
    ways = ways_of("draft" in models, config.heats, most)
    settings = {"prompts_sha256": digest(chosen), "tokens": config.tokens, "ways": [w.name for w in ways]}
    settings |= {"costs": costs[NEW], "bundle": digest_of(bundle), "threads": environment.threads}
    settings |= {"cpu": environment.cpu}
    log = BenchLog(path, settings, asdict(environment))
    settings_type = load("edgespec.runtime.session", "Settings", extra="onnx")
    how = {w.name: settings_type(max_new_tokens=config.tokens, **asdict(w)) for w in ways}
    run([Contender(NEW, start)], chosen, how, 1, log, progress)
    done = entries(log, chosen)
    samples = [s for e in done for s in e.samples.get(NEW, ())]
    if not samples:
        raise InputError(
            f"no prompt could be answered: {done[0].left_out}", "give shorter ones with --prompts"
        )
    return ways, settings, samples


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
    same = {name: value for name, value in settings.items() if name not in ("ways", "costs")}
    log = BenchLog(path, {**same, "how": how()}, {})
    run([Contender(ASSISTED.drafter, start)], chosen, {ASSISTED.name: config.tokens}, 1, log, progress)
    return [s for e in entries(log, chosen) for s in e.samples.get(ASSISTED.drafter, ())]
