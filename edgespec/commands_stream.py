"""`edgespec stream`: a model that watches frames on a clock and speaks when it should."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgespec.answering import give_sight, opened, settings
from edgespec.commands_latency import predicted_costs
from edgespec.config_stream import StreamConfig
from edgespec.console import load, print_json
from edgespec.progress import Progress


def stream(config: StreamConfig, as_json: bool, progress: Progress) -> int:
    """Watch frames as they come and say what there is to say, when there is something to say."""
    config.check()
    from edgespec.workloads.coach_report import Record, StreamResult, to_lines, truth_of

    wanted = truth_of(Path(config.truth)) if config.truth else None
    folder = Path(config.output) if config.output else None
    record = Record(folder) if folder else None
    moments = []
    with ExitStack() as stack:
        trace = stack.enter_context(record) if record else None
        watched, bundle = _watched(config, stack, trace, progress)
        for moment, frame in watched:
            moments.append(moment)
            if record:
                record.keep(moment, frame)
            if moment.text and not as_json:
                print(f"{moment.began_s:8.1f} s  {moment.text}", flush=True)
    result = StreamResult.of(bundle, config.frames, config.pace, config.every, moments, wanted)
    if record:
        result = record.written(result, bundle)
        progress.note(f"next: open {record.folder / 'report.html'}")
    if as_json:
        print_json("stream", result.to_json())
    else:
        print("\n".join(to_lines(result)), file=sys.stderr)
    return 0


def _watched(
    config: StreamConfig, stack: ExitStack, trace: Any, progress: Progress
) -> tuple[Iterator[tuple[Any, Any]], Any]:
    """What becomes of each frame; and the bundle."""
    from edgespec.workloads.coach import PROMPT, Coach, Constant, Predicted, measured, watch
    from edgespec.workloads.frames import frames

    costs = stack.enter_context(predicted_costs(config.bundle, config.device))
    runtime = stack.enter_context(opened(config, progress, costs))
    give_sight(runtime)
    coach = Coach(runtime.session(), config.prompt or PROMPT, settings(config), trace)
    pace: Any = measured
    if config.device:
        profile, of_bundle = (
            load("edgespec.profiles", "load")(config.device),
            load("edgespec.work", "of_bundle"),
        )
        pace = Predicted(profile, of_bundle(runtime.bundle))
    elif config.tokens_per_s is not None:
        pace = Constant(config.tokens_per_s)
    source = frames(config.frames, config.rate, sys.stdin.buffer, config.stall)
    return watch(source, coach, pace, config.every), runtime.bundle


COMMANDS: tuple[tuple[Callable[..., int], type], ...] = ((stream, StreamConfig),)
