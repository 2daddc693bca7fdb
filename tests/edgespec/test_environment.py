"""Facts of a machine from a made-up /sys, and from one that hides everything."""

from __future__ import annotations

from pathlib import Path

from edgespec.environment import governor, load, packages, temperature_c


def test_facts_where_the_system_tells_them(tmp_path: Path) -> None:
    for number, (heat, name) in enumerate([("41000\n", "powersave\n"), ("52500\n", "performance\n")]):
        zone = tmp_path / "class/thermal" / f"thermal_zone{number}"
        core = tmp_path / "devices/system/cpu" / f"cpu{number}" / "cpufreq"
        for folder, file, text in ((zone, "temp", heat), (core, "scaling_governor", name)):
            folder.mkdir(parents=True)
            (folder / file).write_text(text)
    (tmp_path / "class/thermal/thermal_zone2").mkdir()
    (tmp_path / "class/thermal/thermal_zone2/temp").write_text("broken")
    assert temperature_c(tmp_path) == 52.5
    assert governor(tmp_path) == "performance, powersave"


def test_facts_that_are_hidden_are_none(tmp_path: Path) -> None:
    assert temperature_c(tmp_path) is None
    assert governor(tmp_path) == ""
    assert load() >= 0
    assert packages()["edgespec"] == "0.1.0"
