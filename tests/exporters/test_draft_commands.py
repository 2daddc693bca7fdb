"""From a target to a draft by the commands, and into a bundle that is checked and speaks; what is refused."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from edgespec.bundle import open_bundle
from edgespec.cli import main
from edgespec.exporters.checkpoint import open_checkpoint
from edgespec.exporters.draft_checkpoint import open_draft
from edgespec.exporters.samples import read as samples
from edgespec.prompts import read
from edgespec.runtime.session import Runtime, Settings
from tests.helpers import tiny
from tests.helpers.checkpoints import edit_json, write_directory

EXPORT = shlex.split(
    "--weights fp32 --budget 64 --block 16 --widths 2,4 --draft-budget 32 --sinks 2 --recent 4"
)


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, its samples and a draft trained on them."""
    folder = tmp_path_factory.mktemp("draft")
    write_directory(folder / "target", tiny.model("llama"))
    questions = "".join(f'{{"prompt": "What is {i} and {i * i}?"}}\n' for i in range(44))
    (folder / "prompts.jsonl").write_text(questions)
    target, samples = str(folder / "target"), str(folder / "samples")
    words = ["--prompts", str(folder / "prompts.jsonl"), "--weights", "fp32", "--max-new-tokens", "12"]
    assert main(["draft", "samples", target, *words, "--batch", "22", "-o", samples, "-q"]) == 0
    words = [
        "--layers",
        "0,1",
        "--draft-rows",
        "270",
        "--steps",
        "8",
        "--measure",
        "4",
        "--tokens",
        "300",
        "-q",
    ]
    assert main(["draft", "train", target, "--samples", samples, *words, "-o", str(folder / "trained")]) == 0
    return folder


def test_a_target_writes_prompts(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They begin as asked and end by themselves; a run goes on; what is excluded is left out."""
    words = ["--count", "120", "--begin", "any,hello", "--max-new-tokens", "60", "--batch", "10"]
    words += ["--weights", "fp32", "--temperature", "1.5", "-q"]
    ask = ["draft", "prompts", str(made / "target"), "-o", str(tmp_path / "own"), *words]
    assert main(ask) == 0
    path = tmp_path / "own" / "prompts.jsonl"
    found = read(path)
    assert str(path) in capsys.readouterr().out
    assert 10 < len(found) < 120 and {p.category for p in found} == {"any", "hello"}
    assert all(p.text.startswith("hello") for p in found if p.category == "hello")
    ended = [s for s in samples(tmp_path / "own") if s.tokens[-1] == 2]
    assert len(found) <= len(ended) and all(s.temperature == 1.5 for s in ended)
    whole = path.read_text()
    (tmp_path / "own" / "batch-00001.npz").unlink()
    path.unlink()
    assert main(ask) == 0 and path.read_text() == whole
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": f" {found[0].text.upper()}"}))
    assert main([*ask, "--exclude", str(tmp_path / "test.jsonl")]) == 0
    assert [p.text for p in read(path)] == [p.text for p in found[1:]]
    bare = shutil.copytree(made / "target", tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    capsys.readouterr()
    assert main(["draft", "prompts", str(bare), "-o", str(tmp_path / "none"), *words]) == 2
    assert "has no chat template, so it writes no prompts" in capsys.readouterr().err


def test_the_draft_holds_its_layers_only(made: Path) -> None:
    names = sorted(p.name for p in (made / "trained").iterdir())
    assert names == ["config.json", "draft.json", "model.safetensors", "training", "vocabulary.json"]
    facts = json.loads((made / "trained" / "draft.json").read_text())
    assert facts["schema"] == "edgespec.draft/1" and facts["begins_as"] == [0, 1]
    assert facts["block_efficiency"] >= 1 and facts["samples"] == 41
    target = open_checkpoint(str(made / "target"))
    draft = open_draft(str(made / "trained"), target)
    for name in target.names():
        ours, theirs = draft.tensor(name), target.tensor(name)
        assert torch.equal(ours, theirs) == ("embed" in name or "lm_head" in name), name
        assert (ours - theirs).abs().max() < 0.2, name


def test_a_fresh_draft_begins_with_texts_and_goes_on_with_answers(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the target sees in a text is what its logits say; fresh layers are no copies of the target's."""
    target, text = str(made / "target"), tmp_path / "some.txt"
    text.write_text("The cat sat on the mat, and then it went away. " * 20, encoding="utf-8")
    words = ["--texts", str(text), "--weights", "fp32", "--max-new-tokens", "24", "-q"]
    assert main(["draft", "samples", target, *words, "-o", str(tmp_path / "seen")]) == 0
    found = list(samples(tmp_path / "seen"))
    whole = tokenizers.Tokenizer.from_file(str(made / "target" / "tokenizer.json")).encode(text.read_text())
    assert sorted(t for s in found for t in s.tokens.tolist()) == sorted(whole.ids)
    model = open_checkpoint(target).load_model()
    for s in found:
        assert (s.prompt, s.temperature, s.category) == (1, 1.0, "some")
        with torch.no_grad():
            logp = model(torch.tensor(s.tokens[None].astype(np.int64))).logits[0, :-1].log_softmax(-1)
        assert s.top_ids.tolist() == logp.topk(32).indices.tolist()
    base = ["draft", "train", target, "--fresh", "2", "--tokens", "300", "--steps", "2", "--measure", "2"]
    both = f"{made / 'samples'},{tmp_path / 'seen'}"
    assert main([*base, "--samples", both, "-o", str(tmp_path / "fresh"), "--rate", "1e-8", "-q"]) == 0
    facts = json.loads((tmp_path / "fresh" / "draft.json").read_text())
    assert facts["fresh"] and facts["begins_as"] == [0, 1]
    draft, own = open_draft(str(tmp_path / "fresh"), open_checkpoint(target)), open_checkpoint(target)
    for name in own.names():
        near = (draft.tensor(name) - own.tensor(name)).abs().mean() < 1e-3
        assert near == ("embed" in name or "lm_head" in name), name
    none = ["-o", str(tmp_path / "none"), "-q"]
    assert main(["draft", "samples", target, *words, "--top", "5", "-o", str(tmp_path / "five")]) == 0
    capsys.readouterr()
    assert main([*base, "--samples", str(tmp_path / "seen"), *none]) == 2
    assert "too few samples" in capsys.readouterr().err  # no greedy text to measure with
    assert main([*base, "--samples", f"{tmp_path / 'five'},{made / 'samples'}", *none]) == 2
    assert "the samples keep 5 and 32 tokens a place" in capsys.readouterr().err


def test_it_is_exported_checked_and_changes_no_text(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(made / "x.bundle")
    words = [str(made / "target"), "--draft", str(made / "trained"), "-o", bundle, "-q", *EXPORT]
    assert main(["export", *words]) == 0
    draft = next(m for m in open_bundle(bundle).manifest.models if m.name == "draft")
    assert draft.source == "trained" and draft.head_rows == 270
    sources = ["--source", str(made / "target"), "--draft-source", str(made / "trained")]
    capsys.readouterr()
    assert main(["check", bundle, *sources, "-q"]) == 0
    assert "pass  draft numbers" in capsys.readouterr().out
    with Runtime.open(bundle) as runtime:
        texts = []
        for drafter in ("none", "draft"):
            session = runtime.session()
            answer, _ = (
                session.generate(
                    list(range(5, 45)), Settings(max_new_tokens=60, drafter=drafter, stop_rule="fixed")
                ),
                None,
            )
            texts.append(session.tokens)
        assert texts[0] == texts[1] and answer.stats["tokens_accepted"] > 0


def test_two_processes_train_one_draft(made: Path, tmp_path: Path) -> None:
    """`accelerate launch` with gloo: each takes every other text of a step, and one of them writes."""
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
    train = "-m edgespec draft train --layers 0,1 --steps 4 --measure 2 --tokens 300 -q"
    places = [str(made / "target"), "--samples", str(made / "samples"), "-o", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, *launch.split(), *train.split(), *places],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    curve = [json.loads(x) for x in (tmp_path / "two" / "training" / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [2, 4]
    assert open_draft(str(tmp_path / "two"), open_checkpoint(str(made / "target"))).source == "two"


def test_a_training_goes_on_and_a_draft_goes_further(made: Path, tmp_path: Path) -> None:
    base = ["draft", "train", str(made / "target"), "--samples", str(made / "samples"), "--steps", "4", "-q"]
    more = [
        *base,
        "--measure",
        "4",
        "--tokens",
        "300",
        "--init",
        str(made / "trained"),
        "-o",
        str(tmp_path / "two"),
    ]
    assert main(more) == 0
    stamp = (tmp_path / "two" / "training" / "state.json").stat().st_mtime_ns
    assert main(more) == 0  # nothing is left to do
    assert (tmp_path / "two" / "training" / "state.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["samples", "T", "--prompts", "P", "--texts", "P", "-o", "O"], "prompts and texts are both given"),
        (["samples", "T", "--texts", "nowhere.txt", "-o", "O"], "texts 'nowhere.txt' is not a file"),
        (["train", "T", "--samples", "S", "-o", "O", "--fresh", "1", "--layers", "0"], "give one of them"),
        (["train", "T", "--samples", "S", "-o", "O", "--fresh", "9"], "target has no layer 8"),
        (["curve", "S"], "holds no training/curve.jsonl"),
        (["prompts", "T", "-o", "O", "--count", "0"], "count 0 is not 1 to"),
        (["prompts", "T", "-o", "O", "--begin", ","], "no first words are given"),
        (["prompts", "T", "-o", "O", "--exclude", "nowhere.txt"], "exclude 'nowhere.txt' is not a file"),
        (["prompts", "T", "-o", "O", "--temperature", "0"], "temperature 0.0 is not"),
        (["samples", "T", "--prompts", "", "-o", "O"], "no file of prompts is given"),
        (["samples", "T", "--prompts", "nowhere.txt", "-o", "O"], "prompts 'nowhere.txt' is not a file"),
        (["samples", "T", "--prompts", "P", "-o", "O", "--share", "2/2"], "share '2/2' is no part"),
        (["train", "T", "--samples", "nowhere", "-o", "O"], "nowhere holds no samples"),
        (["train", "T", "--samples", "S", "-o", "O", "--layers", "0,7"], "target has no layer 7"),
        (["train", "T", "--samples", "S", "-o", "O", "--layers", "0,0"], "layers 0,0 must ascend"),
        (["train", "T", "--samples", "S", "-o", "O", "--layers=-1,1"], "layers -1 is not 0 to"),
        (["train", "T", "--samples", "S", "-o", "O", "--init", "S", "--layers", "0"], "give one of them"),
        (["train", "T", "--samples", "S", "-o", "O/x"], "is not a folder"),
        (["train", "T", "--samples", "S", "-o", "O", "--steps", "0"], "steps 0 is not 1 to"),
    ],
)
def test_what_the_commands_refuse(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    places = {"T": made / "target", "S": made / "samples", "P": made / "prompts.jsonl"}
    given = [str(places.get(w, tmp_path / w if w[0:1] == "O" else w)) for w in words]
    assert main(["draft", *given, "-q"]) == 2
    said = capsys.readouterr().err
    assert message in said and "hint:" in said
    assert not (tmp_path / "O" / "draft.json").exists()


def test_what_an_export_refuses(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(draft: Path, target: Path = made / "target") -> str:
        capsys.readouterr()
        words = ["export", str(target), "--draft", str(draft), "-o", str(tmp_path / "b"), "-q", *EXPORT]
        assert main(words) == 2 and not (tmp_path / "b").exists()
        return capsys.readouterr().err

    def damaged(name: str) -> Path:
        return shutil.copytree(made / "trained", tmp_path / name)

    edit_json(damaged("old") / "draft.json", schema="edgespec.draft/0")
    assert "not of schema edgespec.draft/1" in refusal(tmp_path / "old")
    edit_json(damaged("other") / "draft.json", tokenizer_sha256="0")
    assert "was trained for target, whose tokenizer is not target's" in refusal(tmp_path / "other")
    cut = damaged("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100])
    assert "model.safetensors is cut short" in refusal(tmp_path / "cut")
    wide = write_directory(tmp_path / "wide", tiny.trained_like(tiny.family_config("llama", hidden_size=96)))
    assert "has a hidden size of 64, wide of 96" in refusal(made / "trained", wide)
    edit_json(damaged("deep") / "config.json", num_hidden_layers=3)
    assert "draft deep lacks model.layers.2." in refusal(tmp_path / "deep")
    assert "was trained for" in refusal(Path("demo"))
