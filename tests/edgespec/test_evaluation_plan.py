"""Which cells an evaluation has, and every refusal: what was named and cannot be, and what is left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edgespec.config_evaluation import EvalConfig
from edgespec.errors import InputError
from edgespec.evaluation_plan import Cell, Plan, plan, policies_of, queries
from edgespec.flags import from_values
from edgespec.policy import NAMES
from edgespec.spec import CacheSpec, ModelEntry
from tests.helpers.bundles import model_entry


def entry(budget: int = 1024, block: int = 128, positions: int = 8192, **more: Any) -> ModelEntry:
    what = model_entry("target")
    cache = CacheSpec("append", budget, block, "keydiff", 4, 32, more.pop("buckets", (budget,)), block)
    return dataclasses.replace(
        what, cache=cache, spec=dataclasses.replace(what.spec, positions=positions), **more
    )


def config(**more: Any) -> EvalConfig:
    return from_values(EvalConfig, {"bundle": "b", "output": "out", **more})


def planned(what: ModelEntry | None = None, **more: Any) -> Plan:
    return plan(what or entry(), config(**more))


def test_defaults() -> None:
    found = planned(entry(2048))
    assert found.lengths == (1024, 2048)
    assert {"sinks", "keydiff"} <= set(found.policies) and "none" not in found.policies
    assert found.rows == {
        (1024, 25): 256, (1024, 50): 512, (1024, 75): 768,
        (2048, 25): 512, (2048, 50): 1024, (2048, 75): 1536,
    }  # fmt: skip
    assert (found.sinks, found.recent, found.seeds) == (4, 32, 3)
    assert planned().lengths == (1024,)
    assert planned(entry(512)).lengths == (640,)
    assert planned(entry(4096, positions=1500)).lengths == (1024,)
    cells = found.cells("needle", 1024, 1)
    assert cells[0] == Cell("needle", 1024, 1, "none", 100)
    assert len(cells) == len(set(cells)) == 1 + 3 * len(found.policies)


def test_caches_keep_the_bundles_buffers() -> None:
    what = entry(2048, buckets=(512, 1024, 2048))
    found = planned(what, sinks=2, recent=16)
    for length, bucket in ((1024, 1024), (2048, 2048)):
        whole = found.cache(what, Cell("text", length, 0, "none", 100))
        assert (whole.policy, whole.budget, whole.buckets) == ("none", bucket, (bucket,))
        part = found.cache(what, Cell("text", length, 0, "sinks", 25))
        assert (part.policy, part.budget, part.buckets) == ("sinks", length // 4, (bucket,))
        assert (part.sinks, part.recent, part.rows(bucket)) == (2, 16, what.cache.rows(bucket))


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"lengths": (1000,)},
        "length 1000 is not a multiple of the bundle's block 128",
        "use --lengths 1024",
    ),
    (
        {"lengths": (4096,)},
        "length 4096 is more than the 1152 tokens that the bundle holds without eviction",
        "use --lengths 1152, or export with --budget 3968 or more",
    ),
    (
        {"lengths": (512,), "budgets": (50, 75)},
        "budget 75 % of length 512 leaves nothing to evict: 384 rows + a block of 128 hold it all",
        "use larger --lengths, smaller --budgets, or a bundle exported with a smaller --block",
    ),
    (
        {"budgets": (5,)},
        "budget 5 % of length 1024 is less than half a block of 128 rows",
        "use larger --lengths or --budgets",
    ),
    (
        {"budgets": (25,), "sinks": 200, "recent": 100},
        "sinks + recent protect 300 rows, more than the 256 that budget 25 % of length 1024 keeps",
        "protect fewer rows with --sinks and --recent, or use larger --budgets or --lengths",
    ),
    (
        {"sinks": 1000, "recent": 10},
        "no budget can be evaluated: sinks + recent protect 1010 rows, more than the 768 that budget 75 % of "
        "length 1024 keeps",
        "export with a smaller --block or a larger --budget",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message", "hint"), REFUSED, ids=[str(r[0]) for r in REFUSED])
def test_refusals(given: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        planned(**given)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_default_budgets_that_cannot_be_are_left_out_and_said() -> None:
    found = planned(lengths=(512,))
    assert found.rows == {(512, 25): 128, (512, 50): 256}
    assert [note.split(":")[0] for note in found.left_out][-1] == (
        "budget 75 % of length 512 leaves nothing to evict"
    )


def test_policies_without_their_queries() -> None:
    """A bundle that stores no queries runs what needs none; a policy that was named is refused."""
    notes: list[str] = []
    without = entry().cache
    assert policies_of(without, (), notes) == ("sinks", "keydiff")
    why = "policy snapkv needs 32 stored queries of each block, and the bundle has 0"
    assert f"{why}; export the bundle with --policy h2o, which stores all" in notes
    with pytest.raises(InputError) as caught:
        policies_of(without, ("sinks", "snapkv"), [])
    assert (caught.value.message, caught.value.hint) == (
        why, "export the bundle with --policy h2o, which stores all, or leave it out of --policies",
    )  # fmt: skip


def test_a_bundle_of_all_queries_runs_every_policy_and_one_of_a_window_keeps_it() -> None:
    whole = dataclasses.replace(entry().cache, policy="h2o", queries=128)
    assert policies_of(whole, (), []) == NAMES[1:]
    assert [queries(name, whole) for name in ("tova", "snapkv", "caote(h2o)")] == [1, 32, 128]
    some = dataclasses.replace(whole, policy="caote(snapkv)", queries=48)
    assert {"tova", "snapkv"} <= set(policies_of(some, (), [])) and "h2o" not in policies_of(some, (), [])
    assert queries("fastcaote(snapkv)", some) == 48


def test_compact_positions_need_the_angles_of_a_commit_graph() -> None:
    what = entry()
    compact = dataclasses.replace(what.cache, positions="compact")
    assert planned(dataclasses.replace(what, cache=compact)).policies
    with pytest.raises(InputError) as caught:
        planned(dataclasses.replace(what, cache=dataclasses.replace(compact, policy="none")))
    assert caught.value.message == (
        "commits at compact positions turn keys by angles of the bundle's own commit graph, and this "
        "one has none"
    )
    assert caught.value.hint == "export it with --policy keydiff, or without --positions"


def test_what_every_policy_has_to_beat_is_always_there() -> None:
    assert {"keydiff", "sinks"} <= set(planned(policies=("keydiff",)).policies) <= {"keydiff", "sinks", "lru"}


CONFIGS: list[tuple[dict[str, Any], str, str]] = [
    (
        {"policies": ("keydiff", "fly")},
        "unknown policy 'fly'",
        f"use one of: {', '.join(n for n in NAMES if n != 'none')}",
    ),
    ({"policies": ("caote(fly)",)}, "unknown policy 'caote(fly)'", "use one of: "),
    (
        {"policies": ("none",)},
        "policy 'none' is what the others are compared with, and always runs",
        "leave it out of --policies",
    ),
    ({"policies": ("sinks", "sinks")}, "policies names one twice", "name each once in --policies"),
    ({"tasks": ("needles",)}, "unknown task 'needles'", "use one of: text, needle, "),
    ({"budgets": (50, 25)}, "budgets 50,25 must ascend", "use --budgets 25,50"),
    ({"budgets": (100,)}, "budgets 100 is not 1 to 99", "use another --budgets"),
    ({"lengths": (0,)}, "lengths 0 is not 16 to 1048576", "use another --lengths"),
    ({"seeds": 0}, "seeds 0 is not 1 to 1000", "use another --seeds"),
    ({"sinks": -1}, "sinks -1 is not 0 to 1048576", "use another --sinks"),
    ({"text": "/nowhere.txt"}, "text '/nowhere.txt' is not a file", "give an existing file to --text"),
    ({"threads": 999}, "threads 999 is not 0 to 256", "use another --threads"),
    ({"output": "/nowhere/x"}, "/nowhere, where the results should go, is not a folder", "mkdir -p /nowhere"),
    ({"output": __file__}, f"{__file__} exists and is no folder", "choose another folder with -o"),
]


@pytest.mark.parametrize(("given", "message", "hint"), CONFIGS, ids=[str(r[0])[:40] for r in CONFIGS])
def test_config_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        config(**given).check()
    assert caught.value.message == message
    assert caught.value.hint.startswith(hint)
    assert list(tmp_path.iterdir()) == []
