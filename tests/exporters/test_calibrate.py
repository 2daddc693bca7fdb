"""GPTQ onto the 4-bit grid: better than rounding where it counts, exact where nothing is rounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgespec.config import ExportConfig
from edgespec.errors import InputError
from edgespec.exporters import export
from edgespec.exporters.calibrate import calibrate, gptq, grid_of, needed
from edgespec.exporters.checkpoint import Checkpoint, Grid, layer_of, open_checkpoint
from edgespec.exporters.grids import nearest_grid
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from tests.helpers import tiny
from tests.helpers.checkpoints import tiny_model, write_gguf


def values(grid: Grid) -> np.ndarray:
    """The weight that a grid stands for."""
    blocks = grid.codes.reshape(len(grid.codes), -1, 32).astype(np.float32)
    return (blocks * grid.scale[..., None] + grid.low[..., None]).reshape(len(grid.codes), -1)


def correlated(rows: int, k: int) -> torch.Tensor:
    """Inputs as a network has them: a few directions are strong, and a few channels are large."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(k, k, generator=generator) * torch.logspace(0, -2, k)[:, None]
    return torch.randn(rows, k, generator=generator) @ mix


def test_gptq_changes_the_outputs_less_than_rounding() -> None:
    x = correlated(512, 96)
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    grid, rounded = gptq(weight, x.T @ x)
    assert np.allclose(values(grid), rounded.numpy(), atol=1e-6)
    assert grid.codes.max() <= 15
    nearest = torch.from_numpy(values(Grid(*nearest_grid(weight.numpy()))))
    error = lambda w: float(((w - weight) @ x.T).pow(2).mean())  # noqa: E731
    assert error(rounded) < 0.5 * error(nearest)


def test_a_weight_on_a_grid_stays_there() -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (8, 2, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (codes * 0.125 - 1).reshape(8, 64)
    grid, rounded = gptq(weight, torch.eye(64))
    assert torch.allclose(rounded, weight, atol=1e-6)
    assert np.array_equal(grid.codes.reshape(8, 2, 32), codes.numpy())


def test_inputs_that_are_never_used_do_no_harm() -> None:
    x = correlated(64, 32)
    x[:, 5] = 0
    grid, rounded = gptq(torch.ones(4, 32), x.T @ x)
    assert np.isfinite(grid.scale).all() and torch.isfinite(rounded).all()


def test_the_grid_is_never_worse_than_the_whole_span() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    importance = torch.rand(64, generator=torch.Generator().manual_seed(4))
    blocks, weigh = weight.reshape(16, 2, 32), importance.reshape(2, 32)

    def error(scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        codes = ((blocks - low[..., None]) / scale[..., None]).round().clamp(0, 15)
        return ((codes * scale[..., None] + low[..., None] - blocks).pow(2) * weigh).sum(-1)

    least, most = blocks.amin(-1), blocks.amax(-1)
    chosen, whole = error(*grid_of(weight, importance)), error((most - least) / 15, least)
    assert (chosen <= whole * (1 + 1e-5)).all()
    assert (chosen < whole).any()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny.checkpoint(tmp_path_factory.mktemp("calibrate") / "model", tiny.model("qwen3"))


def test_every_linear_of_the_layers_is_calibrated_and_the_model_keeps_closer(source: Checkpoint) -> None:
    tokens = torch.randint(0, 250, (8, 32), generator=torch.Generator().manual_seed(5))
    seen: list[tuple[int, int]] = []
    grids = calibrate(source, tokens, lambda name: True, lambda done, total: seen.append((done, total)))
    layers = source.config.num_hidden_layers
    assert len(grids) == 7 * layers
    assert seen[-1] == (layers, layers)
    model = source.load_model()

    def divergence(weights: dict[str, np.ndarray]) -> float:
        other = source.load_model()
        with torch.no_grad():
            for name, value in weights.items():
                other.get_parameter(name).copy_(torch.from_numpy(value))
            want, have = (m(tokens).logits.log_softmax(-1) for m in (model, other))
        return float((want.exp() * (want - have)).sum(-1).mean())

    nearest = {name: values(Grid(*nearest_grid(source.tensor(name).numpy()))) for name in grids}
    assert divergence({name: values(grid) for name, grid in grids.items()}) < 0.8 * divergence(nearest)


def test_a_checkpoint_on_its_own_grid_needs_nothing(source: Checkpoint, tmp_path: Path) -> None:
    assert needed(source)
    write_gguf(tmp_path / "model.gguf", tiny_model("llama"))
    own = open_checkpoint(str(tmp_path / "model.gguf"))
    assert not needed(own)
    assert (
        calibrate(own, torch.zeros(1, 8, dtype=torch.int64), lambda name: True, lambda done, total: None)
        == {}
    )


def test_export_calibrates_and_refuses_an_empty_text(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    config = tiny.family_config("qwen3", num_hidden_layers=4)
    source = tiny.checkpoint(tmp_path_factory.mktemp("four") / "model", tiny.trained_like(config, 0))
    folder = str(source.weights.files[0].parent)
    given = dict(budget=32, block=16, widths=(2,), weights="int4", sinks=2, recent=4)
    text = tmp_path / "text.txt"
    text.write_text("one two three four five " * 40)
    bundle = export(
        ExportConfig(folder, str(tmp_path / "a.bundle"), text=str(text), **given),
        Progress(quiet=True),
        Engine,
    )  # type: ignore[arg-type]
    assert bundle.model("target").precision == {
        "linear": "int4", "ends": "int8", "head": "int8", "embedding": "int8"
    }  # fmt: skip
    graph = onnx.load(tmp_path / "a.bundle" / "target-verify-2.onnx", load_external_data=False).graph
    sizes = {init.name: list(init.dims) for init in graph.initializer if init.name.endswith(".codes")}
    layers = source.config.num_hidden_layers
    for name, dims in sizes.items():  # int4 codes are [n, blocks, 16], int8 codes [k, n]
        assert (len(dims) == 3) == (layer_of(name) in range(1, layers - 1)), name
    assert sum(len(dims) == 3 for dims in sizes.values()) == 4 * (
        layers - 2
    )  # q, k, v and gate, up are packed
    text.write_text("")
    with pytest.raises(InputError, match="the calibration text is empty"):
        export(
            ExportConfig(folder, str(tmp_path / "b.bundle"), text=str(text), **given),
            Progress(quiet=True),
            Engine,
        )  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bundle", "text.txt"]
