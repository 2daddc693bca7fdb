"""Runs the benchmark: every prompt plainly and speculatively, contenders in turns: drift meets them alike.

Knows no runtime: a contender says how to start its own. All contenders get new processes after every few
prompts: a process's luck with memory shifts all that it answers (by 8 % once), so the gate takes a process
for one observation and needs several. One prompt that counts for nothing warms them up.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from edgespec.bench_log import BenchLog, Entry
from edgespec.bench_report import SPECULATIVE, Sample, Traced
from edgespec.environment import load, temperature_c
from edgespec.errors import InputError
from edgespec.progress import Progress
from edgespec.suite import Item

COUNTS = ("tokens_prompt", "tokens_new", "verify_calls", "draft_calls")
TIMES = ("time_first_token_s", "time_decode_s", "time_graphs_s")
PROMPTS_A_PROCESS = 8  # a start and a warm-up cost about as much as one prompt
Ways = Mapping[str, Any]  # the settings of each way to answer, plain or speculative
T = TypeVar("T")


@dataclass(frozen=True)
class Contender:
    """One of what is compared: `start` opens its runtime, a context manager with sessions."""

    name: str
    start: Callable[[], Any]


def run(
    contenders: Sequence[Contender],
    items: Sequence[Item],
    ways: Ways,
    rounds: int,
    log: BenchLog,
    progress: Progress,
    device: str = "",
) -> None:
    """Answer what the log lacks, and note it there; the traces only where a device's costs end the drafts."""
    for number in range(rounds):
        missing = [item for item in items if (device, number, item.name) not in log.done]
        if not missing:
            continue
        title = f"drafts as {device} ends them" if device else f"round {number + 1} of {rounds}"
        together = len(missing) if device else PROMPTS_A_PROCESS  # a trace alone has no luck to average
        with progress.stage(title) as advance:
            for first in range(0, len(missing), together):
                process = log.processes
                with ExitStack() as stack:
                    runtimes = {c.name: stack.enter_context(c.start()) for c in turned(contenders, process)}
                    if not device:
                        _answered(runtimes, missing[first], ways, number, process, 0)
                    for turn, item in enumerate(missing[first : first + together]):
                        entry = _answered(runtimes, item, ways, number, process, turn)
                        log.add(replace(entry, device=device, samples={}) if device else entry)
                        if entry.left_out:
                            progress.note(entry.left_out)
                        advance(first + turn + 1, len(missing))


def turned(order: Sequence[T], number: int) -> Sequence[T]:
    """The order, turned round where the number is odd."""
    return order[:: -1 if number % 2 else 1]


def _answered(
    runtimes: Mapping[str, Any], item: Item, ways: Ways, number: int, process: int, turn: int
) -> Entry:
    """One prompt, answered in every way by every contender; the order turns round from prompt to prompt."""
    samples: dict[str, list[Sample]] = {name: [] for name in runtimes}
    traces: dict[str, list[Traced]] = {name: [] for name in runtimes}
    order = [(way, name) for way in ways for name in sorted(runtimes)]
    try:
        for way, name in turned(order, turn + number):
            sample, events = answer(runtimes[name], item, way, ways[way], number, process)
            samples[name].append(sample)
            if way == SPECULATIVE and number == 0:
                traces[name].append(Traced(item.name, item.category, events))
    except InputError as error:
        left_out = f"{item.name} is left out: {error.message}"
        return Entry("", number, process, item.name, left_out, {}, {})
    done = {name: tuple(found) for name, found in samples.items()}
    found = {name: tuple(of_one) for name, of_one in traces.items()}
    return Entry("", number, process, item.name, "", done, found)


def answer(
    runtime: Any, item: Item, way: str, settings: Any, number: int, process: int
) -> tuple[Sample, tuple[Any, ...]]:
    """One answer of a new session: what it took, and the runtime's record of it."""
    session, trace = runtime.session(), io.StringIO()
    try:
        said = session.generate(item.text, settings, trace=trace)
    finally:
        session.close()
    stats = said.stats
    sample = Sample(
        prompt=item.name,
        category=item.category,
        round=number,
        process=process,
        way=way,
        drafted_by_position=tuple(stats["drafted_by_position"]),
        accepted_by_position=tuple(stats["accepted_by_position"]),
        bytes_memory=stats["bytes_rss_peak"],
        load=load(),
        temperature_c=temperature_c(),
        text_sha256=hashlib.sha256(json.dumps(said.tokens).encode()).hexdigest(),
        **{name: stats[name] for name in (*COUNTS, *TIMES, "c")},
    )
    return sample, tuple(_event(line) for line in trace.getvalue().splitlines())


def _event(line: str) -> dict[str, Any]:
    """A record without what no replay reads."""
    event: dict[str, Any] = json.loads(line)
    return {name: value for name, value in event.items() if name not in ("entropy", "lambda")}


def entries(log: BenchLog, items: Sequence[Item]) -> list[Entry]:
    """What was answered or left out, in the order of rounds and prompts."""
    order = {item.name: i for i, item in enumerate(items)}
    return sorted(log.done.values(), key=lambda e: (e.device, e.round, order[e.prompt]))
