"""GGUF files: weights, grid and tokenizer against llama.cpp's layout; damaged files are refused, no more."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import PreTrainedModel

from edgespec.errors import InputError
from edgespec.exporters.checkpoint import Tokenizer, open_checkpoint, vocabularies_differ
from tests.helpers.checkpoints import TOKENS, tiny_model, tokenizer_json, write_directory, write_gguf

torch.set_num_threads(1)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 32},
}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def good(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    write_gguf(path, llama)
    return path.read_bytes()


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path))
    return caught.value


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_grid_and_logits(tmp_path: Path, family: str) -> None:
    model = tiny_model(family, **FAMILIES[family])
    held = write_gguf(tmp_path / "m.gguf", model)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    assert checkpoint.source == "m.gguf" and checkpoint.names() == set(held)
    for name, value in held.items():
        assert torch.equal(checkpoint.tensor(name), value), name
        assert checkpoint.shape(name) == tuple(value.shape)
        grid = checkpoint.grid(name)
        assert (grid is None) == (value.ndim == 1 or "embed" in name)
        if grid is not None:
            assert grid.codes.max() == 15 and grid.codes.dtype == "uint8" and grid.scale.dtype == "float32"
            n, k = grid.codes.shape
            w = grid.scale[..., None] * grid.codes.reshape(n, k // 32, 32) + grid.low[..., None]
            assert torch.equal(torch.from_numpy(w.reshape(n, k)), value), name
    model.load_state_dict(held, strict=False)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(checkpoint.load_model()(ids).logits, model(ids).logits)
    checkpoint.config.save_pretrained(tmp_path / "saved")


def test_tokenizer_of_the_file_is_that_of_the_directory(tmp_path: Path, llama: PreTrainedModel) -> None:
    write_gguf(tmp_path / "m.gguf", llama)
    ours = open_checkpoint(str(tmp_path / "m.gguf")).tokenizer
    theirs = open_checkpoint(str(write_directory(tmp_path / "d", llama))).tokenizer
    assert vocabularies_differ(ours, theirs) == []
    assert (ours.stop_ids, ours.bos_id, ours.chat_template) == ((2,), None, theirs.chat_template)
    a, b = (tokenizers.Tokenizer.from_str(t.tokenizer_json.decode()) for t in (ours, theirs))
    text = "hello world\n<|im_end|> é🙂"
    assert a.encode(text).ids == b.encode(text).ids and a.decode(a.encode(text).ids, False) == text


@pytest.mark.parametrize("pre, pieces", [("llama-bpe", ["123", "4"]), ("qwen2", ["1", "2", "3", "4"])])
def test_pre_tokenizers_split_digits_and_add_the_bos(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    fields = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": True}
    write_gguf(tmp_path / "m.gguf", tiny_model("llama", tie_word_embeddings=True), **fields)
    tokenizer = open_checkpoint(str(tmp_path / "m.gguf")).tokenizer
    loaded = tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json.decode())
    split = loaded.pre_tokenizer.pre_tokenize_str("it's 1234")
    assert tokenizer.bos_id == 1 and loaded.encode("a").ids[0] == 1
    assert [piece for piece, _ in split] == ["it", "'s", "Ġ", *pieces]


def test_user_defined_and_placeholder_tokens(tmp_path: Path, llama: PreTrainedModel) -> None:
    tokens, types = [*TOKENS, "<think>", "[PAD265]"], [3] * 3 + [1] * (len(TOKENS) - 3) + [4, 5]
    write_gguf(
        tmp_path / "m.gguf", llama, **{"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    )
    tokenizer = open_checkpoint(str(tmp_path / "m.gguf")).tokenizer
    loaded = tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json.decode())
    assert loaded.encode("<think>").ids == [len(TOKENS)] and loaded.token_to_id("[PAD265]") is None


REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "architecture": (
        {"general.architecture": "rwkv"},
        "m.gguf has the architecture 'rwkv', and is not one of llama, qwen2, qwen3",
        "safetensors directory",
    ),
    "experts": (
        {"llama.expert_count": 8},
        "m.gguf uses mixture of experts (llama.expert_count)",
        "safetensors",
    ),
    "scaling": (
        {"llama.rope.scaling.type": "yarn"},
        "m.gguf uses yarn RoPE scaling",
        "safetensors directory",
    ),
    "partial": (
        {"llama.rope.dimension_count": 8},
        "m.gguf rotates 8 of 16 dimensions",
        "safetensors directory",
    ),
    "split": ({"split.count": 2}, "m.gguf is one part of a split GGUF file", "llama-gguf-split --merge"),
    "no heads": (
        {"llama.attention.head_count": None},
        "m.gguf says llama.attention.head_count is None, not a positive int",
        "compare its size",
    ),
    "text for a number": (
        {"llama.block_count": "two"},
        "m.gguf says llama.block_count is 'two', not a positive int",
        "compare its size",
    ),
    "other heads": (
        {"llama.attention.head_count": 2, "llama.attention.key_length": 16},
        "m.gguf says 2 x 16 rows, but blk.0.attn_q has 64",
        "compare its size",
    ),
    "endless layers": (
        {"llama.block_count": 2**30},
        "m.gguf says it has 1,073,741,824 layers, but holds 20 tensors",
        "compare its size",
    ),
    "more layers": (
        {"llama.block_count": 3},
        "m.gguf lacks model.layers.2.self_attn.q_proj.weight and 8 more, which LlamaForCausalLM needs",
        "the whole model",
    ),
    "no tokenizer": ({"tokenizer.ggml.model": None}, "m.gguf holds no tokenizer", "with its tokenizer.json"),
    "sentencepiece": (
        {"tokenizer.ggml.model": "llama"},
        "m.gguf has a tokenizer of a kind that is not read (llama, smollm)",
        "with its tokenizer.json",
    ),
    "bad merges": (
        {"tokenizer.ggml.merges": ["x"]},
        "m.gguf has a damaged tokenizer",
        "with its tokenizer.json",
    ),
    "unknown merge": (
        {"tokenizer.ggml.merges": ["he zz"]},
        "m.gguf has a damaged tokenizer",
        "with its tokenizer.json",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_a_file(tmp_path: Path, llama: PreTrainedModel, name: str) -> None:
    fields, message, hint = REFUSALS[name]
    path = tmp_path / "m.gguf"
    write_gguf(path, llama, **fields)
    error = refusal(path)
    assert message in error.message and hint in error.hint
    assert str(tmp_path) not in str(error)


def test_refuses_a_file_cut_anywhere(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.gguf"
    for keep in [*range(0, 64), *range(64, len(good), 997), len(good) - 33]:
        path.write_bytes(good[:keep])
        error = refusal(path)
        assert (
            error.message.startswith("m.gguf is not a usable GGUF file") and "compare its size" in error.hint
        )
    assert "it is cut short, tensor" in error.message


def test_a_damaged_header_is_refused_and_never_loops(tmp_path: Path, good: bytes) -> None:
    path, draw, started = tmp_path / "m.gguf", random.Random(0), time.monotonic()
    header = good.index(b"output_norm")  # about where the tensor table is
    for _ in range(600):
        damaged = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(header + 64)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(str(path))
        except InputError as error:
            assert error.message and error.hint
        else:
            checkpoint.tensor("model.norm.weight")
    assert time.monotonic() - started < 60


def test_a_lying_array_length_is_refused_at_once(tmp_path: Path, good: bytes) -> None:
    """The gguf package's own reader would walk 2^60 elements here."""
    place = good.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    (tmp_path / "m.gguf").write_bytes(good[:place] + struct.pack("<Q", 2**60) + good[place + 8 :])
    assert "its header asks for byte" in refusal(tmp_path / "m.gguf").message


def test_vocabularies_differ_lists_ids_and_both_tokens() -> None:
    def tokenizer(*tokens: str) -> Tokenizer:
        value = tokenizer_json()
        value["model"] |= {"merges": [], "vocab": {t: i for i, t in enumerate(tokens)}}
        return Tokenizer(json.dumps(value).encode(), "", (2,), None)

    plain = tokenizer(*TOKENS)
    last = len(TOKENS)
    assert vocabularies_differ(plain, tokenizer(*TOKENS)) == []
    assert vocabularies_differ(plain, tokenizer(*TOKENS, f"[PAD{last}]", "<|dummy_1|>")) == []
    assert vocabularies_differ(plain, tokenizer(*TOKENS, "new")) == [(last, None, "new")]
    assert vocabularies_differ(tokenizer(*TOKENS, "new"), plain) == [(last, "new", None)]
    assert vocabularies_differ(plain, tokenizer(*TOKENS[:-1], "w2")) == [(last - 1, "Ġw", "w2")]
