"""The machine that a bundle runs on: its processor, its table of call costs, and an NPU's provider."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from pathlib import Path

from edgespec.errors import BackendError
from edgespec.runtime.build import package
from edgespec.soc import SOCS


def table_of(bundle: Path) -> Path:
    """Where `edgespec tune` keeps a bundle's table of call costs: beside it."""
    return Path(os.path.abspath(bundle) + ".tune.json")


def on_npu(soc: str) -> list[str]:
    """The runtime's flags for a Qualcomm SoC; BackendError where its provider is not installed."""
    if (folder := package("onnxruntime_qnn")) is None:
        raise BackendError("Qualcomm's compiler is not installed", "pip install 'edgespec[qnn]'")
    chip = SOCS[soc]
    return ["--qnn", str(folder), "--htp-arch", str(chip.htp_arch), "--soc-model", str(chip.soc_model)]


def is_of(table: Path, processor: str) -> bool:
    """Was a table measured on this processor? One that cannot be read is left to the runtime's complaint."""
    try:
        data = json.loads(table.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return not isinstance(data, dict) or data.get("cpu", processor) == processor


def cpu() -> str:
    """What this machine's processor calls itself: a table of call costs is of one machine."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
