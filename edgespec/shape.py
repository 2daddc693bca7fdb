"""A decoder's sizes from its config.json, and what its parts take in a stated precision. Knows no graph.

Letters: L layers, h hidden, H heads, KV key-value heads, d head dimension, f feed-forward, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgespec.errors import InputError

GATED = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "smollm3", "olmo2"}
    | {"cohere", "cohere2", "hyperclovax", "glm", "stablelm"}
)
UNGATED = frozenset({"phi", "nemotron"})
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TIED = ("gemma2", "gemma3_text", "cohere", "cohere2", "smollm3")  # where the file does not say
HEAD_DIM = {"gemma2": 256, "gemma3_text": 256, "qwen3": 128}
STRANGE = ("ssm_cfg", "state_size", "linear_num_value_heads", "kv_lora_rank", "layers_block_type")
BLOCK = 32  # inputs that share a scale where a form has blocks


@dataclass(frozen=True)
class Shape:
    """A dense decoder. `gated`: the feed-forward has two matrices h -> f, else one."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    gated: bool = True

    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of a layer's products: q, k and v in one; o; up with the gate; down."""
        attention, cached = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        up = (2 if self.gated else 1) * self.ffn
        sizes = ((attention + cached, self.hidden), (self.hidden, attention))
        return (*sizes, (up, self.hidden), (self.hidden, self.ffn))


@dataclass(frozen=True)
class Precision:
    """How a model is stored: the forms of its linears, head and embedding, the bytes of a cached number and
    of an activation (None: the device's float), and the arithmetic of its products.
    """

    name: str
    linear: str
    head: str
    embedding: str
    bytes_cached: float | None
    bytes_activation: float | None
    arithmetic: str


# w4a16: 4-bit linears, 8-bit head, 16-bit activations, 8-bit KV, as Qualcomm's AI Hub publishes. The last
# four are the forms that `edgespec export` writes; caches and activations are floats there.
PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("w4a16", "w4", "w8", "fp16", 1, 2, "int16"),
        Precision("w8a16", "w8", "w8", "fp16", 1, 2, "int16"),
        Precision("w8a8", "w8", "w8", "fp16", 1, 1, "int8"),
        Precision("w4-fp16act", "w4", "w8", "fp16", 2, 2, "float"),
        Precision("w4a8-g32", "w4-g32", "w8", "w8", 4, 4, "int8"),
        Precision("bf16", "fp16", "fp16", "fp16", 2, 2, "float"),
        Precision("int4", "int4", "int8", "int8", None, None, "int8"),
        Precision("int8", "int8", "int8", "int8", None, None, "int8"),
        Precision("fp16", "fp16", "fp16", "fp16", None, None, "float"),
        Precision("fp32", "fp32", "fp32", "fp32", None, None, "float"),
    )
}


def precision(name: str, kind: str) -> Precision:
    """The precision of this name on a device of this kind (npu, cpu), or an InputError that lists them.

    On an NPU the forms that `edgespec export` writes are weights alone: they meet floats, and the head of an
    int4 bundle is fp16 there.
    """
    if name not in PRECISIONS:
        raise InputError(f"unknown precision {name!r}", f"use one of: {', '.join(PRECISIONS)}")
    stored = PRECISIONS[name]
    if kind == "cpu" or stored.bytes_activation is not None:
        return stored
    head = "fp16" if stored.linear == "int4" else stored.head
    return replace(stored, head=head, embedding="fp16", arithmetic="float")


def padded(form: str, k: int) -> int:
    """Inputs that a product of this form multiplies: int4 adds codes for the sums of its blocks, twice."""
    if form != "int4":
        return k
    blocks = -(-k // BLOCK)
    return (blocks + 2 * -(-blocks // BLOCK)) * BLOCK


def bytes_matrix(form: str, n: int, k: int) -> int:
    """Stored bytes of a weight [n,k].

    w4 and w8 have one float16 scale an output; w4-g32 one for every 32 inputs; int8 a scale and a sum,
    int4 a float32 scale for every 32 codes.
    """
    wide = padded(form, k)
    sizes = {
        "w4": n * k // 2 + 2 * n,
        "w8": n * k + 2 * n,
        "w4-g32": n * k // 2 + 2 * n * -(-k // BLOCK),
        "int4": n * wide // 2 + 4 * n * wide // BLOCK,
        "int8": n * k + 8 * n,
        "fp16": 2 * n * k,
        "fp32": 4 * n * k,
    }
    return sizes[form]


def bytes_codes(form: str, n: int, k: int) -> int:
    """Of a stored weight's bytes, those that are codes of 4 or 8 bits."""
    return n * padded(form, k) * {"w4": 4, "w4-g32": 4, "int4": 4, "w8": 8, "int8": 8}.get(form, 0) // 8


def read_shape(path: Path | str) -> Shape:
    """The sizes in a config.json, or in the folder that holds one; refused where the model is no plain
    decoder.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        data = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        hint = "give a bundle, a config.json, or a folder with one"
        raise InputError(f"{file} cannot be read as a config: {error}", hint) from None
    if not isinstance(data, dict):
        raise InputError(f"{file} holds no object", "give a Hugging Face config.json")
    return shape_of(data.get("text_config", data), str(file))


def shape_of(config: Any, where: str) -> Shape:
    """The sizes in a config's data; `where` only names it in errors."""
    family = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(family, str):
        raise InputError(f"{where} names no model_type", "give a Hugging Face config.json")
    for name in EXPERTS:
        if config.get(name):
            hint = "only dense decoders can be estimated: which experts a token reads is not known"
            raise InputError(f"{where}: {family} is a mixture of experts ({name} {config[name]})", hint)
    strange = next((name for name in STRANGE if config.get(name)), None)
    if family not in GATED | UNGATED or strange:
        what = f"{family} with {strange}" if strange else family
        hint = f"use one of: {', '.join(sorted(GATED | UNGATED))}"
        raise InputError(f"{where}: what {what} reads is not known", hint)
    heads = _size(config, where, "num_attention_heads")
    hidden = _size(config, where, "hidden_size")
    kv_heads = _size(config, where, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(
            f"{where}: {heads} heads do not share {kv_heads} key-value heads", "correct the file"
        )
    return Shape(
        family,
        _size(config, where, "num_hidden_layers"),
        hidden,
        heads,
        kv_heads,
        _size(config, where, "head_dim", HEAD_DIM.get(family, hidden // heads)),
        _size(config, where, "intermediate_size"),
        _size(config, where, "vocab_size"),
        bool(config.get("tie_word_embeddings", family in TIED)),
        family in GATED,
    )


def _size(config: dict[str, Any], where: str, name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 2**31:
        raise InputError(f"{where}: {name} is {value!r}, no size", "give a Hugging Face config.json")
    return value
