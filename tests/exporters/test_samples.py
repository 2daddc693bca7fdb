"""What a target writes in batches is what it writes alone; a folder of samples is resumed and checked."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from edgespec.errors import InputError
from edgespec.exporters import writer
from edgespec.exporters.rounded import Rounded, rounded
from edgespec.exporters.samples import Sample, Settings, generate, read
from tests.helpers import tiny

STOP = 5
PROMPTS = [(list(range(9, 9 + n)), f"c{n % 2}") for n in (3, 21, 7, 12, 30, 5, 4, 9, 2, 17, 1, 28, 6, 11)]
GREEDY = Settings(max_new_tokens=12, batch=8, top=5, temperatures=(0.0,))


def made(folder: Path, settings: Settings = GREEDY, family: str = "llama", **more: object) -> list[Sample]:
    seen: list[tuple[int, int]] = []
    model = copy.deepcopy(tiny.model(family))  # it is put to another attention function
    generate(model, PROMPTS, [STOP], folder, settings, lambda *done: seen.append(done), **more)  # type: ignore[arg-type]
    assert seen[-1][1] == 2
    return list(read(folder))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_a_batch_writes_what_transformers_writes_alone(tmp_path: Path, family: str) -> None:
    """Rows at places of their own, the grouped attention, a softcap and a sliding window change nothing."""
    samples = made(tmp_path, family=family)
    assert len(samples) == len(PROMPTS)
    model = tiny.model(family)
    for s in samples:
        prompt = s.tokens[: s.prompt].tolist()
        assert (prompt, s.category) in PROMPTS and s.temperature == 0
        with torch.no_grad():
            logp = model(torch.tensor(s.tokens[None].astype(np.int64))).logits[0].log_softmax(-1)
        seen = logp[s.prompt - 1 : len(s.tokens) - 1]
        assert s.tokens[s.prompt :].tolist() == seen.argmax(-1).tolist()
        assert s.top_ids.tolist() == seen.topk(5).indices.tolist()
        np.testing.assert_allclose(s.top_logp, seen.topk(5).values, rtol=2e-3, atol=2e-3)
        ended = np.flatnonzero(s.tokens[s.prompt :] == STOP)
        assert not len(ended) or ended[0] == len(s.tokens) - s.prompt - 1


def test_sampling_follows_the_seed_and_the_temperature(tmp_path: Path) -> None:
    warm = Settings(max_new_tokens=12, batch=8, top=5, temperatures=(0.0, 2.0))
    first, again = made(tmp_path / "a", warm), made(tmp_path / "b", warm)
    other = made(tmp_path / "c", Settings(max_new_tokens=12, batch=8, top=5, temperatures=(0.0, 2.0), seed=3))
    key = lambda s: s.tokens[: s.prompt].tolist()  # noqa: E731
    for x, y, z in zip(*(sorted(some, key=key) for some in (first, again, other)), strict=True):
        assert x.tokens.tolist() == y.tokens.tolist() and x.temperature == z.temperature
        assert (x.tokens.tolist() == z.tokens.tolist()) == (x.temperature == 0)
    assert {s.temperature for s in first} == {0.0, 2.0}


def test_a_row_may_stay_free_longer_than_it_has_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free rows wait for others to end, and those that no prompt is left for wait once more."""
    monkeypatch.setattr(writer, "FREE", 1.0)
    monkeypatch.setattr(writer, "LEAST_BUSY", 0.0)
    model = copy.deepcopy(tiny.model("llama"))
    stops = range(1, model.config.vocab_size, 12)
    heat = [1e-4 if n in (0, 8) else 3.0 for n in range(9)]  # one text of each group is long
    out = writer.write(model, [[9]] * 9, heat, stops, rows=8, most=24, top=5, seed=1)
    lengths = out.length.tolist()
    assert lengths[0] == lengths[8] == 24 and min(lengths) < 12
    assert out.text[0].tolist() == out.text[8].tolist()


def test_a_stopped_run_goes_on_and_two_machines_share(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole")
    part = tmp_path / "part"
    made(part, share=(1, 2))
    stamp = (part / "batch-00001.npz").stat().st_mtime_ns
    assert 0 < len(list(read(part))) < len(PROMPTS)
    both = made(part)
    assert (part / "batch-00001.npz").stat().st_mtime_ns == stamp
    assert [s.tokens.tolist() for s in both] == [s.tokens.tolist() for s in whole]
    assert sorted(p.name for p in part.iterdir()) == ["batch-00000.npz", "batch-00001.npz", "samples.json"]


def test_what_is_refused(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(InputError, match="other prompts or settings"):
        made(tmp_path, Settings(max_new_tokens=13, batch=8, top=5, temperatures=(0.0,)))
    (tmp_path / "batch-00000.npz").write_bytes((tmp_path / "batch-00000.npz").read_bytes()[:300])
    with pytest.raises(InputError, match="is no file of samples"):
        list(read(tmp_path))
    with pytest.raises(InputError, match="holds no samples"):
        list(read(tmp_path / "nowhere"))


def test_rounded_layers_multiply_as_the_int8_form_does() -> None:
    """Against the formula in float64, row by row: a row's result does not depend on its neighbours."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(24, 32), torch.randn(24), torch.randn(3, 5, 32)
    layer = Rounded(weight, bias)
    y = layer(x)
    assert torch.equal(y[1:2, 2:3], layer(x[1:2, 2:3]))
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round()
    rows = x.reshape(-1, 32)
    low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
    step = (high - low) / 255
    near = ((rows / step).round() * step).double() @ (codes * scale).double().T + bias
    torch.testing.assert_close(y.reshape(-1, 24).double(), near, atol=0.03, rtol=0)
    assert (y - (x @ weight.T + bias)).abs().max() < 0.15
    model = rounded(copy.deepcopy(tiny.model("llama")))
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
