"""HyperCLOVA X in the native runtime: its text is Transformers', a turn ends where its template says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgespec.config import ExportConfig
from edgespec.exporters import export
from edgespec.exporters.checkpoint import open_checkpoint
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.runtime.session import Runtime, Settings
from tests.helpers import tiny
from tests.helpers.checkpoints import edit_json, tokenizer_json, write_directory
from tests.helpers.operators import opener

PROMPTS = (
    "hello there",
    "안녕하세요? 오늘 뭐 해요",
    "the quick brown fox jumps over the lazy dog, and again",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|endofturn|>", "<|stop|>")
BLOCK = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
ANSWER = "<|im_start|>assistant{{ '\\n' }}"  # Jinja takes a bare last line's end away
CHATML = f"{{% for m in messages %}}{BLOCK}\n{{% endfor %}}{ANSWER}"
ENDED = "{% if m.role == 'assistant' %}<|endofturn|>{% endif %}"
TURNS = f"{{% for m in messages %}}{BLOCK}{ENDED}\n{{% endfor %}}{ANSWER}"


def say(runtime: Runtime, ids: list[int], **how: Any) -> list[int]:
    session = runtime.session()
    session.generate(ids, replace(Settings(max_new_tokens=40), **how))
    tokens = session.tokens
    session.close()
    return tokens[len(ids) :]


def test_greedy_text_is_that_of_transformers_generate(opened: Callable[..., Runtime], source: Path) -> None:
    runtime = opened("hyperclovax", policy="none", budget=112)
    model = open_checkpoint(str(source.parent / "hyperclovax")).load_model()
    stops = list(runtime.bundle.manifest.tokenizer.stop_ids)
    for prompt in PROMPTS:
        ids = runtime.encode_raw(prompt)
        given = torch.tensor([ids])
        wanted = model.generate(given, max_new_tokens=40, do_sample=False, eos_token_id=stops, pad_token_id=0)
        for drafter in ("none", "ngram"):
            assert say(runtime, ids, drafter=drafter) == wanted[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "form", [{"weights": "int8"}, {"weights": "int4"}, {"weights": "fp16", "device": "npu"}], ids=str
)
def test_text_is_the_same_with_a_draft_while_rows_leave(
    opened: Callable[..., Runtime], form: dict[str, str]
) -> None:
    draft = {"draft": "layers", "draft_budget": 32, "draft_rows": 200}
    runtime = opened("hyperclovax", policy="keydiff", **form, **draft)
    entry = runtime.bundle.model("target")
    for prompt in PROMPTS:
        ids = runtime.encode_raw(prompt * 9)[:60]
        plain = say(runtime, ids, drafter="none")
        assert len(ids) + len(plain) > entry.cache.slots  # rows left
        assert say(runtime, ids, drafter="draft", stop_rule="fixed") == plain
        if entry.widths_agree:
            engine, out = Engine(runtime.bundle.path, entry, 1, opener), list[int]()
            stops = set(runtime.bundle.manifest.tokenizer.stop_ids)
            out.append(int(engine.prefill(ids).argmax()))
            while len(out) < 40 and out[-1] not in stops:
                out.append(engine.step(out[-1]))
            assert plain == out


def follower(path: Path, template: str, after: dict[str, str]) -> Path:
    """A checkpoint whose likeliest token is fixed by the token before: what `after` says, else that token."""
    content = tokenizer_json(SPECIAL)
    ids = content["model"]["vocab"]
    model = tiny.trained_like(tiny.family_config("hyperclovax", eos_token_id=0))
    with torch.no_grad():
        for layer in model.model.layers:  # nothing is added to a token's own row
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table = torch.nn.functional.normalize(
            torch.randn(288, 64, generator=torch.Generator().manual_seed(1))
        )
        model.model.embed_tokens.weight.copy_(table)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.copy_(table)
        model.lm_head.weight[[ids[token] for token in {*after, *after.values()}]] = 0
        for token, following in after.items():
            model.lm_head.weight[ids[following]] += table[ids[token]]
    write_directory(path, model)
    (path / "tokenizer.json").write_text(json.dumps(content))
    (path / "chat_template.jinja").write_text(template)
    edit_json(path / "tokenizer_config.json", eos_token="<|endoftext|>")
    return path


@pytest.fixture
def answered(tmp_path: Path) -> Iterator[Callable[..., tuple[str, str]]]:
    """What a follower answers to a chat, and why it ended."""

    def ask(template: str, after: dict[str, str]) -> tuple[str, str]:
        source = follower(tmp_path / "source", template, after)
        sizes: dict[str, Any] = {"budget": 48, "block": 16, "widths": (2,), "weights": "fp32"}
        config = ExportConfig(str(source), str(tmp_path / "bundle"), sinks=2, recent=4, **sizes)
        export(config, Progress(quiet=True), Engine)
        with Runtime.open(config.output, threads=1) as runtime:
            session = runtime.session()
            answer = session.generate("h", Settings(max_new_tokens=12))
            return answer.text, answer.ended

    yield ask


CASES: dict[str, tuple[str, dict[str, str], tuple[str, str]]] = {
    # what ends a ChatML turn
    "im_end": (CHATML, {"Ċ": "t", "t": "<|im_end|>", "<|im_end|>": "a"}, ("t", "stop")),
    # a block ends, the turn goes on: the answer is behind the reasoning
    "endofturn": (
        TURNS,
        {"Ċ": "t", "t": "<|im_end|>", "<|im_end|>": "a", "a": "<|endofturn|>"},
        ("ta", "stop"),
    ),
    # a tool is called, which no template of this chat writes
    "stop": (TURNS, {"Ċ": "t", "t": "<|im_end|>", "<|im_end|>": "<|stop|>"}, ("t", "stop")),
    "eos": (TURNS, {"Ċ": "t", "t": "<|endoftext|>"}, ("t", "stop")),
    "none of them": (TURNS, {"Ċ": "t", "t": "<|im_start|>", "<|im_start|>": "t"}, ("tttttt", "length")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_turn_ends_where_the_template_says(answered: Callable[..., tuple[str, str]], case: str) -> None:
    template, after, wanted = CASES[case]
    assert answered(template, after) == wanted
