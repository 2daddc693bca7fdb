"""Training a draft: schedule, the law it learns, BE against a played round, exact resumption, refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from edgespec.errors import InputError
from edgespec.exporters import distill
from edgespec.exporters.distill import Draft, Training, block_efficiency, cut, law, packed, schedule, train
from edgespec.exporters.samples import Sample, Settings, generate, read
from tests.helpers import tiny

TRAINING = Training(steps=12, rate=3e-3, warmup=2, tokens=120, longest=40, measure=6, drafts=3)
QUIET: dict[str, Any] = {"advance": lambda *_: None, "note": lambda *_: None}
KEPT = np.arange(0, 288, 2)


@pytest.fixture(scope="module", name="samples")
def _samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("samples")
    prompts = [([9 + i, 30 + i, *range(40, 40 + i)], "c") for i in range(16)]
    settings = Settings(max_new_tokens=16, batch=8, top=6, temperatures=(0.0, 1.0))
    generate(copy.deepcopy(tiny.model("llama")), prompts, [5], folder, settings, lambda *_: None)
    return list(read(folder))


def run(folder: Path, samples: list[Sample], training: Training = TRAINING, seed: int = 2) -> dict[str, Any]:
    model = copy.deepcopy(tiny.model("llama", seed=seed))
    return train(model, samples[2:], samples[:4], KEPT, folder, training, Accelerator(cpu=True), **QUIET)


def test_every_text_comes_once_an_epoch_in_steps_that_fit() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 60, 700)]
    steps = schedule(lengths, 200, 1)
    assert sorted(i for s in steps for i in s) == list(range(700))
    assert all(max(lengths[i] for i in s) * len(s) <= 200 for s in steps)
    assert steps == schedule(lengths, 200, 1) != schedule(lengths, 200, 2)


def test_a_long_text_loses_its_prompts_beginning_first() -> None:
    top = np.arange(12).reshape(6, 2)
    sample = Sample(np.arange(10, dtype=np.int32), 4, top, -top.astype(np.float16), 0.0, "c")
    short = cut(sample, 8)
    assert short.tokens.tolist() == [2, 3, 4, 5, 6, 7, 8, 9] and short.prompt == 2 and len(short.top_ids) == 6
    shorter = cut(sample, 4)
    assert shorter.tokens.tolist() == [3, 4, 5, 6] and shorter.prompt == 1
    assert shorter.top_ids.tolist() == top[:3].tolist()
    assert cut(sample, 99).tokens.tolist() == sample.tokens.tolist()


def test_the_law_is_the_targets_over_what_is_kept() -> None:
    sample = Sample(
        np.array([7, 8, 9], np.int32),
        1,
        np.array([[8, 3], [9, 4]]),
        np.log([[0.5, 0.25], [0.6, 0.2]]),
        0.0,
        "c",
    )
    batch = packed([sample]).batch([0])
    assert batch.rows.tolist() == [0, 0] and batch.columns.tolist() == [0, 1]
    index, p = law(batch, torch.tensor([3, 4, 8]), 10)
    assert index.tolist() == [[2, 0], [-1, 1]]
    np.testing.assert_allclose(p, [[2 / 3, 1 / 3], [0, 1]], rtol=1e-3)


def test_block_efficiency_is_that_of_rounds_played_one_by_one(samples: list[Sample]) -> None:
    """Draft token after token with the model itself, verify against the text, count the calls."""
    model = copy.deepcopy(tiny.model("llama", seed=3))
    draft, kept = Draft(model), np.arange(0, 200)
    greedy = [s for s in samples if s.temperature == 0]
    for drafts, context in ((1, True), (3, True), (3, False)):
        emitted = calls = 0
        for s in greedy:
            place = s.prompt
            while place < len(s.tokens):
                text, taken = s.tokens[:place].tolist(), 0
                while taken < drafts and place + taken < len(s.tokens):
                    with torch.no_grad():
                        logits = model(torch.tensor([text])).logits[0, -1]
                    seen = sorted({*kept.tolist(), *(text if context else [])})
                    token = seen[int(logits[seen].argmax())]
                    if token != s.tokens[place + taken]:
                        break
                    text.append(token)
                    taken += 1
                emitted += min(taken + 1, len(s.tokens) - place)
                place += taken + 1
                calls += 1
        assert block_efficiency(draft, greedy, kept, drafts, 90, context) == pytest.approx(emitted / calls)


def test_training_learns_and_repeats_itself(tmp_path: Path, samples: list[Sample]) -> None:
    longer = dataclasses.replace(TRAINING, steps=60, measure=20)
    first, again = run(tmp_path / "a", samples, longer), run(tmp_path / "b", samples, longer)
    curve = [json.loads(line) for line in (tmp_path / "a" / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    assert first["best"] == again["best"] > 1
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    model = copy.deepcopy(tiny.model("llama", seed=2))
    frozen = {n for n, p in Draft(model).model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}


def test_a_stopped_training_goes_on_to_the_same_weights(
    tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", samples)
    real, calls = distill.law, []

    def stopping(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(distill, "law", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", samples)
    monkeypatch.setattr(distill, "law", real)
    run(tmp_path / "part", samples)
    for name in ("resume.safetensors", "model.safetensors"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    curves = []
    for name in ("part", "whole"):
        lines = (tmp_path / name / "curve.jsonl").read_text().splitlines()
        curves.append([json.loads(line) | {"seconds": 0} for line in lines])
    assert curves[0] == curves[1] and len(curves[0]) == 2
    with pytest.raises(InputError, match="other settings"):
        run(tmp_path / "part", samples, dataclasses.replace(TRAINING, rate=1e-3))


def test_what_is_refused_and_when_it_stops(tmp_path: Path, samples: list[Sample]) -> None:
    with pytest.raises(InputError, match="too few samples"):
        run(tmp_path / "none", [dataclasses.replace(s, temperature=1.0) for s in samples])
    broken = [dataclasses.replace(s, top_logp=np.full_like(s.top_logp, np.nan)) for s in samples]
    with pytest.raises(InputError, match="loss of step 0 is nan"):
        run(tmp_path / "nan", broken[:4] + broken)
    early = dataclasses.replace(TRAINING, steps=40, rate=0.0, measure=2, patience=3)
    state = run(tmp_path / "early", samples, early)
    assert state["step"] == 8 and state["best_step"] == 2
