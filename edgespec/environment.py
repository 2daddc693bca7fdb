"""What can be read of this machine while it measures: load, temperature, governor, versions."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("edgespec", "onnxruntime", "onnx", "numpy", "tokenizers")
SYSTEM = Path("/sys")


def load() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]


def temperature_c(system: Path = SYSTEM) -> float | None:
    """The hottest thermal zone in degrees Celsius; None where no zone can be read."""
    found = []
    for zone in system.glob("class/thermal/thermal_zone*/temp"):
        with suppress(OSError, ValueError):
            found.append(int(zone.read_text()) / 1000)
    return max(found, default=None)


def governor(system: Path = SYSTEM) -> str:
    """The cores' frequency governors, such as `performance`; empty where they cannot be read."""
    found = set()
    for core in system.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"):
        with suppress(OSError):
            found.add(core.read_text().strip())
    return ", ".join(sorted(found))


def system() -> str:
    """The operating system, its release and the machine type."""
    return (
        f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    )


def packages() -> dict[str, str]:
    """The versions of what computes and counts; a package that is not there is left out."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
