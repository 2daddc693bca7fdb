"""`edgespec recommend`: groups of fans from their posts, and whom each may like, all on this device."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from edgespec.commands_bench import NEW, decided, digest_of, machine, opened, predictions, profiles
from edgespec.config_recommend import RecommendConfig
from edgespec.console import load, print_json, verified
from edgespec.errors import InputError
from edgespec.files import written_whole
from edgespec.progress import Progress

RUNTIME = "edgespec.runtime.session"


def recommend(config: RecommendConfig, as_json: bool, progress: Progress) -> int:
    """Group the fans of a file of posts, and recommend artists to each group; exit 1 if a text changed."""
    config.check()
    phones = profiles(config.profile)
    from edgespec.workloads.recommend import artists as lists
    from edgespec.workloads.recommend.folder import PAGE, RESULT, SPEED, TABLE, Folder, loaded, sha256
    from edgespec.workloads.recommend.report import to_html, to_table
    from edgespec.workloads.recommend.result import SCHEMA

    artists = lists.read(config.artists)
    bundle = verified(config.bundle, progress)
    with progress.stage("checksum of the posts"):
        settings: dict[str, Any] = {
            "posts_sha256": sha256(config.posts),
            "artists_sha256": sha256(config.artists),
        }
    settings |= {
        "bundle_sha256": digest_of(bundle),
        "clusters": config.clusters,
        "profile": list(config.profile),
    }
    folder = Folder(Path(config.output), settings)
    if folder.finished:
        progress.note(f"{config.output} holds this run already")
    else:
        result, speed = _run(config, artists, bundle, phones, folder, progress)
        written_whole(folder.path / SPEED, json.dumps(speed.to_json(), indent=1) + "\n")
        written_whole(folder.path / PAGE, to_html(result, speed))
        written_whole(folder.path / TABLE, to_table(result, speed))
        text = json.dumps({"schema": SCHEMA, **result.to_json()}, ensure_ascii=False, indent=1)
        written_whole(folder.path / RESULT, text + "\n")
        folder.clear()
    measured = loaded(folder.path / SPEED)
    if as_json:
        found = loaded(folder.path / RESULT)
        found.pop("schema")
        print_json("recommend", {**found, "speed": measured})
    else:
        print((folder.path / TABLE).read_text(encoding="utf-8"), end="")
    progress.note(f"next: open {folder.path / PAGE}")
    return 1 if measured["texts_different"] else 0


def _run(
    config: RecommendConfig, artists: Any, bundle: Any, phones: Sequence[Any], folder: Any, progress: Progress
) -> tuple[Any, Any]:
    """What the posts say, worded, and how fast the wording was."""
    from edgespec.workloads.recommend import pipeline
    from edgespec.workloads.recommend.wording import TOKENS, WORDED, word

    found = pipeline.find(config.posts, artists, config.clusters, folder, progress)
    pipeline.write_fans(found, folder)
    settings = load(RUNTIME, "Settings", extra="onnx")(max_new_tokens=TOKENS)
    with opened(bundle, config.threads, progress) as runtime:

        def tokens_of(text: str) -> int:
            return len(runtime.tokenizer.encode(f" {text}", add_special_tokens=False).ids)

        def say(prompt: str) -> str:
            session = runtime.session()
            try:
                return session.generate(prompt, settings).text
            finally:
                session.close()

        asked = pipeline.asked(found, tokens_of)
        with progress.stage("wording") as advance:
            worded = word(asked, artists, say, folder.stage(WORDED), advance)
    return pipeline.result(found, worded), _measured(config, bundle, phones, asked, folder, progress)


def _measured(
    config: RecommendConfig,
    bundle: Any,
    phones: Sequence[Any],
    asked: Sequence[Any],
    folder: Any,
    progress: Progress,
) -> Any:
    """The wording's questions answered with and without speculation, and once more as each phone drafts."""
    from edgespec.bench import Contender, entries, run
    from edgespec.bench_log import BenchLog
    from edgespec.bench_report import PLAIN, SPECULATIVE
    from edgespec.work import of_bundle
    from edgespec.workloads.recommend.speed import questions, speed
    from edgespec.workloads.recommend.wording import TOKENS

    chosen = questions(asked)
    start = partial(opened, bundle, config.threads, progress)
    environment, costs = machine({NEW: start})
    settings_type = load(RUNTIME, "Settings", extra="onnx")
    ways = {
        PLAIN: settings_type(max_new_tokens=TOKENS, drafter="none"),
        SPECULATIVE: settings_type(max_new_tokens=TOKENS),
    }
    log = BenchLog(folder.stage("speed"), {"costs": costs, "cpu": environment.cpu}, asdict(environment))
    run([Contender(NEW, start)], chosen, ways, 1, log, progress)
    for word, phone in zip(config.profile, phones, strict=True):
        decided({NEW: start}, {NEW: bundle}, word, phone.name, chosen, ways[SPECULATIVE], log, progress)
    done = entries(log, chosen)
    samples = [s for e in done for s in e.samples.get(NEW, ())]
    if not samples:
        raise InputError(
            f"no question could be answered: {done[0].left_out}", "export with a larger --budget"
        )
    traces = [t for e in done for t in e.traces.get(NEW, ())]
    return speed(samples, predictions(of_bundle(bundle), traces, phones, progress))


COMMANDS: tuple[tuple[Callable[..., int], type], ...] = ((recommend, RecommendConfig),)
GROUPS: dict[str, str] = {}
