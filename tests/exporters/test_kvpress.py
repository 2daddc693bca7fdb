"""KeyDiff against PyPI's kvpress 0.5.5: the same rows survive, head by head (golden files of
scripts/golden_kvpress).

Its BlockPress scores the keys of one full forward pass, ours those that a cache holds; fed kvpress's own
keys block by block, with sinks = recent = 0 and a whole number of blocks after the first N rows, both do the
same: the first N rows and a block are ranked, N stay, the next block follows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edgespec.exporters.commit import keep, policy_graph
from edgespec.exporters.scores import Layer
from edgespec.spec import CacheSpec, ModelSpec
from tests.helpers.oracle import keydiff_scores, survivors

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"
SMOLLM2, RANDOM = "smollm2", ("llama-mha", "mistral-gqa", "qwen2-gqa", "qwen3-mqa")
GRAPHS = [(model, "append") for model in (SMOLLM2, *RANDOM)] + [(SMOLLM2, "rows")]
Choose = Callable[[Tensor], Any]  # a cache's keys [KV,M,d] -> the slots that stay [KV,N]


class Case:
    """One model's keys [L,KV,T,d] and what kvpress keeps of them, [L,KV,N]."""

    def __init__(self, model: str) -> None:
        with np.load(GOLDEN / f"keydiff-{model}.npz", allow_pickle=False) as file:
            self.keys = torch.from_numpy(file["keys"].astype(np.float32))
            self.kept = file["kept"]
            self.budget, self.block = int(file["budget"]), int(file["block"])

    def cache(self, contract: str) -> CacheSpec:
        sizes = (self.budget, self.block)
        return CacheSpec(contract, *sizes, "keydiff", 0, 0, (self.budget,), self.block)

    def fed(self, choose: Choose, layer: int, block: int | None = None) -> np.ndarray:
        """The rows that survive when a layer's keys fill a cache that `choose` empties, [KV,N]."""
        keys, block = self.keys[layer], block or self.block
        heads, total, dim = keys.shape
        held = torch.arange(self.budget).expand(heads, -1)
        for begin in range(self.budget, total, block):
            fresh = torch.arange(begin, begin + block).expand(heads, -1)
            rows = torch.cat([held, fresh], 1)
            slots = choose(keys.gather(1, rows.unsqueeze(-1).expand(-1, -1, dim)))
            held = rows.gather(1, torch.as_tensor(slots).long())
        return held.numpy()

    def all_fed(self, choose: Choose, block: int | None = None) -> np.ndarray:
        return np.stack([self.fed(choose, layer, block) for layer in range(len(self.keys))])


@pytest.fixture(scope="module", params=(SMOLLM2, *RANDOM))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def exported(case: Case, contract: str, folder: Path) -> Choose:
    """The commit graph on ONNX Runtime; what its buffers hold past the filled rows is garbage."""
    _, heads, _, dim = case.keys.shape
    spec = ModelSpec("tiny", 1, heads * dim, heads, heads, dim, 288, 512, False, (0,))
    model, graph = policy_graph("commit", spec, case.cache(contract), "commit.onnx")
    ir.save(model, folder / "commit.onnx")
    session = ort.InferenceSession(folder / "commit.onnx", providers=["CPUExecutionProvider"])

    def choose(keys: Tensor) -> np.ndarray:
        buffer = np.full(graph.inputs[0].shape, np.nan, np.float32)
        buffer[0, :, : keys.shape[1]] = keys.numpy()
        slots, *moved = session.run(None, {tensor.name: buffer for tensor in graph.inputs})
        for rows in moved:
            assert np.array_equal(rows[0], np.take_along_axis(keys.numpy(), slots[..., None], 1))
        return slots

    return choose


def best(scores: Callable[[Tensor], Tensor], budget: int) -> Choose:
    """The slots of the N best scores."""
    return lambda keys: [survivors(row, budget, 0, 0)[0] for row in scores(keys).tolist()]


@pytest.mark.parametrize(("model", "contract"), GRAPHS)
def test_the_commit_graph_keeps_what_kvpress_keeps(model: str, contract: str, tmp_path: Path) -> None:
    case = Case(model)
    assert np.array_equal(case.all_fed(exported(case, contract, tmp_path)), case.kept)


def test_the_eager_commit_and_the_oracle_keep_what_kvpress_keeps(case: Case) -> None:
    what = case.cache("append")
    assert np.array_equal(case.all_fed(lambda keys: keep(Layer(keys, what.slots), what)), case.kept)
    assert np.array_equal(case.all_fed(best(keydiff_scores, case.budget)), case.kept)


def test_the_cases_are_real_choices_that_rounding_cannot_change(case: Case) -> None:
    """Several layers, commits and heads that differ, old and new rows on both sides, no near tie."""
    layers, heads, total, _ = case.keys.shape
    assert layers >= 2 and (total - case.budget) % case.block == 0 and total >= case.budget + 3 * case.block
    assert case.kept.shape == (layers, heads, case.budget)
    sets = {tuple(row) for row in case.kept.reshape(-1, case.budget).tolist()}
    assert len(sets) == layers * heads
    for row in sets:
        assert list(row) == sorted(set(row)) and row[-1] < total
        assert row[0] < case.budget and row[-1] >= total - case.block
        assert set(row) != set(range(case.budget)) and set(row) != set(range(total - case.budget, total))
    gaps: list[float] = []

    def watched(keys: Tensor) -> list[list[int]]:
        chosen = [survivors(row, case.budget, 0, 0) for row in keydiff_scores(keys).tolist()]
        gaps.extend(gap for _, gap in chosen)
        return [places for places, _ in chosen]

    case.all_fed(watched)
    assert min(gaps) > 1e-6  # fp32 errs by a tenth of it


def raw_mean(keys: Tensor) -> Tensor:
    """KeyDiff misread: the anchor is the mean of the keys as they are."""
    keys = keys.double()
    return -F.cosine_similarity(keys, keys.mean(1, keepdim=True), dim=-1)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda keys: -keydiff_scores(keys),
    "not a cosine": lambda keys: -(keys.double() * F.normalize(keys.double(), dim=-1).mean(1, True)).sum(-1),
    "anchor of raw keys": raw_mean,
    "anchor over all heads": lambda keys: (
        -F.cosine_similarity(keys, F.normalize(keys, dim=-1).mean((0, 1), keepdim=True), dim=-1)
    ),
    "newest": lambda keys: torch.arange(keys.shape[1]).expand(keys.shape[0], -1),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_score_keeps_other_rows(how: str) -> None:
    """So that the tests above can fail: SmolLM2's keys differ in length and its heads in direction."""
    case = Case(SMOLLM2)
    got = case.all_fed(best(WRONG[how], case.budget))
    assert (np.sort(got) != case.kept).any((1, 2)).all(), "some layer does not notice"


def test_the_block_matters() -> None:
    """Dropping row by row, or all at once, keeps other rows than kvpress's blocks in every layer."""
    case = Case(SMOLLM2)
    one_shot = case.keys.shape[2] - case.budget
    for block in (1, one_shot):
        got = case.all_fed(best(keydiff_scores, case.budget), block)
        assert (np.sort(got) != case.kept).any((1, 2)).all(), f"a block of {block} is not noticed"
