"""Hugging Face directories: what is read is what Transformers reads, and each refusal's text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    T5Config,
)

from edgespec.errors import InputError
from edgespec.exporters.checkpoint import open_checkpoint
from tests.helpers.checkpoints import TEMPLATE, edit_json, tiny_model, write_directory

torch.set_num_threads(1)
IDS = torch.arange(3, 43)[None]
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "granite": {},
    "smollm3": {},
    "olmo2": {},
    "cohere": {},
    "hyperclovax": {},
}


def refusal(word: Path | str) -> InputError:
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(word))
    return caught.value


@pytest.mark.parametrize("family", FAMILIES)
def test_load_model_gives_the_logits_of_transformers(tmp_path: Path, family: str) -> None:
    path = write_directory(tmp_path / "model", tiny_model(family, **FAMILIES[family]))
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(open_checkpoint(str(path)).load_model()(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_are_float32_and_single_and_sharded_agree(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    single = open_checkpoint(str(write_directory(tmp_path / "single", model)))
    sharded = open_checkpoint(str(write_directory(tmp_path / "sharded", model, max_shard_size="100KB")))
    assert len(sharded.weights.files) > 1
    assert single.names() == sharded.names() == set(model.state_dict())
    for name, value in model.state_dict().items():
        for checkpoint in (single, sharded):
            assert checkpoint.tensor(name).dtype == torch.float32
            assert torch.equal(checkpoint.tensor(name), value.float())
            assert checkpoint.shape(name) == tuple(value.shape)
            assert checkpoint.grid(name) is None
    assert re.fullmatch("[0-9a-f]{64}", single.digest) and single.digest != sharded.digest


def test_source_is_the_last_name_and_tied_head_may_be_absent(tmp_path: Path) -> None:
    path = write_directory(tmp_path / "tied", tiny_model("llama", tie_word_embeddings=True))
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.source == "tied" and "lm_head.weight" not in checkpoint.names()
    model = checkpoint.load_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(InputError, match=r"tied has no tensor lm_head\.weight"):
        checkpoint.tensor("lm_head.weight")


def test_reading_tensors_keeps_nothing_in_memory(tmp_path: Path) -> None:
    """A map that stays open would count every page of the file: 160 MB here."""
    model = tiny_model("llama", vocab_size=40_000, hidden_size=512, head_dim=128)
    path = write_directory(tmp_path / "big", model.half())
    code = (
        "import resource, sys, torch; from edgespec.exporters.checkpoint import open_checkpoint\n"
        "c = open_checkpoint(sys.argv[1]); c.tensor('model.embed_tokens.weight')\n"
        "def now(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "before = now(); [c.tensor(n).sum() for n in c.names()]; print(now() - before)"
    )
    grown = int(subprocess.check_output([sys.executable, "-c", code, str(path)]))
    assert grown < 40e6


def test_stop_ids_come_from_every_place_that_names_one(tmp_path: Path) -> None:
    path = write_directory(tmp_path / "model", tiny_model("llama"))
    edit_json(path / "config.json", eos_token_id=10)
    edit_json(path / "generation_config.json", eos_token_id=[11, 12])
    edit_json(path / "tokenizer_config.json", eos_token="<|endoftext|>")
    tokenizer = open_checkpoint(str(path)).tokenizer
    assert tokenizer.stop_ids == (0, 2, 10, 11, 12)  # 0 is the eos token, 2 the template's <|im_end|>
    assert tokenizer.chat_template == TEMPLATE and tokenizer.bos_id is None
    (path / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "plain"}, {"name": "tools", "template": "other"}]
    edit_json(
        path / "tokenizer_config.json", chat_template=named, add_bos_token=True, bos_token="<|im_start|>"
    )
    tokenizer = open_checkpoint(str(path)).tokenizer
    assert (tokenizer.stop_ids, tokenizer.chat_template, tokenizer.bos_id) == ((0, 10, 11, 12), "plain", 1)


def cut(path: Path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def only_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def drop_tensor(path: Path, **changes: torch.Tensor) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file({**tensors, **changes}, path / "model.safetensors")


def index(shard: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / "model.safetensors").rename(path / "a.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))

    return write


def config(**changes: object) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "config.json", **changes)


REFUSALS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "model has no config.json", "save_pretrained"),
    "config not json": (
        lambda p: (p / "config.json").write_text("{"),
        "model/config.json is not JSON",
        "download it again",
    ),
    "config a list": (
        lambda p: (p / "config.json").write_text("[]"),
        "model/config.json is not a JSON object",
        "download",
    ),
    "no model type": (config(model_type=None), "model/config.json names no model_type", "download it again"),
    "unknown type": (
        config(model_type="warp9"),
        "model_type 'warp9' is not one that Transformers knows",
        "choose a causal decoder",
    ),
    "remote code": (
        config(model_type="warp9", architectures=["WarpForCausalLM"], auto_map={"AutoModel": "warp.Warp"}),
        "WarpForCausalLM is code that came with the checkpoint (auto_map), and is never run",
        "choose a causal decoder",
    ),
    "remote class of a known type": (
        config(architectures=["WarpForCausalLM"], auto_map={"AutoModelForCausalLM": "warp.Warp"}),
        "WarpForCausalLM is code that came with the checkpoint",
        "choose a causal decoder",
    ),
    "wrong value": (
        config(hidden_size="many"),
        "model/config.json is not a llama configuration",
        "download it again",
    ),
    "endless layers": (
        config(num_hidden_layers=10**9),
        "model says it has 1,000,000,000 layers, but holds 21 tensors",
        "download the file again",
    ),
    "other shapes": (
        config(intermediate_size=128),
        "model holds model.layers.0.mlp.gate_proj.weight as [96, 64], its configuration as [128, 64]",
        "of different models",
    ),
    "quantised": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "model is already quantised (gptq)",
        "float16, bfloat16 or float32",
    ),
    "classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification is not a causal language model",
        "choose a causal decoder",
    ),
    "pickle": (
        only_pickle,
        "model holds pickle weights only (pytorch_model.bin), which can run code",
        "convert to safetensors",
    ),
    "no weights": (
        lambda p: (p / "model.safetensors").unlink(),
        "model holds no model.safetensors and no model.safetensors.index.json",
        "download the model's safetensors files",
    ),
    "cut short": (
        lambda p: cut(p / "model.safetensors"),
        "model.safetensors is cut short or not safetensors",
        "compare its size",
    ),
    "not safetensors": (
        lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 64),
        "model.safetensors is cut short or not safetensors",
        "compare its size",
    ),
    "lacks a tensor": (
        drop_tensor,
        "model lacks model.norm.weight, which LlamaForCausalLM needs",
        "the whole model",
    ),
    "index out of the directory": (
        index("../a.safetensors"),
        "names '../a.safetensors', which is not a safetensors file of the directory",
        "correct its index",
    ),
    "index of pickle": (
        index("a.bin"),
        "names 'a.bin', which is not a safetensors file",
        "correct its index",
    ),
    "missing shard": (
        index("b.safetensors"),
        "model lacks b.safetensors, which its index names",
        "missing shard",
    ),
    "index lies": (
        index("a.safetensors"),
        "says x is in a.safetensors, which does not hold it",
        "download the file again",
    ),
    "no tokenizer": (
        lambda p: (p / "tokenizer.json").unlink(),
        "model has no tokenizer.json",
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
    ),
    "sentencepiece": (
        lambda p: (p / "tokenizer.json").rename(p / "tokenizer.model"),
        "model has no tokenizer.json (only the SentencePiece tokenizer.model)",
        "save a fast tokenizer",
    ),
    "bad tokenizer": (
        lambda p: cut(p / "tokenizer.json"),
        "model/tokenizer.json is damaged",
        "save the tokenizer again",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_a_directory(tmp_path: Path, name: str) -> None:
    spoil, message, hint = REFUSALS[name]
    path = write_directory(tmp_path / "model", tiny_model("llama"))
    spoil(path)
    error = refusal(path)
    assert message in error.message and hint in error.hint
    assert str(tmp_path) not in str(error) and "\n" not in error.message


def test_refuses_what_is_not_a_causal_decoder(tmp_path: Path) -> None:
    small = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    T5Config(**small, architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    bert = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    assert refusal(tmp_path / "t5").message == "t5 is an encoder-decoder"
    assert refusal(tmp_path / "bert").message == "BertForMaskedLM is not a causal language model"


def test_refuses_integer_weights_when_they_are_read(tmp_path: Path) -> None:
    path = write_directory(tmp_path / "model", tiny_model("llama"))
    drop_tensor(path, **{"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    with pytest.raises(InputError, match=r"model\.safetensors holds model\.norm\.weight as int8"):
        open_checkpoint(str(path)).tensor("model.norm.weight")


def test_refuses_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    error = refusal("some-org/some-model")
    assert error.message == "no checkpoint at some-org/some-model" and "hf download" in error.hint
    (tmp_path / "w.pt").write_bytes(b"x")
    (tmp_path / "w.safetensors").write_bytes(b"x")
    assert refusal(tmp_path / "w.pt").message == "w.pt holds pickle weights, which can run code"
    assert "directory with config.json" in refusal(tmp_path / "w.safetensors").hint
