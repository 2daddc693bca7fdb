"""A Transformers image encoder as one plain module: embedding, pre-norm layers, and the last norm.

ViT, DeiT, DINOv2 (with registers too), SigLIP and CLIP differ in names and in few parts; the table below
holds the names. Knows nothing of pruning, images or graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from edgespec.errors import InputError


@dataclass(frozen=True)
class Names:
    """Where a family keeps its parts; an empty name is a part that it lacks.

    `last` is the norm that is in Transformers' `last_hidden_state`; CLIP's is not.
    """

    layers: str
    norm1: str
    attention: str
    out: str
    norm2: str
    first: str = ""
    last: str = "layernorm"
    scale1: str = ""
    scale2: str = ""


VIT = Names("layers", "layernorm_before", "attention", "o_proj", "layernorm_after")
DINO = Names(
    "encoder.layer", "norm1", "attention", "o_proj", "norm2", scale1="layer_scale1", scale2="layer_scale2"
)
SIGLIP = Names("encoder.layers", "layer_norm1", "self_attn", "out_proj", "layer_norm2", last="post_layernorm")
CLIP = Names(
    "encoder.layers", "layer_norm1", "self_attn", "out_proj", "layer_norm2", first="pre_layrnorm", last=""
)
FAMILIES = {
    "vit": VIT,
    "deit": VIT,
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "siglip_vision_model": SIGLIP,
    "clip_vision_model": CLIP,
    "idefics3_vision": SIGLIP,
    "smolvlm_vision": SIGLIP,
}


class Layer(nn.Module):
    """x + s1 Attention(norm1(x)), then x + s2 MLP(norm2(x)); the parts are the checkpoint's own modules."""

    def __init__(self, layer: Any, names: Names, heads: int) -> None:
        super().__init__()
        attention = getattr(layer, names.attention)
        self.heads = heads
        self.norm1, self.norm2, self.mlp = getattr(layer, names.norm1), getattr(layer, names.norm2), layer.mlp
        self.q, self.k, self.v = attention.q_proj, attention.k_proj, attention.v_proj
        self.out = getattr(attention, names.out)
        self.scale1, self.scale2 = (
            getattr(layer, name) if name else nn.Identity() for name in (names.scale1, names.scale2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B,N,D] -> tokens [B,N,D] and the un-normalised attention QK' [B,H,N,N]."""
        h = self.norm1(x)
        q, k, v = (self.split(part(h)) for part in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        mixed = attention_of(scores, q.shape[-1]) @ v
        x = x + self.scale1(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.scale2(self.mlp(self.norm2(x))), scores

    def keys(self, x: Tensor) -> Tensor:
        """The keys of tokens [B,N,D], [B,H,N,d]."""
        return self.split(self.k(self.norm1(x)))

    def split(self, x: Tensor) -> Tensor:
        """[B,N,H d] -> [B,H,N,d]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Encoder(nn.Module):
    """Pixels [B,3,size,size] -> tokens [B,N,D], N = prefix + patches; as Transformers' last_hidden_state.

    The embedding is a convolution and a table: whatever a family adds to patches (class and register
    tokens, positions, a bias) is what it makes of an image of zeros.
    """

    def __init__(self, model: Any, names: Names, size: int) -> None:
        super().__init__()
        (self.patch,) = (m for m in model.embeddings.modules() if isinstance(m, nn.Conv2d))
        side = self.patch.kernel_size[0]
        if size < side:
            raise InputError(
                f"an image of {size} pixels has no patch of {side}", f"use {side} pixels or more"
            )
        self.size, self.side = size, size // side
        zeros = torch.zeros(1, self.patch.in_channels, size, size)
        with torch.no_grad():
            asked = signature(model.embeddings.forward).parameters
            other: dict[str, Any] = {}
            if "interpolate_pos_encoding" in asked and size != model.config.image_size:
                other["interpolate_pos_encoding"] = True
            if "patch_attention_mask" in asked:  # an image without padding
                other["patch_attention_mask"] = torch.ones(1, self.side, self.side, dtype=torch.bool)
            table = model.embeddings(zeros, **other)
        self.prefix = table.shape[1] - self.side**2
        self.register_buffer("table", table)
        self.first, self.last = (
            getattr(model, name) if name else nn.Identity() for name in (names.first, names.last)
        )
        heads = model.config.num_attention_heads
        self.layers = nn.ModuleList(Layer(one, names, heads) for one in model.get_submodule(names.layers))

    @property
    def tokens(self) -> int:
        """N."""
        return self.table.shape[1]

    @property
    def patches(self) -> int:
        """Tokens that stand for a place of the image."""
        return self.side**2

    def embed(self, pixels: Tensor) -> Tensor:
        """Tokens [B,N,D] before the first layer."""
        conv = self.patch
        patches = nn.functional.conv2d(pixels, conv.weight, None, conv.stride).flatten(2).transpose(1, 2)
        front = self.table[:, : self.prefix].expand(len(pixels), -1, -1)
        return self.first(torch.cat([front, patches + self.table[:, self.prefix :]], 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """The tokens after the last norm."""
        x = self.embed(pixels)
        for layer in self.layers:
            x, _ = layer(x)
        return self.last(x)


def attention_of(scores: Tensor, dim: int) -> Tensor:
    """Un-normalised attention, with heads of `dim` numbers, as weights that sum to 1 over the keys."""
    return (scores * dim**-0.5).softmax(-1)


def encoder_of(model: Any, size: int = 0) -> Encoder:
    """The encoder of a Transformers image model, for square images of `size` pixels (0: its own).

    InputError for a family that is not in the table.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise InputError(f"{kind} is no image encoder known here", f"use one of: {', '.join(FAMILIES)}")
    return Encoder(model.eval(), FAMILIES[kind], size or model.config.image_size).eval()
