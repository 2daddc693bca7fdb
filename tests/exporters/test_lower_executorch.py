"""ExecuTorch programs of tiny models: the numbers are Transformers' own, every width gives the same bits, and
a call is one XNNPACK subgraph.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgespec.errors import BackendError, BundleError, InputError
from edgespec.exporters.gguf_weights import Grid
from edgespec.exporters.grids import nearest_grid
from edgespec.pte import DELEGATE_NAME, read_pte
from edgespec.runtime.engine import Engine
from edgespec.runtime.program import Program
from edgespec.spec import CacheSpec
from tests.helpers import tiny
from tests.helpers.absorb import absorbed_as_wanted
from tests.helpers.oracle import own_logits

pytest.importorskip("executorch", reason="ExecuTorch is not installed (EDGESPEC_EXECUTORCH=1 scripts/setup)")

from edgespec.exporters.lower_executorch import Lowering
from edgespec.exporters.widths import disagreements

CLOSE = 2e-5
QUICK = (
    "gemma2",
    "glm",
)  # windows, softcaps, tanh and its gelu; interleaved angles of a part, splits, biases
FAMILIES = [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in tiny.FAMILIES]
TOKENS = [int(i) for i in np.random.default_rng(0).integers(0, 288, 40)]
CALLS = [("prefill", 16, 16), ("verify", 4, 4), ("prefill", 16, 5), ("verify", 4, 3), ("decode", 1, 1)]
PLAIN = CacheSpec("rows", 64, 16, "none", 0, 0, (64,), 16)


def exported(family: str, folder: Path, cache: CacheSpec, **job: Any) -> Engine:
    source = tiny.checkpoint(folder / "source", tiny.model(family))
    return tiny.export_tiny(source, cache, folder / "made", (4,), form="executorch", **job)


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Engine]:
    return request.param, exported(request.param, tmp_path_factory.mktemp(request.param), PLAIN)


def test_logits_are_those_of_transformers(engine: tuple[str, Engine]) -> None:
    family, run = engine
    absorbed_as_wanted(run, own_logits(tiny.model(family), TOKENS).numpy(), TOKENS, CALLS, CLOSE)


def test_widths_give_the_same_bits(engine: tuple[str, Engine]) -> None:
    assert disagreements(engine[1], TOKENS) == []


def test_a_call_is_one_subgraph_and_weights_are_stored_once(engine: tuple[str, Engine]) -> None:
    family, run = engine
    methods = read_pte(run.folder / "target.pte")
    assert {graph.method for graph in run.entry.graphs} == set(methods)
    model = tiny.model(family)
    weights = [p for p in model.parameters() if p.dim() == 2]  # a tied one once
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    products = sum(p.numel() for p in weights) - (0 if head is table else table.numel())
    for method in methods.values():
        assert method.ops[DELEGATE_NAME] == 1
        assert products <= method.bytes_weights // 4 < products + 1024  # and rows of 1/n, for norms
    angles, small = 2 * 1024 * 8 * 4, 32768
    assert (run.folder / "target.ptd").stat().st_size < 4 * sum(p.numel() for p in weights) + angles + small


def test_int8_is_near_and_a_row_has_the_same_bits_at_every_width(tmp_path: Path) -> None:
    """Each row of an activation has its own range; a row of the table is zeros, and its scale is 1."""
    precision = dict.fromkeys(("linear", "head", "embedding"), "int8")
    run = exported("llama", tmp_path, PLAIN, precision=precision)
    assert disagreements(run, TOKENS) == []
    run.reset()
    run.prefill(TOKENS[:16])
    want = own_logits(tiny.model("llama"), TOKENS[:20]).numpy()[16:]
    logits = run.call("verify", TOKENS[16:20], 4)["logits"][0]
    assert np.abs(logits - want).max() < 0.1 * np.abs(want).max()
    assert (np.corrcoef(logits, want)[:4, 4:].diagonal() > 0.99).all()
    assert (run.folder / "target.ptd").stat().st_size < 200_000  # 320 KB in fp32, without the angles' 65
    methods = read_pte(
        run.folder / "target.pte"
    )  # Bug: a value of codes was read as another, and then not found
    linears = [m for m in tiny.model("llama").modules() if isinstance(m, torch.nn.Linear)]
    codes, scales = sum(m.weight.numel() for m in linears), 4 * sum(m.out_features for m in linears)
    assert codes + scales <= methods["verify_4_64"].bytes_weights < codes + scales + 2048  # and rows of 1/n


@pytest.mark.parametrize("own", [True, False], ids=["on a grid", "on none"])
def test_int4_multiplies_with_the_grids_own_values(own: bool, tmp_path: Path) -> None:
    """Against Transformers with the same weights on the same grid; only activations are rounded further."""
    model = copy.deepcopy(tiny.model("llama"))
    grids = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                grid = Grid(*nearest_grid(module.weight.numpy()))
                if own:  # not the grid that rounding the values again would choose
                    grid = Grid(grid.codes, grid.scale, grid.low - 0.3 * grid.scale)
                grids[f"{name}.weight"] = grid
                blocks = (
                    grid.codes.reshape(len(grid.codes), -1, 32) * grid.scale[..., None] + grid.low[..., None]
                )
                module.weight.copy_(torch.from_numpy(blocks.reshape(len(grid.codes), -1)))
    source = tiny.checkpoint(tmp_path / "source", model)
    precision = {"linear": "int4", "head": "fp32", "embedding": "fp32"}
    run = tiny.export_tiny(
        source,
        PLAIN,
        tmp_path / "made",
        (4,),
        "executorch",
        precision=precision,
        grids=grids if own else None,
    )
    assert disagreements(run, TOKENS) == []
    run.reset()
    run.prefill(TOKENS[:16])
    want = own_logits(model, TOKENS[:20]).numpy()[16:]
    logits = run.call("verify", TOKENS[16:20], 4)["logits"][0]
    assert np.abs(logits - want).max() < 0.1 * np.abs(want).max()
    assert (np.corrcoef(logits, want)[:4, 4:].diagonal() > 0.995).all()
    products = read_pte(run.folder / "target.pte")["verify_4_64"].bytes_weights
    plain = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    head = model.get_output_embeddings().weight.numel()
    small = (plain - head) * (0.5 + 2 / 32 + 1 / 32)  # codes, a scale and a number a block
    assert 4 * head + small <= products < 4 * head + 1.2 * small


def test_an_operator_that_is_not_lowered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Lowering, "lower_sigmoid")
    with pytest.raises(InputError) as caught:
        exported("llama", tmp_path, PLAIN)
    assert caught.value.message.startswith("llama: model.layers.0.mlp.act_fn")
    assert "needs the operator Sigmoid, which is not lowered to XNNPACK" in caught.value.message
    assert caught.value.hint == "use --format onnx, or choose another model"
    assert not list((tmp_path / "made").iterdir())


def test_a_damaged_program_is_refused(engine: tuple[str, Engine], tmp_path: Path) -> None:
    _, run = engine
    whole, weights = (run.folder / "target.pte").read_bytes(), run.folder / "target.ptd"
    file, graph = tmp_path / "target.pte", run.entry.graphs[0]
    for size in (0, 3, 12, 40, len(whole) // 3):
        file.write_bytes(whole[:size])
        with pytest.raises(BundleError, match=r"is not an ExecuTorch program: .*\nhint:  export the bundle"):
            read_pte(file)
        with pytest.raises(BackendError, match=r"ExecuTorch cannot open target.pte: .*\nhint:  export the"):
            Program(file, weights, 1).method(graph)
    noise = np.random.default_rng(0)
    for _ in range(300):  # no spoilt byte is more than a refusal
        spoilt = bytearray(whole[: len(whole) // 2])
        for place in noise.integers(0, 4096, 4):
            spoilt[place] = int(noise.integers(0, 256))
        file.write_bytes(spoilt)
        try:
            read_pte(file)
        except BundleError:
            continue
    with pytest.raises(BackendError, match=r"ExecuTorch cannot open target.pte"):
        Program(run.folder / "target.pte", weights, 1).method(replace(graph, method="absent"))
