"""What a call moves and takes, against sums done by hand."""

from __future__ import annotations

import pytest

from edgespec.errors import InputError
from edgespec.latency import call_time, copy_time, sample_time
from edgespec.memory import memory
from edgespec.work import Work
from tests.helpers.latency import BLOCK, BUDGET, device, models

# The toy: per layer 128x64 + 64x64 + 192x64 + 64x96 weights, twice, and a head of 288x64.
LAYER = 128 * 64 + 64 * 64 + 192 * 64 + 64 * 96
OUTPUTS = 128 + 64 + 192 + 64
WEIGHTS = 2 * (LAYER + 2 * OUTPUTS) + 288 * 64 + 2 * 288  # w8: a byte each and a float16 an output
READ = WEIGHTS + 4 * 5 * 64 + 2 * 64  # five norms, and a row of the fp16 embedding
ROW = 2 * 2 * 2 * 16  # numbers of a cached row: K and V, layers, key-value heads, d
NUMBERS = 2 * (OUTPUTS + 64 + 64 + 64 + 96) + 288 + 64  # into and out of a row's products


def test_a_call_by_hand() -> None:
    work = models()["target"].call("decode", 1, BUDGET, 5, 2)
    assert work.bytes_weights == READ
    assert work.bytes_kv == (BUDGET + BLOCK) * ROW  # a static cache is read whole, 8 bits a number
    assert work.bytes_activations == 2 * NUMBERS
    attention = 4 * 2 * 4 * 16 * (BUDGET + BLOCK + 1)
    assert work.ops == 2 * (2 * LAYER + 288 * 64) + attention
    times = call_time(work, device())
    assert times.dispatch_s == 1e-3
    assert times.weights_s == pytest.approx(READ * 1e-9)
    assert times.kv_s == pytest.approx(work.bytes_kv * 2e-9)
    assert times.activations_s == pytest.approx(work.bytes_activations * 4e-9)
    assert times.compute_s == 0
    assert times.total_s == pytest.approx(1e-3 + (READ + 2 * 24 * ROW + 8 * NUMBERS) * 1e-9)


def test_a_prefill_computes_one_row_of_logits() -> None:
    work = models()["target"].call("prefill", BLOCK, BUDGET, 0, 2)
    rows = BLOCK * 2 * LAYER + 288 * 64
    assert work.ops == 2 * rows + 4 * 2 * 4 * 16 * BLOCK * (BUDGET + 2 * BLOCK)


def test_what_is_appended_is_read_as_far_as_it_is_filled() -> None:
    target = models(appends=True)["target"]
    assert target.call("decode", 1, BUDGET, 5, 2).bytes_kv == (5 + 1) * ROW
    assert target.call("verify", 4, BUDGET, 5, 2).bytes_kv == (5 + 4) * ROW
    whole = BUDGET + BLOCK + BLOCK - 1
    assert target.call("prefill", BLOCK, BUDGET, 10**6, 2).bytes_kv == whole * ROW


def test_arithmetic_counts_where_it_takes_longer() -> None:
    work = Work(1000, 0, 0, 0, 5e6, "int8")
    times = call_time(work, device(ops_int8_per_s=1e12))
    assert times.compute_s == pytest.approx(5e6 / 0.5e12 - 1000e-9)
    assert times.total_s == pytest.approx(1e-3 + 5e6 / 0.5e12)


def test_codes_that_meet_floats_are_slower() -> None:
    work = models("w4-fp16act")["target"].call("decode", 1, BUDGET, 0, 2)
    codes = (2 * LAYER) // 2 + 288 * 64
    assert work.bytes_widened == codes
    assert call_time(work, device()).weights_s == pytest.approx(
        (work.bytes_weights - codes + 4 * codes) * 1e-9
    )


def test_an_arithmetic_without_a_rate_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        call_time(Work(1, 0, 0, 0, 1, "int16"), device(ops_int16_per_s=None))
    assert caught.value.message == "no rate of toy is known for int16 arithmetic (known: int8, float)"


def test_the_hosts_share() -> None:
    target = models()["target"]
    assert copy_time(3, target, device()).host_s == pytest.approx(3 * ROW * 1e-9)
    assert sample_time(4, target, device(), 0.0).host_s == 1e-4
    assert sample_time(4, target, device(), 1.0).host_s == pytest.approx(1e-4 + 4 * 4 * 288 * 1e-9)


def test_a_commit_reads_and_gives_a_layers_rows_or_reads_their_codes() -> None:
    work = models("w4-fp16act")["target"].policy_call("commit", BUDGET, 2)
    assert work.dispatches == 2
    assert work.bytes_kv == 2 * 2 * (2 * 2 * 16 * (BUDGET + BLOCK) + 2 * 2 * 16 * BUDGET)
    coded = models("w4a16")["target"].policy_call("commit", BUDGET, 2)
    assert coded.bytes_kv == 2 * (2 * 2 * 16 * (BUDGET + BLOCK) + 2 * 2 * BUDGET)  # a byte, places as a float


def test_memory_at_the_peak() -> None:
    held = memory(models(draft=False), device(bytes_memory=1e5, bytes_context=3e4))
    table = 288 * 64 * 2  # the embedding is fp16 beside an 8-bit head
    assert held.bytes_weights == WEIGHTS + table
    assert held.bytes_caches == (BUDGET + BLOCK) * ROW
    assert held.bytes_spare == held.bytes_caches / 2
    assert held.bytes_peak == sum(
        (held.bytes_weights, held.bytes_caches, held.bytes_spare, held.bytes_policy, held.bytes_activations)
    )
    assert held.fits is (held.bytes_peak <= 1e5)
    assert held.contexts == -(-held.bytes_weights // 3e4)
    unknown = memory(models(), device())
    assert unknown.fits is None and unknown.contexts is None


def test_a_graph_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="the target has no verify graph of width 9"):
        models()["target"].call("verify", 9, BUDGET, 0, 2)
