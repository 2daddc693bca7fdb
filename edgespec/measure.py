"""The profile of the machine this runs on, from timed calls of a bundle: few numbers, each told by several.

- bandwidth_weights and bandwidth_kv: decode calls over a nearly empty and a nearly full cache;
- bandwidth_activations: verify calls, whose time grows with their width before arithmetic binds;
- the rate of the bundle's arithmetic: prefill calls. The other arithmetic stays unknown;
- bandwidth_peak and bandwidth_host: reading and copying an array larger than any cache, the best of several;
- host_s: what a round takes beside its calls.
Other programs only ever add time, so a call's figure is the lower quartile of its times; the machine's load
goes into every figure's source.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from edgespec.bundle import Bundle
from edgespec.fit import Priors, solve
from edgespec.profiles import Figure, Profile
from edgespec.profiles.profile import THIS_MACHINE
from edgespec.progress import Progress
from edgespec.replay import walk
from edgespec.trace import Trace, parse_trace
from edgespec.work import ModelWork, Work, of_bundle

ARRAY = 2**28  # bytes, beyond any cache
TIMES = 5
NEW = 12  # tokens decoded at each filling
PRIORS: Priors = {
    "bandwidth_weights_bytes_per_s": ("bandwidth_peak_bytes_per_s", 0.6, 0.5),
    "bandwidth_kv_bytes_per_s": ("bandwidth_weights_bytes_per_s", 0.5, 0.7),
    "bandwidth_activations_bytes_per_s": ("bandwidth_weights_bytes_per_s", 0.1, 1.0),
    "dispatch_s": ("", 2e-4, 1.0),
}
RATE = ("", 1e11, 1.5)


@dataclass(frozen=True)
class Timed:
    """A kind of call over a cache filled so far: what it moves, and the seconds that it took each time."""

    model: str
    kind: str
    width: int
    work: Work
    times_s: tuple[float, ...]

    @property
    def quiet_s(self) -> float:
        """What it takes where nothing else runs: the lower quartile."""
        return sorted(self.times_s)[len(self.times_s) // 4]


def measure(bundle: Bundle, runtime: Any, settings: Any, runs: int, cpu: str, progress: Progress) -> Profile:
    """The profile of this machine by this bundle's calls; `settings` is the runtime's type of them."""
    models, threads = of_bundle(bundle), int(runtime.process.ready["threads"])
    with progress.stage("memory"):
        peak, copying = peak_bandwidth(threads), copy_bandwidth()
    text = f"{os.path.basename(bundle.path)}, {cpu}, {threads} threads, load {os.getloadavg()[0]:.1f}"
    day = date.today().isoformat()
    arithmetic = f"ops_{models['target'].arithmetic}_per_s"
    guess = Figure(RATE[1], text, day, "estimate")
    blank = _blank(peak, copying, text, day).with_figure(arithmetic, guess)
    with progress.stage("calls"):
        timed, host = time_calls(runtime, settings, models, blank, runs)
    samples = [(one.work, one.quiet_s) for one in timed]
    made, _ = solve(blank, samples, PRIORS | {arithmetic: RATE}, text, day, "measured")
    reached = made.bandwidth_weights_bytes_per_s.value
    top = Figure(max(peak, reached), text, day, "measured")
    return replace(made, host_s=Figure(host, text, day, "measured"), bandwidth_peak_bytes_per_s=top)


def time_calls(
    runtime: Any, settings: Any, models: dict[str, ModelWork], profile: Profile, runs: int
) -> tuple[list[Timed], float]:
    """Calls of every width and of two fillings, and the seconds of a round beside its calls."""
    target = models["target"]
    slots = target.budget + target.block
    found: dict[tuple[str, str, int, int], tuple[Work, list[float]]] = {}
    beside: list[float] = []
    rounds = max(1, runs // NEW)
    for filled in (16, slots - NEW - 2) * rounds:
        trace, outside = record(runtime, settings, [1] * filled, NEW)
        beside.append(outside)
        for call, work in walk(trace, profile, models):
            if call.kind in ("prefill", "decode", "verify") and call.rows == call.width:
                key = (call.model, call.kind, call.width, round(work.bytes_kv / max(1, target.block)))
                found.setdefault(key, (work, []))[1].append(call.time_s)
    timed = [Timed(*key[:3], work, tuple(times)) for key, (work, times) in found.items()]
    return [*_grouped(timed), *_tuned(runtime, models, profile, runs)], max(0.0, min(beside))


def record(runtime: Any, settings: Any, tokens: list[int], new: int, **how: Any) -> tuple[Trace, float]:
    """The trace of a conversation, and the seconds of a round beside its calls."""
    session, lines = runtime.session(), io.StringIO()
    how = {"max_new_tokens": new, "drafter": "none", **how}
    for _ in session.stream(tokens, settings(**how), trace=lines):
        pass
    stats = session.answer.stats
    session.close()
    trace = parse_trace(lines.getvalue().splitlines())
    spent = sum(call.time_s for turn in trace.turns for one in turn.rounds for call in one.calls)
    return trace, (stats["time_decode_s"] - spent) / max(1, stats["rounds"])


def _tuned(runtime: Any, models: dict[str, ModelWork], profile: Profile, runs: int) -> Iterable[Timed]:
    """Verify calls of every width over a cache that is a quarter full, as the runtime times them."""
    tables = [runtime.process.ask("tune", runs=max(1, runs // TIMES))["table"] for _ in range(TIMES)]
    target = models["target"]
    for word in tables[0]["verify"]:
        width, times = int(word), tuple(table["verify"][word] * 1e-6 for table in tables)
        kind, filled = "decode" if width == 1 else "verify", target.budget // 4
        work = target.call(kind, width, target.bucket(filled + width), filled, profile.bytes_float.value)
        yield Timed("target", kind, width, work, times)


def _grouped(timed: list[Timed]) -> list[Timed]:
    """Decode calls at neighbouring fillings as one: single calls are noisy, and each would count as much."""
    groups: dict[tuple[str, str, int, bool], list[Timed]] = {}
    middle = median(one.work.bytes_kv for one in timed)
    for one in timed:
        groups.setdefault((one.model, one.kind, one.width, one.work.bytes_kv > middle), []).append(one)
    return [
        Timed(*key[:3], group[len(group) // 2].work, tuple(t for one in group for t in one.times_s))
        for key, group in groups.items()
    ]


def peak_bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read together: each by its own clock, which stops when it waits its
    turn, the best of several tries.
    """
    parts = np.array_split(np.ones(ARRAY // 8), threads)
    with ThreadPoolExecutor(threads) as pool:
        tries = [sum(pool.map(partial(_rate, np.max), parts)) for _ in range(TIMES)]
    return max(tries)


def copy_bandwidth() -> float:
    """Bytes a second that one thread copies, the best of several tries."""
    source, target = np.ones(ARRAY // 8), np.ones(ARRAY // 8)
    return max(_rate(partial(np.copyto, target), source) for _ in range(TIMES))


def _rate(work: Callable[[np.ndarray], object], array: np.ndarray) -> float:
    start = time.thread_time()
    work(array)
    return array.nbytes / (time.thread_time() - start)


def _blank(peak: float, copying: float, text: str, day: str) -> Profile:
    """This machine before its calls were timed: what is to be fitted holds the peak."""
    seen = Figure(peak, text, day, "measured")
    figures: dict[str, Figure | None] = {
        name: seen for name in ("peak", "weights", "widened", "kv", "activations")
    }
    words = {f"bandwidth_{name}_bytes_per_s": figure for name, figure in figures.items()}
    return Profile(
        name=THIS_MACHINE,
        title=f"the machine that measured it: {text}",
        kind="cpu",
        memory="unknown",
        operators="cpu",
        **words,  # type: ignore[arg-type]
        bandwidth_host_bytes_per_s=Figure(copying, text, day, "measured"),
        dispatch_s=Figure(2e-4, text, day, "estimate"),
        host_s=Figure(0.0, text, day, "estimate"),
        efficiency=Figure(1.0, "the rates are what calls reach", day, "measured"),
        bytes_float=Figure(4, "a processor keeps floats in fp32", day, "read"),
        ops_int8_per_s=None,
        ops_int16_per_s=None,
        ops_float_per_s=None,
        bytes_on_chip=None,
        bytes_context=None,
        bytes_memory=_ram(day),
        energy_j_per_byte=None,
    )


def _ram(day: str) -> Figure | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    return Figure(size, "the memory that the system reports", day, "read")
