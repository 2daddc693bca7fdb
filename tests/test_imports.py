"""Imports point one way, and the core needs no torch."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "onnxruntime", "onnxscript", "safetensors", "gguf", "optimum"}
# What each module of edgespec/ may import from edgespec at its top; commands import more inside functions.
TABLE = {
    "__init__": set(),
    "__main__": {"cli"},
    "errors": set(),
    "files": set(),
    "rendering": set(),
    "parts": set(),
    "spec": {"parts"},
    "plain": {"errors"},
    "trace": {"errors", "spec"},
    "policy": {"errors", "spec"},
    "bundle_files": {"errors", "spec"},
    "soc": set(),
    "bundle_rules": {"errors", "spec", "policy", "parts", "soc"},
    "bundle": {"errors", "plain", "spec", "bundle_files", "bundle_rules"},
    "task_words": set(),
    "flags": {"errors"},
    "config": {"errors", "flags", "spec", "policy", "bundle", "parts", "soc", "config_vision"},
    "config_device": {"config", "flags"},
    "config_answering": {"config", "errors", "flags", "soc"},
    "prompts": {"errors"},
    "material": {"errors", "bundle"},
    "tasks": {"errors", "material", "task_words"},
    "evaluation_plan": {"errors", "spec", "policy", "config", "config_evaluation", "task_words"},
    "evaluation_log": {"errors", "evaluation_plan"},
    "evaluation_result": {"spec", "evaluation_plan", "evaluation_log"},
    "evaluation": {
        "errors",
        "spec",
        "bundle",
        "bundle_files",
        "config_evaluation",
        "material",
        "tasks",
        "policy",
    }
    | {"evaluation_plan", "evaluation_log", "evaluation_result"},
    "evaluation_report": {"errors", "evaluation_result"} | {"rendering"},
    "evaluation_plots": {"evaluation_result"},
    "progress": set(),
    "pte": {"errors"},
    "count": {"errors", "spec", "policy", "bundle", "profiles", "pte"},
    "shape": {"errors"},
    "work": {"errors", "spec", "bundle", "count", "shape"},
    "latency": {"errors", "profiles", "work"},
    "memory": {"profiles", "work"},
    "estimate": {"errors", "profiles", "work", "latency", "memory", "spec"},
    "search": {"errors", "profiles", "shape", "work", "estimate"},
    "published": {"profiles", "shape", "work", "latency"},
    "fit": {"errors", "profiles", "work", "latency", "published"},
    "table": {"bundle", "profiles", "work", "latency"},
    "measure": {"bundle", "profiles", "progress", "work", "trace", "replay", "fit"},
    "validation": {"profiles", "shape", "work", "latency", "published", "fit", "replay", "measure"},
    "latency_report": {"estimate", "fit", "memory", "profiles", "replay", "search"} | {"rendering"},
    "config_latency": {"errors", "flags"},
    "replay": {"errors", "spec", "trace", "bundle", "profiles", "work", "latency", "memory"},
    "report": {"errors", "spec", "count", "latency"} | {"rendering"},
    "samples": set(),
    "environment": set(),
    "suite": {"prompts"},
    "bench_report": {"errors", "plain", "spec", "bundle"} | {"files"},
    "bench_figures": {"bench_report", "samples", "spec"},
    "bench_log": {"errors", "plain", "bench_report", "evaluation_log"},
    "bench": {"errors", "progress", "environment", "suite", "bench_report", "bench_log"},
    "bench_table": {"samples", "bench_report", "bench_figures"} | {"rendering"},
    "bench_plots": {"samples", "bench_report", "bench_figures"},
    "bench_page": {"bench_report", "bench_table", "bench_plots"} | {"rendering"},
    "predict": {"errors", "plain", "trace", "profiles", "work", "replay", "samples", "bench_report"},
    "baseline": {"bench_report", "predict", "profiles", "work"},
    "gate_facts": {"errors", "bench_report", "bench_figures"},
    "gate": {"samples", "bench_report", "bench_figures", "gate_facts"},
    "gate_report": {"gate"} | {"rendering"},
    "speculation": {"bench_figures", "bench_report", "bench_table"} | {"rendering"},
    "config_bench": {"errors", "flags", "config", "suite"},
    "config_evaluation": {"errors", "flags", "config", "policy", "task_words"},
    "commands_bench": {"errors", "config", "config_bench", "console", "progress"},
    "commands_speculation": {"commands_bench", "config_evaluation", "console", "errors", "progress"},
    "console": {"errors", "progress"},
    "vocabulary": {"errors", "plain"} | {"files"},
    "config_trim": {"errors", "flags", "config"},
    "trim_result": set(),
    "trim_report": {"errors", "trim_result"} | {"rendering"},
    "commands_trim": {"config_trim", "console", "progress"},
    "config_draft": {"errors", "flags"},
    "commands_draft": {"config_draft", "console", "progress"},
    "config_vision": {"errors", "flags", "soc"},
    "commands_vision": {"config_vision", "console", "progress"} | {"files", "rendering"},
    "config_recommend": {"config", "errors", "flags"},
    "commands_recommend": {"commands_bench", "config_recommend", "console", "errors", "progress"} | {"files"},
    "curves": {"errors", "rendering"},
    "commands_latency": {"errors", "config_latency", "console", "progress", "spec"} | {"flags"},
    "commands": {
        "flags",
        "errors",
        "config",
        "config_answering",
        "config_evaluation",
        "console",
        "progress",
        "commands_draft",
        "commands_trim",
        "config_device",
    }
    | {"commands_latency", "commands_bench", "commands_speculation", "commands_vision"}
    | {"commands_recommend", "commands_stream"}
    | {"files", "answering"},
    "answering": {"config_answering", "console", "progress"},
    "config_stream": {"errors", "flags", "config", "config_answering"},
    "commands_stream": {"answering", "commands_bench", "commands_latency", "config_stream", "console"}
    | {"progress"},
    "cli": {"errors", "flags", "commands", "console", "progress"},
}
# These see everything, inside functions.
AREAS = ("", "_draft", "_trim", "_latency", "_bench", "_speculation", "_vision", "_recommend", "_stream")
COMMANDS = (*(f"commands{area}" for area in AREAS), "console", "__main__")
# What a folder may import beside itself, at any depth.
FOLDERS = {
    "exporters": {
        "errors",
        "parts",
        "spec",
        "policy",
        "bundle",
        "config",
        "flags",
        "config_draft",
        "config_trim",
        "config_vision",
        "files",
        "soc",
    }
    | {"progress", "profiles", "prompts", "vocabulary", "trim_result"},
    "runtime": {"errors", "spec", "bundle", "trace", "build", "progress", "soc", "files"},
    "profiles": {"errors"},
}
# The same for the programs on top, below edgespec/workloads: a command hands them the runtime that they ask.
WORKLOADS = {
    "recommend": {"errors", "files", "progress", "rendering", "evaluation_log"}
    | {"suite", "bench_report", "bench_figures", "bench_table"},
    "stream": {"errors", "console", "bundle", "files", "rendering"}
    | {"trace", "work", "replay", "bench_report"},
}
FRONTS = {"optimum_command.py": {"cli"}}  # a second command line over the first


def imported(path: Path, top_only: bool) -> set[str]:
    """Full names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
            if node.module == "edgespec":
                names |= {f"edgespec.{alias.name}" for alias in node.names}
    return names - {"edgespec", "__future__"}


def ours(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("edgespec.")}


@pytest.mark.parametrize("path", sorted((ROOT / "edgespec").glob("*.py")), ids=lambda p: p.stem)
def test_core(path: Path) -> None:
    assert path.stem in TABLE, f"say in the table what {path.name} may import"
    assert ours(imported(path, top_only=True)) <= TABLE[path.stem]
    if path.stem not in COMMANDS:
        assert ours(imported(path, top_only=False)) <= TABLE[path.stem]
    assert not {name.split(".")[0] for name in imported(path, top_only=False)} & HEAVY


@pytest.mark.parametrize("path", sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.py")), ids=str)
def test_folders(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert ours(imported(path, top_only=False)) <= FOLDERS[folder] | {folder} | FRONTS.get(path.name, set())


@pytest.mark.parametrize("path", sorted((ROOT / "edgespec" / "workloads").rglob("*.py")), ids=str)
def test_workloads(path: Path) -> None:
    names = imported(path, top_only=False)
    name = path.relative_to(ROOT / "edgespec" / "workloads").parts[0].removesuffix(".py")
    assert ours(names) <= WORKLOADS.get(name, set()) | {"workloads"}
    others = {n for n in names if n.startswith("edgespec.workloads.") and n.split(".")[2] != name}
    assert not others, f"{name} knows {others}"
    assert not {name.split(".")[0] for name in names} & HEAVY


SCRIPTS = [
    p for p in sorted((ROOT / "scripts").iterdir()) if p.is_file() and b"python" in p.read_bytes()[:40]
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_import_what_there_is(path: Path) -> None:
    """Most run for minutes before they come to an import inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgespec"):
            for alias in node.names:
                assert has(node.module or "", alias.name), f"{node.module} has no {alias.name}"


def has(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name) or has(f"{module}.{name}", "__name__")
    except ModuleNotFoundError as error:
        if error.name and not error.name.startswith("edgespec"):
            pytest.skip(f"{error.name} is not installed")
        return False
