"""A bundle that reads images: its texts are Transformers', speculation and eviction change none of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from edgespec.config import ExportConfig
from edgespec.exporters import export
from edgespec.exporters.checkpoint import open_checkpoint
from edgespec.exporters.compare import Reference
from edgespec.exporters.images import Sight
from edgespec.exporters.step import Step, prepare, ready
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.runtime.pictures import read
from edgespec.runtime.session import Runtime, Settings
from tests.helpers import tiny_vlm

TOKENS = 24
PLAIN = Settings(max_new_tokens=TOKENS, drafter="none")
WAYS = [
    Settings(max_new_tokens=TOKENS, drafter="ngram"),
    Settings(max_new_tokens=TOKENS, drafter="draft", stop_rule="fixed"),
    Settings(max_new_tokens=TOKENS, drafter="both", stop_rule="adaedl"),
    Settings(max_new_tokens=TOKENS, drafter="draft", stop_rule="confidence"),
    Settings(max_new_tokens=TOKENS, drafter="both", stop_rule="cost"),
]
TEXT = "well hello there, well hello here, what is well and what is here"


def transformers_text(source: Path, prompt: str, images: list[Path], tokens: int = TOKENS) -> list[int]:
    """What Transformers' own model and processor answer, greedily, until the end of a turn."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(source, backend="pil")
    opened = [Image.open(path).convert("RGB") for path in images]
    given = processor(text=prompt, images=opened or None, return_tensors="pt", add_special_tokens=False)
    made = model.generate(**given, max_new_tokens=tokens, do_sample=False, eos_token_id=2)
    new: list[int] = made[0, given["input_ids"].shape[1] :].tolist()
    return new[:-1] if new[-1] == 2 else new


def turn(words: str) -> str:
    """A user's turn as the tiny template writes it."""
    return f"<|im_start|>user\n{words}<|im_end|>\n"


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
def test_the_text_is_that_of_transformers(
    seeing: Callable[..., tuple[Runtime, Path]], pictures: tuple[Path, Path], kind: str
) -> None:
    runtime, source = seeing(kind, draft="layers")
    start = "<|im_start|>assistant\n"
    answers = []
    for images, marks in (([], ""), ([pictures[0]], "<image>"), (list(pictures), "<image><image>")):
        session = runtime.session()
        answer = session.generate(TEXT, PLAIN, images=images)
        assert list(answer.tokens) == transformers_text(source, turn(marks + TEXT) + start, images)
        answers.append(answer.tokens)
        for how in WAYS:
            again = runtime.session().generate(TEXT, how, images=images)
            assert again.tokens == answer.tokens, how
            assert how.drafter == "ngram" or again.stats["draft_calls"] or how.stop_rule == "cost"
    assert len(set(answers)) == 3, "the image must matter"


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_a_large_image_becomes_several_pictures(
    seeing: Callable[..., tuple[Runtime, Path]], pictures: tuple[Path, Path], kind: str
) -> None:
    runtime, source = seeing(kind, True)
    answer = runtime.session().generate(TEXT, PLAIN, images=[pictures[0]])
    prompt = turn("<image>" + TEXT) + "<|im_start|>assistant\n"
    assert list(answer.tokens) == transformers_text(source, prompt, [pictures[0]])
    assert answer.stats["tokens_prompt"] > 5 * 4


def test_an_image_may_stand_anywhere_and_in_later_turns(
    seeing: Callable[..., tuple[Runtime, Path]], pictures: tuple[Path, Path]
) -> None:
    runtime, source = seeing("llava", draft="layers")
    short = Settings(max_new_tokens=6)
    session = runtime.session()
    first = session.generate("so <image> it is", short, images=[pictures[0]])
    talk = turn("so <image> it is")
    assert list(first.tokens) == transformers_text(source, talk + "<|im_start|>assistant\n", [pictures[0]], 6)
    second = session.generate("and now", short, images=[pictures[1]])
    talk += f"<|im_start|>assistant\n{first.text}<|im_end|>\n" + turn("<image>and now")
    talk += "<|im_start|>assistant\n"
    assert list(second.tokens) == transformers_text(source, talk, list(pictures), 6)
    raw = runtime.session().generate("see <image> well", short, raw=True, images=[pictures[0]])
    assert list(raw.tokens) == transformers_text(source, "see <image> well", [pictures[0]], 6)


class Seeing(nn.Module):
    """An embedding whose ids below 0 are rows of an image."""

    def __init__(self, table: nn.Module, features: Tensor) -> None:
        super().__init__()
        self.table, self.features = table, features

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [1,S] -> rows [1,S,hidden]."""
        seen = self.features[(-1 - ids).clamp(min=0)]
        return torch.where((ids < 0).unsqueeze(-1), seen, self.table(ids.clamp(min=0)))


def oracle(runtime: Runtime, source: Path, text: str, images: list[Path], tokens: int) -> list[int]:
    """The greedy text of plain tensors that evict by the bundle's policy, one row a call."""
    sight, entry = runtime.sight, runtime.bundle.model("target")
    assert sight is not None
    ids, _ = sight(text, read(images))
    whole = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    opened = [Image.open(path).convert("RGB") for path in images]
    given = AutoProcessor.from_pretrained(source, backend="pil")(
        text=text, images=opened, return_tensors="pt"
    )
    with torch.no_grad():
        seen = whole.model.get_image_features(given["pixel_values"]).pooler_output
    model: Any = open_checkpoint(str(source)).load_model()
    model.set_input_embeddings(Seeing(model.get_input_embeddings(), torch.cat(list(seen))))
    rows = iter(range(len(ids)))
    todo = [-1 - next(rows) if token == tiny_vlm.IMAGE else token for token in ids]
    step, state, made = Step(prepare(model), entry.spec.layers), Reference(entry, None), []
    position = 0
    with ready(model, entry.spec):
        while len(made) < tokens:
            token = todo.pop(0)
            one = lambda n: torch.tensor([n])  # noqa: E731
            logits, cache = step.run(
                one(token)[None], one(position)[None], one(0), one(state.count), state.caches
            )
            state.take(cache)
            position += 1
            if not todo:
                todo.append(int(logits[0, 0].argmax()))
                made.append(todo[0])
                if made[-1] == 2:
                    return made[:-1]
    assert state.evictions > 1
    return made


@pytest.mark.parametrize("policy", ["keydiff", "caote(h2o)"])
@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_pictures_are_evicted_like_any_row_and_the_text_stays(
    seeing: Callable[..., tuple[Runtime, Path]], pictures: tuple[Path, Path], kind: str, policy: str
) -> None:
    small = {"budget": 32, "block": 16, "recent": 8, "policy": policy, "draft": "layers", "draft_budget": 32}
    runtime, source = seeing(kind, kind == "idefics3", **small)
    text = f"<image>{TEXT} <image> {TEXT}"
    want = oracle(runtime, source, text, list(pictures), TOKENS)
    for how in [PLAIN, *WAYS]:
        answer = runtime.session().generate(text, how, raw=True, images=pictures)
        assert list(answer.tokens) == want, how


def test_a_draft_reads_no_picture(
    seeing: Callable[..., tuple[Runtime, Path]], pictures: tuple[Path, Path]
) -> None:
    """Its rows are the words alone: a prompt's absorbed tokens are fewer by the pictures' rows."""
    runtime, _ = seeing("llava", draft="layers")
    calls: list[Any] = []

    class Trace:
        def write(self, line: str) -> None:
            calls.extend(json.loads(line)["calls"])

    how = Settings(max_new_tokens=4, drafter="draft", stop_rule="fixed", draft_tokens=1)
    session = runtime.session()
    session.generate(TEXT, how, images=pictures, trace=Trace())
    begun = next(i for i, call in enumerate(calls) if call[0] == "draft")
    verified = next(i for i, call in enumerate(calls) if i > begun and call[1] == "verify")
    absorbed = sum(rows for model, _, _, rows, _ in calls[:verified] if model == "draft")
    words = [token for token in session.tokens if token != tiny_vlm.IMAGE]
    assert absorbed == len(words) - session.answer.stats["tokens_new"] + 1
    assert [c[:4] for c in calls if c[0] == "vision"] == [["vision", "vision", 16, 16]] * 2
    assert [c[1] for c in calls if c[0] == "target"][:2] == ["embeds", "embeds"]


@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_a_draft_that_sees_fewer_rows_changes_no_text(
    seeing: Callable[..., tuple[Runtime, Path]], pictures: tuple[Path, Path], kind: str, tmp_path: Path
) -> None:
    small = {"budget": 32, "block": 16, "recent": 8, "draft_budget": 32, "policy": "h2o"}
    runtime, source = seeing(kind, kind == "idefics3", sees=2, **small)
    (entry,) = runtime.bundle.manifest.vision
    assert entry.draft_rows == 2 and entry.graph.outputs[1].shape == (1, 2, 64)
    text = f"<image>{TEXT} <image> {TEXT}"
    want = oracle(runtime, source, text, list(pictures), TOKENS)
    for how in [PLAIN, *WAYS]:
        answer = runtime.session().generate(text, how, raw=True, images=pictures)
        assert list(answer.tokens) == want, how
    session, short = runtime.session(), Settings(max_new_tokens=5, drafter="draft", stop_rule="fixed")
    first = session.generate(TEXT, short, images=[pictures[0]])
    session.snapshot(tmp_path / "kept")
    second = session.generate("go on", short, images=[pictures[1]])
    other = runtime.session()
    other.restore(tmp_path / "kept")
    again = other.generate("go on", short, images=[pictures[1]])
    assert again.tokens == second.tokens and again.stats["draft_calls"]
    session.truncate(session.tokens.index(tiny_vlm.IMAGE))
    session.messages.clear()
    assert session.generate(TEXT, short, images=[pictures[0]]).tokens == first.tokens


@pytest.mark.parametrize("sees", [0, 4])
def test_a_draft_is_told_what_it_sees(
    seeing: Callable[..., tuple[Runtime, Path]], pictures: tuple[Path, Path], sees: int, tmp_path: Path
) -> None:
    """The entropy of its first draft is that of its graphs over the words and its rows of the picture."""
    runtime, _ = seeing("llava", sees=sees)
    bundle, how = runtime.bundle, Settings(max_new_tokens=6, drafter="draft", stop_rule="fixed")
    (entry,) = bundle.manifest.vision
    session = runtime.session()
    with (tmp_path / "trace").open("w") as trace:
        session.generate(f"{TEXT}<image>", how, raw=True, images=[pictures[0]], trace=trace)
    events = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    told = next(event["entropy"][0] for event in events if event.get("entropy"))
    assert runtime.sight is not None
    ids, pixels = runtime.sight(f"{TEXT}<image>", read([pictures[0]]))
    _, *rows = Engine(bundle.path, bundle.model("target")).look(entry, pixels)
    engine = Engine(bundle.path, bundle.model("draft"))
    at = ids.index(tiny_vlm.IMAGE)
    said = [*ids[:at], *range(-1, -1 - sees, -1), *ids[at + entry.rows :], session.answer.tokens[0]]
    while engine.position < len(said) - 1:
        some = said[engine.position : len(said) - 1][: min(32, engine.free)]
        features = np.stack([rows[0][0, -1 - t] if t < 0 else np.zeros(64, np.float32) for t in some])
        more = {"features": features} if sees else {}
        engine.call("embeds" if sees else "prefill", some, **more)
        engine.accept(len(some))
    assert engine.call("draft", said[-1:])["entropy"][0, 0] == pytest.approx(told, rel=1e-5)
    assert any(call[:2] == ["draft", "embeds"] for event in events for call in event["calls"]) == bool(sees)


def test_odd_sizes_and_the_processor_of_smolvlm(
    tmp_path: Path, pictures: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is no multiple of a patch, as SigLIP's 384 of 14; a processor with a part for videos."""
    monkeypatch.setattr(tiny_vlm, "SIZE", 30)
    monkeypatch.setitem(tiny_vlm.ENCODER, "image_size", 30)
    tiny_vlm.folder(tmp_path / "model", "smolvlm", True)
    facts = json.loads((tmp_path / "model" / "processor_config.json").read_text())
    (tmp_path / "model" / "processor_config.json").write_text(
        json.dumps(facts | {"processor_class": "SmolVLMProcessor"})
    )
    config = ExportConfig(
        str(tmp_path / "model"), str(tmp_path / "out"), budget=128, block=32, weights="fp32"
    )
    bundle = export(config, Progress(quiet=True), Engine)
    (tmp_path / "model" / "processor_config.json").write_text(json.dumps(facts))
    with Runtime.open(bundle.path, threads=1) as runtime:
        (entry,) = bundle.manifest.vision
        assert (entry.size, entry.tokens, entry.rows) == (30, 16, 4)
        runtime.sight = Sight(bundle.path / entry.processor, entry)
        answer = runtime.session().generate(TEXT, PLAIN, images=[pictures[0]])
    prompt = turn("<image>" + TEXT) + "<|im_start|>assistant\n"
    assert list(answer.tokens) == transformers_text(tmp_path / "model", prompt, [pictures[0]])
