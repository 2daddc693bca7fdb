"""Which rows a commit keeps: the graph, its code run eagerly and KeyDiff written a second time agree."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from edgespec.errors import BundleError
from edgespec.exporters.commit import Turn, exported, keep, policy_graph, without_worst, write_policy
from edgespec.exporters.scores import SCORES, Layer
from edgespec.profiles import operators
from edgespec.spec import CacheSpec, ModelSpec, TensorSpec
from tests.helpers.oracle import keydiff_scores, survivors

torch.set_num_threads(1)
KV, DIM = 3, 16
SPEC = ModelSpec("tiny", 2, 48, 6, KV, DIM, 288, 512, False, (0, 0))
# budget, block, sinks, recent
SHAPES = [(32, 8, 2, 4), (24, 24, 0, 0), (16, 4, 0, 16), (16, 4, 10, 6), (40, 8, 4, 0), (8, 2, 0, 3)]


def cache(policy: str, contract: str, budget: int, block: int, sinks: int, recent: int) -> CacheSpec:
    return CacheSpec(contract, budget, block, policy, sinks, recent, (budget,), block)


def random_keys(rows: int, seed: int = 0) -> torch.Tensor:
    """Keys [KV,rows,d] that share a direction and differ in length, as trained models' keys do."""
    noise = np.random.default_rng(seed)
    keys = noise.normal(0, 1, (KV, rows, DIM)) + noise.normal(0, 1, (KV, 1, DIM))
    return torch.from_numpy((keys * noise.lognormal(0, 1, (KV, rows, 1))).astype(np.float32))


def eager(keys: torch.Tensor, what: CacheSpec) -> torch.Tensor:
    """The same rule run on tensors: keep [KV,N]."""
    return keep(Layer(keys, what.slots), what)


class Graph:
    """A commit graph on ONNX Runtime over one layer's filled rows; what lies beyond them is garbage."""

    def __init__(self, what: CacheSpec, folder: Path) -> None:
        model, self.spec = policy_graph("commit", SPEC, what, "commit.onnx")
        ir.save(model, folder / "commit.onnx")
        self.path, self.what = folder / "commit.onnx", what
        self.session = ort.InferenceSession(self.path, providers=["CPUExecutionProvider"])

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> list[np.ndarray]:
        feeds = {}
        for name, rows in (("keys", keys), ("values", values)):
            buffer = np.full((1, KV, self.what.rows(self.what.budget), DIM), np.nan, np.float32)
            buffer[0, :, : self.what.slots] = rows.numpy()
            feeds[name] = buffer
        return self.session.run(None, {t.name: feeds[t.name] for t in self.spec.inputs})


CASES = [("append", "keydiff", sizes) for sizes in SHAPES]
CASES += [
    (c, p, sizes)
    for c, p in (("rows", "keydiff"), ("append", "sinks"), ("rows", "sinks"))
    for sizes in SHAPES[:3]
]


@pytest.fixture(scope="module", params=CASES, ids=lambda v: "{}-{}-{}+{}-{}-{}".format(*v[:2], *v[2]))
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    contract, policy, sizes = request.param
    return Graph(cache(policy, contract, *sizes), tmp_path_factory.mktemp("commit"))


def wanted(what: CacheSpec, keys: torch.Tensor) -> tuple[list[list[int]], float]:
    """The kept places of every head from the oracle's rule, and its narrowest margin."""
    scores = (
        keydiff_scores(keys).tolist() if what.policy == "keydiff" else [list(range(what.slots))] * len(keys)
    )
    chosen = [survivors(row, what.budget, what.sinks, what.recent) for row in scores]
    return [places for places, _ in chosen], min(gap for _, gap in chosen)


def test_graph_and_eager_code_keep_what_the_equation_keeps(graph: Graph) -> None:
    what, decided = graph.what, 0
    for seed in range(8):
        keys, values = random_keys(what.slots, seed), random_keys(what.slots, seed + 100)
        places, margin = wanted(what, keys)
        if margin < 1e-5:  # nearer than fp32 can tell
            continue
        decided += 1
        kept, *rows = graph(keys, values)
        assert kept.dtype == np.int32 and kept.tolist() == places
        assert eager(keys, what).tolist() == places
        for part, got in zip((keys, values), rows, strict=what.contract == "rows"):
            assert np.array_equal(got[0], np.stack([part[h, places[h]].numpy() for h in range(KV)]))
    assert decided >= 5


@pytest.mark.parametrize("contract", ["append", "rows"])
def test_a_budget_below_the_largest_bucket_reads_its_buffers(contract: str, tmp_path: Path) -> None:
    """A bundle's step graphs serve smaller budgets: it takes their buffers and reads the first M rows."""
    small = cache("keydiff", contract, 16, 8, 2, 4)
    large = dataclasses.replace(small, buckets=(64,))
    keys, values = random_keys(small.slots), random_keys(small.slots, 1)
    wanted = Graph(small, tmp_path)(keys, values)
    (spec,) = write_policy(tmp_path / "large", SPEC, large)
    assert spec.file == str(tmp_path / "large-commit.onnx")
    assert {t.shape[2] for t in spec.inputs} == {large.rows(64)}
    feeds = {}
    for name, rows in (("keys", keys), ("values", values)):
        feeds[name] = np.full((1, KV, large.rows(64), DIM), np.nan, np.float32)
        feeds[name][0, :, : small.slots] = rows.numpy()
    session = ort.InferenceSession(spec.file, providers=["CPUExecutionProvider"])
    got = session.run(None, {t.name: feeds[t.name] for t in spec.inputs})
    assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_each_head_keeps_its_own_and_eviction_is_a_choice(graph: Graph) -> None:
    what = graph.what
    kept = graph(random_keys(what.slots), random_keys(what.slots))[0]
    free = what.budget - what.sinks - what.recent
    heads = {tuple(row) for row in kept.tolist()}
    assert len(heads) == (KV if what.policy == "keydiff" and free else 1)
    first, last = set(range(what.sinks)), set(range(what.slots - what.recent, what.slots))
    for row in kept.tolist():
        assert row == sorted(set(row)) and len(row) == what.budget
        assert first | last <= set(row) <= set(range(what.slots))
    if what.policy == "sinks":
        newest = range(what.slots - what.budget + what.sinks, what.slots)
        assert kept[0].tolist() == [*range(what.sinks), *newest]


def test_ties_keep_a_best_set_the_same_at_every_run(graph: Graph) -> None:
    """Equal rows have equal scores: any of them may stay, but each place once and never a worse row."""
    what = graph.what
    few = random_keys(5, 3)
    keys = few[:, torch.arange(what.slots) % 5]
    kept = graph(keys, keys)[0]
    assert np.array_equal(kept, graph(keys, keys)[0])
    places, _ = wanted(what, keys)
    scores = keydiff_scores(keys) if what.policy == "keydiff" else torch.arange(what.slots).expand(KV, -1)
    for chosen in (kept.tolist(), eager(keys, what).tolist()):
        for head, row in enumerate(chosen):
            assert row == sorted(set(row)) and len(row) == what.budget
            got, best = (sorted(scores[head, p].tolist()) for p in (row, places[head]))
            np.testing.assert_allclose(got, best, atol=1e-6)


class WithoutWorst(torch.nn.Module):
    """What a CPU's commit does with scores [KV,M]: the places of all but the 8 worst."""

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return without_worst(scores, 8)


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
def test_of_equal_scores_the_older_stay(levels: int, tmp_path: Path) -> None:
    """As a sort of all by score, then by age, would have it: also where all are equal."""
    given, made = (TensorSpec("scores", "float32", (KV, 40)),), (TensorSpec("keep", "int32", (KV, 32)),)
    ir.save(exported(WithoutWorst(), given, made), tmp_path / "graph.onnx")
    session = ort.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    for seed in range(20):
        scores = np.random.default_rng(seed).integers(0, levels, (KV, 40)).astype(np.float32)
        want = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :32])
        assert session.run(None, {"scores": scores})[0].tolist() == want.tolist()


def test_all_rows_equal_or_zero_give_no_nonsense(graph: Graph) -> None:
    """Bug: the optimizer dropped `+ 1e-12`; zero keys then scored NaN, and protected rows were lost."""
    what = graph.what
    for keys in (torch.zeros(KV, what.slots, DIM), torch.ones(KV, what.slots, DIM) * 1e-8):
        for row in graph(keys, keys)[0].tolist():
            assert row == sorted(set(row)) and len(row) == what.budget
            assert set(range(what.sinks)) <= set(row) >= set(range(what.slots - what.recent, what.slots))


def test_the_graph_is_small_fixed_and_of_standard_operators(graph: Graph) -> None:
    model = onnx.load(graph.path)
    onnx.checker.check_model(model, full_check=True)
    device = "cpu" if graph.what.contract == "append" else "npu"
    assert {(node.domain, node.op_type) for node in model.graph.node} <= operators(device)
    assert graph.path.stat().st_size < 8_000
    assert b".py" not in graph.path.read_bytes()  # no stack trace, no path of the machine that exported
    for given, named in ((model.graph.input, graph.spec.inputs), (model.graph.output, graph.spec.outputs)):
        shapes = [(v.name, tuple(d.dim_value for d in v.type.tensor_type.shape.dim)) for v in given]
        assert shapes == [(t.name, t.shape) for t in named]


def test_the_anchor_is_the_mean_of_directions_not_of_keys() -> None:
    """Equation 6: a key a thousand times longer than the others must not pull the anchor to itself."""
    noise = np.random.default_rng(0)
    keys = torch.from_numpy(noise.normal(0, 0.3, (1, 20, DIM)).astype(np.float32))
    keys[..., 0] += 1  # the common direction
    keys[0, 7] = 0
    keys[0, 7, 1] = 1000.0  # unlike all others, and very long: the mean of raw keys would point at it
    kept = eager(keys, CacheSpec("append", 4, 16, "keydiff", 0, 0, (4,), 4))[0].tolist()
    assert 7 in kept
    raw = keys.mean(1, keepdim=True)
    worst = torch.nn.functional.cosine_similarity(keys, raw, dim=-1)[0].argmax()
    assert int(worst) == 7  # so the other reading would drop it first


def test_the_long_keys_of_real_models_are_ranked_in_fp16() -> None:
    """A key of length 300 squares to 90,000, past fp16's range."""
    keys = torch.nn.functional.normalize(random_keys(24), dim=-1) * 300
    half = SCORES["keydiff"](Layer(keys.half(), 24, half=True)).float()
    assert torch.allclose(half, SCORES["keydiff"](Layer(keys, 24)), atol=5e-3)


def test_scores_do_not_depend_on_the_length_of_keys() -> None:
    keys = random_keys(24)
    what = CacheSpec("append", 16, 8, "keydiff", 0, 0, (16,), 8)
    lengths = torch.rand(KV, 24, 1, generator=torch.Generator().manual_seed(0)) * 10 + 0.1
    assert wanted(what, keys)[1] > 1e-5
    assert torch.equal(eager(keys, what), eager(keys * lengths, what))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("contract", ["append", "rows"])
def test_another_policys_graph_turns_by_the_angles_of_a_bundles(
    contract: str, interleaved: bool, tmp_path: Path
) -> None:
    noise = torch.Generator().manual_seed(0)
    tables = [torch.randn(64, DIM // 2, generator=noise) for _ in range(2)]
    turn = Turn.of(*tables, 8, interleaved)
    first = dataclasses.replace(cache("keydiff", contract, 16, 8, 2, 4), positions="compact")
    model, _ = policy_graph("commit", SPEC, first, "commit.onnx", turn=turn)
    ir.save(model, tmp_path / "commit.onnx")
    found = Turn.stored(tmp_path / "commit.onnx")
    assert torch.equal(found.cos, turn.cos) and torch.equal(found.sin, turn.sin)
    assert found.interleaved == interleaved
    (spec,) = write_policy(
        tmp_path / "x", SPEC, dataclasses.replace(first, policy="sinks"), tmp_path / "commit.onnx"
    )
    assert "kept_keys" in {t.name for t in spec.outputs}


def test_a_commit_graph_without_angles_is_refused(tmp_path: Path) -> None:
    what = cache("keydiff", "append", 16, 8, 2, 4)
    ir.save(policy_graph("commit", SPEC, what, "commit.onnx")[0], tmp_path / "commit.onnx")
    with pytest.raises(BundleError) as caught:
        Turn.stored(tmp_path / "commit.onnx")
    assert caught.value.message == "commit.onnx does not say by which angles it turns keys"
    assert caught.value.hint == "export the bundle again with this version of edgespec"
