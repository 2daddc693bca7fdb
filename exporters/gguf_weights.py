"""A GGUF file as Transformers sees it: configuration, parameter names, row order and grid of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from edgespec.errors import InputError
from edgespec.exporters.gguf_file import AGAIN, GgufFile, GgufTensor

FAMILIES = ("llama", "qwen2", "qwen3")
# llama.cpp's llama rotates neighbouring rows, so its converter reorders q and k; not the other families'.
REORDERED = ("llama",)
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What changes the numbers and is not read here: refused by name, never ignored.
FOREIGN = {
    "expert_count": "mixture of experts",
    "attention.sliding_window": "a sliding window",
    "attention.logit_softcapping": "softcap",
    "logit_scale": "a logit scale",
    "embedding_scale": "an embedding scale",
    "residual_scale": "a residual scale",
    "attention.scale": "an attention scale",
}
USE_DIRECTORY = "export from the model's safetensors directory instead"
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Grid:
    """A file's own grid, w = scale * code + low: codes uint8 [N,K] (0..15), scale, low float32 [N,K/32]."""

    codes: np.ndarray
    scale: np.ndarray
    low: np.ndarray


class GgufWeights:
    """The tensors of a GGUF file under their Transformers names, q and k rows in Transformers' order."""

    def __init__(self, file: GgufFile, config: PretrainedConfig) -> None:
        self.file = file
        self.files = (file.path,)
        self._named = {parameter_name(t.name, file): t for t in file.tensors.values()}
        self._heads = {}
        if file.fields["general.architecture"] in REORDERED:
            self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for kind in {t.type for t in file.tensors.values()}:
            require_readable(kind, file.path.name)

    def names(self) -> frozenset[str]:
        return frozenset(self._named)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._named[name].shape

    def tensor(self, name: str) -> Tensor:
        tensor, rows = self._named[name], self._rows(name)
        out = torch.empty(tensor.shape)
        flat = out.numpy().reshape(len(rows), -1)
        # In pieces: dequantize holds its whole result twice.
        for start in range(0, len(rows), ROWS_AT_ONCE):
            flat[start : start + ROWS_AT_ONCE] = dequantize(rows[start : start + ROWS_AT_ONCE], tensor.type)
        return out

    def grid(self, name: str) -> Grid | None:
        if self._named[name].type is not GGMLQuantizationType.Q4_1:
            return None
        return q4_1_grid(self._rows(name))

    def _rows(self, name: str) -> np.ndarray:
        rows = self.file.raw(self._named[name].name)
        heads = self._heads.get(name.split(".")[-2])
        return rows if heads is None else rotary_order(rows, heads)


def rotary_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows in Transformers' order: a head's row h*d/2 + i (h = 0, 1) was stored at 2i + h."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def q4_1_grid(rows: np.ndarray) -> Grid:
    """The grid of Q4_1 rows, uint8 [N, K/32 * 20].

    A block of 32 weights: scale, low (fp16), 16 bytes; weights 0..15 are their low nibbles, the rest high.
    """
    blocks = rows.reshape(len(rows), -1, 20)
    scale, low = (blocks[..., i : i + 2].copy().view(np.float16)[..., 0].astype(np.float32) for i in (0, 2))
    packed = blocks[..., 4:]
    codes = np.concatenate([packed & 15, packed >> 4], -1)
    return Grid(codes.reshape(len(rows), -1), scale, low)


def require_readable(kind: GGMLQuantizationType, file: str) -> None:
    """Refuse a quantisation the gguf package cannot undo, by trying one block of zeros."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise InputError(f"{file} holds {kind.name} tensors, which cannot be read", USE_DIRECTORY) from None


def parameter_name(name: str, file: GgufFile) -> str:
    """The Transformers name of a GGUF tensor; InputError for one that no known family has."""
    *place, module, leaf = name.split(".") if name.count(".") in (1, 3) else ("", "", "")
    if leaf in ("weight", "bias"):
        if not place and module in OUTER:
            return f"{OUTER[module]}.{leaf}"
        if place and place[0] == "blk" and place[1].isdecimal() and module in LAYER:
            return f"model.layers.{int(place[1])}.{LAYER[module]}.{leaf}"
    what = "llama3 RoPE scaling" if module == "rope_freqs" else "a tensor of unknown use"
    raise InputError(f"{file.path.name} has {what} ({name})", USE_DIRECTORY)


def gguf_config(file: GgufFile) -> PretrainedConfig:
    """The configuration that a GGUF file's metadata describes; refuses what it would get wrong."""
    family = file.fields.get("general.architecture")
    if family not in FAMILIES:
        raise InputError(
            f"{file.path.name} has the architecture {family!r}, and is not one of {', '.join(FAMILIES)}",
            USE_DIRECTORY,
        )
    for key, what in FOREIGN.items():
        if file.fields.get(f"{family}.{key}"):
            raise InputError(f"{file.path.name} uses {what} ({family}.{key})", USE_DIRECTORY)
    scaling = file.fields.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"{file.path.name} uses {scaling} RoPE scaling", USE_DIRECTORY)
    if file.fields.get("split.count") not in (None, 0, 1):
        raise InputError(
            f"{file.path.name} is one part of a split GGUF file", "merge the parts: llama-gguf-split --merge"
        )
    if "token_embd.weight" not in file.tensors or "blk.0.attn_q.weight" not in file.tensors:
        raise InputError(f"{file.path.name} has no language model's tensors (token_embd, blk.0)", AGAIN)
    facts = _facts(file, family)
    try:
        return CONFIG_MAPPING[family](**facts)
    except Exception as error:  # whatever a configuration class raises about a wrong value
        raise InputError(f"{file.path.name} describes no {family} model ({error})", AGAIN) from None


def _facts(file: GgufFile, family: str) -> dict[str, Any]:
    def fact(key: str, default: float | None = None, kind: type[int] | type[float] = int) -> Any:
        value: Any = file.fields.get(f"{family}.{key}", default)
        if type(value) is not kind or not 0 < value < 2**31:
            raise InputError(
                f"{file.path.name} says {family}.{key} is {value!r:.60}, not a positive {kind.__name__}",
                AGAIN,
            )
        return value

    embedding: GgufTensor = file.tensors["token_embd.weight"]
    hidden, heads = fact("embedding_length"), fact("attention.head_count")
    kv_heads = fact("attention.head_count_kv", heads)
    head_dim = fact("attention.key_length", hidden // heads)
    rotated = fact("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise InputError(
            f"{file.path.name} rotates {rotated} of {head_dim} dimensions (partial rotary)", USE_DIRECTORY
        )
    for name, count in (("q", heads), ("k", kv_heads)):
        rows = file.tensors.get(f"blk.0.attn_{name}.weight", embedding).shape[0]
        if rows != count * head_dim:
            raise InputError(
                f"{file.path.name} says {count} x {head_dim} rows, but blk.0.attn_{name} has {rows}",
                AGAIN,
            )
    facts = dict(
        architectures=[{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family] + "ForCausalLM"],
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=fact("feed_forward_length"),
        num_hidden_layers=fact("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fact("context_length"),
        # The file keeps float32; its shortest decimal is the number the model was published with.
        rms_norm_eps=float(str(np.float32(fact("attention.layer_norm_rms_epsilon", kind=float)))),
        rope_parameters={"rope_type": "default", "rope_theta": fact("rope.freq_base", 10000.0, float)},
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=file.fields.get("tokenizer.ggml.padding_token_id"),
    )
    if family != "qwen2":  # Qwen2's q, k and v always have a bias, the others' all four or none
        facts["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    return facts
