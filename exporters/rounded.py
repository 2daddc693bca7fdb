"""A Transformers model whose linear layers multiply as an int8 bundle's do: fast, and the shipped target's
law.

Knows PyTorch only. Where the processor multiplies bytes (AVX-512 VNNI), four times as fast as float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEAST, MOST = -128, 127


def by_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [N, K] as int8 codes and a scale a row [N]; the largest of a row has the code 127 or -127."""
    scale = weight.abs().amax(1).clamp_min(1e-12) / MOST
    return (weight / scale[:, None]).round().clamp(-MOST, MOST).to(torch.int8), scale


class Rounded(nn.Module):
    """x [..., K] -> x W' with a scale and a zero point a row of x and a scale an output channel of W [N, K].

    y = s_r s_w (acc - z_r colsum(W)): the asymmetric form of `--weights int8` (forms.py), in PyTorch.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        codes, scale = by_row(weight)
        self.codes, self.scale, self.bias = codes.t(), scale, bias
        self.total = codes.sum(1, dtype=torch.int32).float()

    def forward(self, x: Tensor) -> Tensor:
        """The product, in float32."""
        rows = x.reshape(-1, x.shape[-1])
        low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
        scale = ((high - low) / (MOST - LEAST)).clamp_min(1e-12)
        zero = (LEAST - low / scale).round()
        codes = (rows / scale).round_().add_(zero).clamp_(LEAST, MOST).to(torch.int8)
        y = torch._int_mm(codes, self.codes).float()
        y = y.sub_(zero * self.total).mul_(scale).mul_(self.scale)
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], -1)


def rounded(model: Any) -> Any:
    """The model with every linear layer, the head too, replaced in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                bias = None if child.bias is None else child.bias.detach()
                setattr(module, name, Rounded(child.weight.detach(), bias))
    return model
