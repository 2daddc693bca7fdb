"""Tiny checkpoints on disk: a byte-level tokenizer, a random model, and its GGUF form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Q
from tokenizers import pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "Ġ"), ("Ġ", "w")]
TOKENS = [*CONTROL, *LETTERS, *("".join(pair) for pair in MERGES)]
SIZES: dict[str, Any] = dict(
    vocab_size=288,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def tokenizer_json(special: Sequence[str] = CONTROL) -> dict[str, Any]:
    """A byte-level BPE; the first tokens are special (by default three, of 264 tokens)."""
    tokens = [*special, *LETTERS, *("".join(pair) for pair in MERGES)]
    added = [
        dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for i, t in enumerate(special)
    ]
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    model = dict(type="BPE", vocab={t: i for i, t in enumerate(tokens)}, merges=[list(m) for m in MERGES])
    return dict(version="1.0", added_tokens=added, pre_tokenizer=level, decoder=level, model=model)


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random two-layer model of a family, the same on every call."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # norms other than 1 and biases other than 0, or a mix-up would not show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def write_directory(path: Path, model: PreTrainedModel, **save: Any) -> Path:
    """A Hugging Face directory with the tiny tokenizer."""
    model.save_pretrained(path, **save)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def stored_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """q or k rows as llama.cpp's converter stores them (its `permute`, written out)."""
    half = len(rows) // heads // 2
    order = [h * 2 * half + p * half + i for h in range(heads) for i in range(half) for p in (0, 1)]
    return rows[order]


def write_gguf(path: Path, model: PreTrainedModel, **fields: Any) -> dict[str, torch.Tensor]:
    """Write a model as a GGUF file (linears Q4_1, embedding Q8_0); returns the weights that it then holds.

    Names come from the gguf package's own map. `fields` replace metadata; None leaves one out.
    """
    config, family = model.config, model.config.model_type
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", family))
    for key, value in {**_fields(config, family), **fields}.items():
        _add(writer, key, value)
    held = {}
    for name, parameter in model.named_parameters():
        stem, leaf = name.rsplit(".", 1)
        kind = Q.F32 if parameter.ndim == 1 else Q.Q8_0 if "embed" in name else Q.Q4_1
        data = parameter.detach().numpy()
        held[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(data, kind), kind).copy())
        if family == "llama" and stem.split(".")[-1] in heads:
            data = stored_order(data, heads[stem.split(".")[-1]])
        writer.add_tensor(f"{names.get_name(stem)}.{leaf}", gguf.quantize(data, kind), raw_dtype=kind)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return held


def _fields(config: Any, family: str) -> dict[str, Any]:
    model = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim if family == "qwen3" else None,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    tokenizer = {
        "model": "gpt2",
        "pre": "smollm" if family == "llama" else "qwen2",
        "tokens": TOKENS,
        "token_type": [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)),
        "merges": [" ".join(m) for m in MERGES],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    }
    return {
        **{f"{family}.{k}": v for k, v in model.items()},
        **{f"tokenizer.ggml.{k}": v for k, v in tokenizer.items()},
        "tokenizer.chat_template": TEMPLATE,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
