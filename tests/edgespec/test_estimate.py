"""Estimates against sums done by hand, and what a search keeps."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from edgespec.errors import BackendError, InputError
from edgespec.estimate import acceptance_of, block_efficiency, estimate
from edgespec.latency import call_time, copy_time
from edgespec.search import BUDGETS, Found, Question, coverage, on_ray, search, settings
from edgespec.table import predicted_table
from tests.helpers.bundles import make
from tests.helpers.latency import BLOCK, BUDGET, SHAPE, device, models


def test_a_plain_token_by_hand() -> None:
    profile, both = device(), models(draft=False)
    said = estimate(both, profile, "w8a16", context=10, prompt=12)
    target = both["target"]
    one = call_time(target.call("decode", 1, BUDGET, 10, 2), profile).total_s
    row = copy_time(1, target, profile).total_s
    assert said.tokens_per_s == pytest.approx(1 / (one + row + 1e-4)) == said.plain_tokens_per_s
    first = 2 * call_time(target.call("prefill", BLOCK, BUDGET, 0, 2), profile).total_s
    assert said.ttft_s == pytest.approx(first + 12 * row + 1e-4)
    assert said.bytes_moved == target.call("decode", 1, BUDGET, 10, 2).bytes_moved
    assert said.to_json()["ttft_ms"] == said.ttft_s * 1e3
    assert said.to_json()["memory_bytes"] == said.memory.bytes_peak
    assert sum(said.resources.values()) == pytest.approx(1 / said.tokens_per_s)
    assert said.energy_j_per_token is None


def test_a_round_by_hand() -> None:
    profile, both = device(energy_j_per_byte=1e-10), models()
    said = estimate(both, profile, "w8a16", context=10, prompt=8, width=4, be=2.2)
    target, draft = both["target"], both["draft"]
    verify = call_time(target.call("verify", 4, BUDGET, 10, 2), profile).total_s
    drafted = 3 * call_time(draft.call("draft", 2, BUDGET, 10, 2), profile).total_s
    rows = 2 * 2.2 * copy_time(1, target, profile).total_s
    assert said.tokens_per_s == pytest.approx(2.2 / (verify + drafted + rows + 1e-4))
    assert said.c == pytest.approx(1.0, rel=0.01)  # the same layers; two rows look up more than one
    assert said.mbsu == pytest.approx(2.2 / (1 + 3 * said.c))
    assert said.energy_j_per_token == pytest.approx(said.bytes_moved * 1e-10)
    assert said.memory.bytes_weights == target.bytes_weights + draft.bytes_weights


def test_past_the_cache_commits_are_paid_for() -> None:
    slots = BUDGET + BLOCK
    both = models(draft=False)
    full, over = (estimate(both, device(), "w8a16", n, n) for n in (slots, slots + 1))
    assert not [line for line in full.round_lines if "commit" in line.name]
    commit = next(line for line in over.round_lines if "commit" in line.name)
    assert commit.calls == 1 / BLOCK
    work = both["target"].policy_call("commit", BUDGET, 2)
    assert commit.time_s == pytest.approx(call_time(work, device()).total_s / BLOCK)
    # 25 tokens: 8 + 8 + 8, a commit to 16, and one more.
    assert {line.name: line.calls for line in over.prompt_lines}["prefill"] == 4
    assert {line.name: line.calls for line in over.prompt_lines}["commit of the target"] == 1


def test_block_efficiency_and_acceptance() -> None:
    assert block_efficiency(0.5, 4) == 1.875
    assert block_efficiency(0.0, 4) == 1 and block_efficiency(1.0, 4) == 4
    assert acceptance_of(1.875, 4) == pytest.approx(0.5)
    with pytest.raises(InputError, match="a block efficiency of 5 cannot be had at width 4"):
        acceptance_of(5, 4)


def test_no_graph_is_wide_enough() -> None:
    with pytest.raises(InputError, match=r"no verify graph holds 5 rows \(widths: 4\)"):
        estimate(models(), device(), "w8a16", 10, 8, width=5, be=2.0)


BIG = replace(SHAPE, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=512, vocab=60000)
QUESTION = Question(BIG, replace(BIG, layers=1), device(), 1024, 128, 0.8)


@pytest.fixture(scope="module")
def found() -> tuple[Found, ...]:
    return search(QUESTION)


def test_what_a_search_keeps_nothing_beats(found: tuple[Found, ...]) -> None:
    assert {f.setting.precision for f in found} == {"w4a16", "w8a16", "int4", "fp16"}
    for one in found:
        for other in found:
            same = (one.setting.precision, one.setting.budget) == (
                other.setting.precision,
                other.setting.budget,
            )
            if same and other is not one:
                assert other.tokens_per_s < one.tokens_per_s or other.bytes_memory > one.bytes_memory
        if one.best:
            beats = [
                f for f in found if f.bytes_memory < one.bytes_memory and f.tokens_per_s >= one.tokens_per_s
            ]
            assert not beats
    assert any(f.best for f in found)
    assert any(f.setting.width > 1 for f in found)


def test_a_search_asks_only_what_can_be_exported() -> None:
    for s in settings(QUESTION):
        assert s.block <= s.budget and s.width <= s.block
        assert s.draft_rows == 0 or (s.width > 1 and s.draft_rows < BIG.vocab)
    assert {s.budget for s in settings(QUESTION)} == {512, 1024 - 32}
    assert BUDGETS[0] == 512


def test_a_search_in_pieces_gives_the_same(found: tuple[Found, ...]) -> None:
    def elsewhere(work: object, batches: list[object]) -> list[object]:
        return [work(batch) for batch in batches]  # type: ignore[operator]

    assert search(QUESTION, elsewhere) == found  # type: ignore[arg-type]


def test_ray_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match="ray is not installed") as caught:
        search(QUESTION, on_ray)
    assert caught.value.hint == "pip install 'edgespec[ray]', or leave --ray out"


def test_coverage_rises_with_rows() -> None:
    shares = [coverage(rows, 60000) for rows in (1024, 2048, 4096, 10000, 32768, 50000, 60000)]
    assert shares == sorted(shares) and shares[-1] == 1.0 and shares[1] == 0.765
    assert coverage(0, 60000) == 1.0


def test_a_predicted_table_of_call_costs(tmp_path: object) -> None:
    bundle = make(tmp_path / "x.bundle")  # type: ignore[operator]
    both = models()
    table = predicted_table(bundle, both, device())
    target = both["target"]
    decode = call_time(target.call("decode", 1, BUDGET, BUDGET // 4, 2), device()).total_s
    assert table["name"] == "profile toy" and table["widths_agree"] is True
    assert table["verify"]["1"] == pytest.approx((decode + 1e-4) * 1e6)
    assert list(table["verify"]) == ["1", "4"] and 0 < table["draft"] < table["verify"]["4"]
