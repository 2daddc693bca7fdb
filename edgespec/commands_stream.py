"""`edgespec stream`: a model that watches frames on a clock and speaks when it should."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgespec.answering import give_sight, opened, settings
from edgespec.commands_bench import predictions, profiles
from edgespec.commands_latency import predicted_costs
from edgespec.config_stream import StreamConfig
from edgespec.console import Terminated, print_json
from edgespec.progress import Progress

PICTURE_BYTES = 16 << 20  # a stream never goes back, but where a step was interrupted


def stream(config: StreamConfig, as_json: bool, progress: Progress) -> int:
    """Watch frames as they come and say what there is to say, when there is something to say."""
    config.check()
    from edgespec.work import of_bundle
    from edgespec.workloads.stream.report import PAGE, Record, StreamResult, to_lines, truth_of

    wanted = truth_of(Path(config.truth)) if config.truth else None
    folder = Path(config.output) if config.output else None
    record = Record(folder) if folder else None
    moments = []
    with ExitStack() as stack:
        trace = stack.enter_context(record) if record else None
        watched, bundle = _watched(config, stack, trace, progress)
        try:
            for moment, frame in watched:
                if record:
                    record.keep(moment, frame)
                moments.append(moment)
                if moment.text and not as_json:
                    print(f"{moment.began_s:8.1f} s  {moment.text}", flush=True)
        except Terminated:
            raise
        except KeyboardInterrupt:  # how a camera's stream ends: what was seen counts
            progress.note("interrupted")
    result = StreamResult.of(bundle, config.frames, config.pace, config.every, moments, wanted)
    if record:
        works, traces = of_bundle(bundle), [record.traced]
        result = replace(result, predicted=predictions(works, traces, profiles(config.profile), progress))
        record.write(result)
        progress.note(f"next: open {record.folder / PAGE}")
    if as_json:
        print_json("stream", result.to_json())
    else:
        print("\n".join(to_lines(result)), file=sys.stderr)
    return 0


def _watched(
    config: StreamConfig, stack: ExitStack, trace: Any, progress: Progress
) -> tuple[Iterator[tuple[Any, Any]], Any]:
    """What becomes of each frame; and the bundle."""
    from edgespec.profiles import load as profile_of
    from edgespec.work import of_bundle
    from edgespec.workloads.stream.coach import PROMPT, Coach, Constant, Predicted, measured, watch
    from edgespec.workloads.stream.frames import frames

    costs = stack.enter_context(predicted_costs(config.bundle, config.device))
    runtime = stack.enter_context(opened(config, progress, costs))
    give_sight(runtime)
    coach = Coach(runtime.session(PICTURE_BYTES), config.prompt or PROMPT, settings(config), trace)
    pace: Any = measured
    if config.device:
        pace = Predicted(profile_of(config.device), of_bundle(runtime.bundle))
    elif config.tokens_per_s is not None:
        pace = Constant(config.tokens_per_s)
    source = frames(config.frames, config.rate, sys.stdin.buffer, config.stall)
    return watch(source, coach, pace, config.every), runtime.bundle


COMMANDS: tuple[tuple[Callable[..., int], type], ...] = ((stream, StreamConfig),)
