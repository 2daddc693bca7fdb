"""The page and the terminal's table of a report: the same cells, nothing from outside, whole in a browser."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from edgespec import bench_plots
from edgespec.bench_page import page
from edgespec.bench_report import SPECULATIVE
from edgespec.bench_table import GRIDS, by_category, devices, drafting, facts, remarks, to_table
from tests.helpers import browser
from tests.helpers.reports import report

WHOLE = report(6, 2, noise=0.05)
TITLES = [title for title, _ in bench_plots.PLOTS]


def test_the_tables_by_hand() -> None:
    exact = report(3)
    head, writing, *_, everything = by_category(exact)
    assert head[:4] == ["category", "prompts", "plain tok/s", "speculative tok/s"]
    assert writing == [
        "writing", "1", "20.0 [20.0, 20.0] (20.0..20.0) n=1", "40.0 [40.0, 40.0] (40.0..40.0) n=1",
        "2.00 [2.00, 2.00] (2.00..2.00) n=1", "1.83 [1.83, 1.83] (1.83..1.83) n=1",
        "100 [100, 100] (100..100) n=2",
    ]  # fmt: skip
    assert everything[:2] == ["all", "3"]
    # 20 tokens in 10 verify calls; one draft call each; 2 / (1 + 0.25); 30 / 90 operations a row make
    # 2 / (1 + 1/3); 7 of 10 and 2 of 8 accepted.
    assert drafting(exact)[-1] == [
        "all", "2.00", "2.00 [2.00, 2.00] (2.00..2.00) n=3", "1.00", "0.250", "1.60", "0.333", "1.50",
        "70%", "25%",
    ]  # fmt: skip
    assert devices(exact)[1] == [
        "phone-a", "30.00", "20.00", "1.50", "200.0", "476.8", "yes", "-", "this profile",
    ]  # fmt: skip


def test_the_facts_of_a_measurement_are_told() -> None:
    told = dict(facts(WHOLE))
    assert told["load"] == "0.3 at the start, 0.5..0.5 while measuring"
    assert told["temperature"] == "45..45 degrees C" and told["governor"] == "performance"
    assert told["rounds"] == "2; 2 processes, each after 1 warm-up prompt"
    assert told["peak memory"].startswith("300 [300, 300] (300..300) n=2 MiB")
    hidden = replace(WHOLE.environment, governor="")
    samples = tuple(replace(s, temperature_c=None, load=2.5) for s in WHOLE.samples)
    quiet = replace(WHOLE, environment=hidden, samples=samples)
    assert dict(facts(quiet))["governor"] == dict(facts(quiet))["temperature"] == "not readable"
    assert remarks(quiet) == [
        "predictions for npu devices are of this bundle's graphs, made for cpu",
        "the machine was busy (load 2.5 on 2 cores): close other programs",
    ]


def test_a_changed_text_is_the_first_remark() -> None:
    samples = tuple(replace(s, text_sha256="x") if s.way == SPECULATIVE else s for s in WHOLE.samples)
    first = remarks(replace(WHOLE, samples=samples, left_out=("qa/9 is left out: too long",)))[:2]
    assert first[0].startswith("TEXTS DIFFER from plain decoding in 6 prompts: writing/1, math/1, qa/1")
    assert first[1] == "qa/9 is left out: too long"


def test_page_and_table_show_the_same_cells() -> None:
    text, html = to_table(WHOLE), page(WHOLE)
    for title, grid in GRIDS:
        assert title in text and title in html
        for cell in (cell for line in grid(WHOLE) for cell in line):
            assert cell in text and f">{cell}<" in html


def test_the_page_needs_nothing_from_outside() -> None:
    html = page(WHOLE)
    assert page(WHOLE) == html
    assert "<script" not in html and "<link" not in html and "@import" not in html
    addresses = set(re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', html))
    assert addresses and all(a.startswith("#") for a in addresses)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert {a[1:] for a in addresses} <= set(ids)


def test_every_plot_is_drawn_with_its_figures() -> None:
    drawn = dict(bench_plots.plots(WHOLE))
    assert list(drawn) == TITLES
    for svg in drawn.values():
        ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert "phone-b" in drawn["Devices compared"] and "roleplay" not in drawn["Block efficiency"]
    assert "place in the draft" in drawn["Acceptance by position"]
    assert "outside the graphs" in drawn["Latency breakdown"]
    alone = replace(WHOLE, predicted=())
    assert [title for title, _ in bench_plots.plots(alone)] == TITLES[:-1]


def test_without_matplotlib_the_tables_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    html = page(WHOLE)
    assert "No plots: matplotlib is not installed; pip install" in html and "phone-a" in html


def test_names_are_escaped() -> None:
    html = page(replace(WHOLE, bundle=replace(WHOLE.bundle, name="<b>&x")))
    assert "<b>" not in html and "&lt;b&gt;&amp;x" in html


def test_a_real_browser_lays_it_all_out(tmp_path: Path) -> None:
    program = browser.find()
    if program is None:
        pytest.skip("no headless browser here (Debian: apt-get install chromium)")
    found = browser.seen(program, page(WHOLE), tmp_path)
    assert found["titles"] == ["What was measured", *(title for title, _ in GRIDS), *TITLES]
    assert found["loaded"] == [] and found["errors"] == []
    assert len(found["tables"]) == 1 + len(GRIDS) and len(found["plots"]) == len(TITLES)
    assert all(width > 300 and height > 40 for width, height in found["tables"])
    assert all(300 < width <= 1200 and 80 < height < 900 for width, height in found["plots"])
    assert {"phone-a", "phone-b", "writing", "target verify"} <= {t.strip() for t in found["texts"]}
    assert found["bars"] > 40
    assert found["wide"] <= 0  # nothing stands out to the right
