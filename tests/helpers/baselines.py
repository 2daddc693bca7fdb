"""How our own baselines are made and checked: the same words for scripts/update_baseline and for the test."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgespec.baseline import recounted
from edgespec.bench_report import Report, bundle_facts
from edgespec.bundle import MANIFEST, open_bundle
from edgespec.work import of_bundle

FOLDER = Path(__file__).resolve().parents[2] / "profiles" / "baselines"
# A trained draft would be calibrated for an npu's int4, for minutes; the target's own layers need not be.
EXPORT = {
    "cpu": ["--draft", "demo", "--device", "cpu"],
    "npu": ["--draft", "layers", "--device", "npu", "--weights", "int4"],
}
PROFILES = "snapdragon-8-elite,snapdragon-8-gen-3,dimensity-9400,apple-a18-pro"
BENCH = ["--suite", "specbench", "--limit", "13", "--tokens", "24", "--rounds", "1", "--threads", "1"]


def path(device: str) -> Path:
    """Where a device's baseline lies."""
    return FOLDER / f"demo-{device}.json"


def export(device: str, bundle: Path) -> list[str]:
    """The command that makes the bundle."""
    return ["export", "demo", *EXPORT[device], "-o", str(bundle)]


def bench(bundle: Path, output: Path) -> list[str]:
    """The command that makes the report."""
    return ["bench", str(bundle), *BENCH, "--profile", PROFILES, "-o", str(output)]


def over(report: Report, bundle: Path) -> Report:
    """The report's traces over another bundle's graphs."""
    opened = open_bundle(bundle)
    digest = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    return recounted(report, bundle_facts(opened, digest), of_bundle(opened))
