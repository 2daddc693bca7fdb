"""Sizes from a config.json, and bytes of stored weights, against sums done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgespec.errors import InputError
from edgespec.shape import PRECISIONS, bytes_codes, bytes_matrix, padded, precision, read_shape, shape_of

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 288,
}


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    shape = read_shape(tmp_path)
    assert (shape.head_dim, shape.tied, shape.gated) == (16, False, True)
    assert shape.matrices() == ((64 + 64, 64), (64, 64), (192, 64), (64, 96))
    assert read_shape(tmp_path / "config.json") == shape
    vision = {"model_type": "mllama", "text_config": LLAMA}
    (tmp_path / "config.json").write_text(json.dumps(vision))
    assert read_shape(tmp_path) == shape


def test_what_families_leave_out() -> None:
    assert shape_of(LLAMA | {"model_type": "qwen3"}, "x").head_dim == 128
    assert shape_of(LLAMA | {"model_type": "gemma2"}, "x").tied
    assert shape_of(LLAMA | {"model_type": "nemotron"}, "x").matrices()[2] == (96, 64)
    assert shape_of({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, "x").kv_heads == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 8}, "x: llama is a mixture of experts (num_local_experts 8)"),
        ({"model_type": "mamba"}, "x: what mamba reads is not known"),
        ({"kv_lora_rank": 512}, "x: what llama with kv_lora_rank reads is not known"),
        ({"num_hidden_layers": None}, "x: num_hidden_layers is None, no size"),
        ({"hidden_size": -1}, "x: hidden_size is -1, no size"),
        ({"vocab_size": 1.5}, "x: vocab_size is 1.5, no size"),
        ({"num_key_value_heads": 3}, "x: 4 heads do not share 3 key-value heads"),
        ({"model_type": None}, "x names no model_type"),
    ],
)
def test_what_cannot_be_counted_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        shape_of(LLAMA | change, "x")
    assert caught.value.message == message


def test_a_file_that_is_no_config(tmp_path: Path) -> None:
    for name, text in (("a.json", "{"), ("b.json", "[1]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError):
            read_shape(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read as a config"):
        read_shape(tmp_path / "none")


def test_stored_bytes_by_hand() -> None:
    assert bytes_matrix("w4", 10, 64) == 320 + 20
    assert bytes_matrix("w8", 10, 64) == 640 + 20
    assert bytes_matrix("w4-g32", 10, 64) == 320 + 2 * 10 * 2
    assert bytes_matrix("int8", 10, 64) == 640 + 80
    assert padded("int4", 64) == (2 + 2) * 32  # two blocks, and one more for the sums' codes, twice
    assert bytes_matrix("int4", 10, 64) == 10 * 64 + 4 * 10 * 4
    assert bytes_matrix("fp16", 10, 64) == 1280
    assert bytes_matrix("fp32", 10, 64) == 2560
    assert (bytes_codes("int4", 10, 64), bytes_codes("w8", 10, 64), bytes_codes("fp16", 10, 64)) == (
        640,
        640,
        0,
    )


def test_weights_alone_meet_floats_on_an_npu() -> None:
    assert (precision("int4", "cpu").arithmetic, precision("int4", "cpu").head) == ("int8", "int8")
    assert (precision("int4", "npu").arithmetic, precision("int4", "npu").head) == ("float", "fp16")
    assert precision("w4a16", "npu") == PRECISIONS["w4a16"]
    with pytest.raises(InputError, match="unknown precision 'w3'") as caught:
        precision("w3", "cpu")
    assert caught.value.hint.startswith("use one of: w4a16, ")
