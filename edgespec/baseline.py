"""A report as a baseline for every machine: what was counted and recorded, without any time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgespec.bench_report import BundleFacts, Environment, Report, Sample, Traced
from edgespec.predict import counted, predict
from edgespec.profiles import load
from edgespec.work import ModelWork


def without_times(report: Report) -> Report:
    """The report without what is of one machine or moment: the gate then judges no time against it."""
    e = report.environment
    return replace(
        report,
        run="",
        made="",
        environment=Environment("", e.cores, e.threads, "", "", 0.0, None, {}),
        samples=tuple(_untimed(sample) for sample in report.samples),
        traces=tuple(_untimed_trace(traced) for traced in report.traces),
    )


def _untimed(sample: Sample) -> Sample:
    return replace(
        sample,
        time_first_token_s=0.0,
        time_decode_s=0.0,
        time_graphs_s=0.0,
        load=0.0,
        temperature_c=None,
        bytes_memory=0,
    )


def _untimed_trace(traced: Traced) -> Traced:
    return replace(traced, events=tuple(_untimed_event(event) for event in traced.events))


def _untimed_event(event: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in event.items() if name not in ("time_s", "calls")}
    return kept | ({"calls": [[*call[:4], 0.0] for call in event["calls"]]} if "calls" in event else {})


def recounted(report: Report, facts: BundleFacts, works: Mapping[str, ModelWork]) -> Report:
    """The same samples and traces over another bundle's graphs, with its predictions for the same devices."""
    profiles = [load(p.profile) for p in report.predicted]
    predicted = predict(report.traces, works, profiles)
    graphs = tuple(counted(work) for work in works.values())
    return replace(report, bundle=facts, counted=graphs, predicted=predicted)
