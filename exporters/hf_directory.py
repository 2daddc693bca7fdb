"""A Hugging Face directory: its configuration, and its safetensors weights one tensor at a time.

Never reads pickle, never runs code that came with a checkpoint, never follows an index out of the directory.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from edgespec.errors import InputError
from edgespec.exporters.tokenizer import optional_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")
CONVERT = (
    "convert to safetensors where you trust the file: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, safe_serialization=True)"
)
AGAIN = "download the file again, and compare its size with the original's"
CHOOSE = "choose a causal decoder that Transformers has a class of its own for"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class DirectoryWeights:
    """The safetensors tensors of a directory, single or sharded. No file stays open and no tensor is kept."""

    def __init__(self, directory: Path) -> None:
        self._place: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        index = None if (directory / SINGLE).is_file() else _index(directory)
        shards = sorted(set(index.values())) if index else [SINGLE]
        self.files = tuple(directory / shard for shard in shards)
        for path in self.files:
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    self._place[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())
        for name, shard in (index or {}).items():
            if self._place.get(name) != directory / shard:
                raise InputError(f"{INDEX} says {name} is in {shard}, which does not hold it", AGAIN)

    def names(self) -> frozenset[str]:
        return frozenset(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        # Opened per tensor: the file is mapped while open, and the pages that were read stay in memory.
        with opened(self._place[name]) as file:
            tensor = file.get_tensor(name)
            if tensor.dtype not in FLOATS:
                raise InputError(
                    f"{self._place[name].name} holds {name} as {str(tensor.dtype).removeprefix('torch.')}",
                    "export from the model's float16, bfloat16 or float32 weights",
                )
            return tensor.to(torch.float32, copy=True)

    def grid(self, name: str) -> None:
        return None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open for reading; InputError, naming the file, where it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path.name} is cut short or not safetensors ({error})", AGAIN) from None


def _index(directory: Path) -> dict[str, str]:
    """Parameter name -> shard's file name, every shard checked to be a plain name of a file that is there."""
    if not (directory / INDEX).is_file():
        raise _no_weights(directory)
    index = optional_json(directory / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise InputError(f"{INDEX} has no weight_map", AGAIN)
    for shard in index.values():
        plain = isinstance(shard, str) and Path(shard).name == shard and "\\" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise InputError(
                f"{INDEX} names {shard!r}, which is not a safetensors file of the directory",
                "do not use this checkpoint, or correct its index",
            )
        if not (directory / shard).is_file():
            raise InputError(
                f"{directory.name} lacks {shard}, which its index names", "download the missing shard"
            )
    return index


def _no_weights(directory: Path) -> InputError:
    pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
    if pickles:
        return InputError(
            f"{directory.name} holds pickle weights only ({pickles[0]}), which can run code", CONVERT
        )
    ggufs = sorted(p.name for p in directory.glob("*.gguf"))
    if ggufs:
        return InputError(f"{directory.name} holds no safetensors but {ggufs[0]}", "name that file instead")
    return InputError(
        f"{directory.name} holds no {SINGLE} and no {INDEX}", "download the model's safetensors files"
    )


def directory_config(directory: Path, more: tuple[str, ...] = ()) -> PretrainedConfig:
    """The configuration of a causal decoder that Transformers has code for, or of a model of the kinds
    `more`; others are refused by name.
    """
    if not (directory / "config.json").is_file():
        raise InputError(
            f"{directory.name} has no config.json", "name the directory that save_pretrained wrote"
        )
    raw = optional_json(directory / "config.json")
    kind, architectures = raw.get("model_type"), raw.get("architectures") or []
    if not isinstance(kind, str) or not isinstance(architectures, list):
        raise InputError(f"{directory.name}/config.json names no model_type", "download it again")
    known = {
        **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        **{k: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[k] for k in more},
    }
    causal = [a for a in architectures if a in known.values()]
    if "auto_map" in raw and (kind not in CONFIG_MAPPING or not causal):
        name = architectures[0] if architectures else kind
        raise InputError(f"{name} is code that came with the checkpoint (auto_map), and is never run", CHOOSE)
    if kind not in CONFIG_MAPPING:
        raise InputError(f"model_type {kind!r} is not one that Transformers knows", CHOOSE)
    if raw.get("quantization_config"):
        method = re.search(r'"quant_method": "(\w+)"', json.dumps(raw["quantization_config"]))
        raise InputError(
            f"{directory.name} is already quantised ({method[1] if method else 'quantization_config'})",
            "export from the model's float16, bfloat16 or float32 weights",
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a configuration class raises about a wrong value
        first = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(
            f"{directory.name}/config.json is not a {kind} configuration ({first})", "download it again"
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{kind} is an encoder-decoder", CHOOSE)
    if kind not in known or (architectures and not causal):
        raise InputError(
            f"{architectures[0] if architectures else kind} is not a causal language model", CHOOSE
        )
    return config
