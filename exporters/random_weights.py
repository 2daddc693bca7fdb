"""Weights for a config.json that has none: what a model costs on a device is known before its weights are.

The numbers mean nothing, and every bundle made of them says so (`random:` before its source's name).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from edgespec.exporters.tokenizer import Tokenizer

SPREAD = 0.02  # Transformers' usual initializer_range


class RandomWeights:
    """Normal numbers of these shapes, the same for a name at every call; gains are 1 and biases 0.

    `files` is the configuration alone: nothing else decides what they are.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: Path) -> None:
        self._shapes = dict(shapes)
        self.files = (config,)

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) < 2:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape).normal_(0.0, SPREAD, generator=draw)

    def grid(self, name: str) -> None:
        return None


def byte_tokenizer(stop_ids: tuple[int, ...]) -> Tokenizer:
    """A tokenizer of 256 bytes, for a folder that has none: a prompt is then as many tokens as bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return Tokenizer(made.to_str().encode(), "", stop_ids, None)
