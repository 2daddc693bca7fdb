"""The scores by which a commit ranks a layer's rows, one pure function each.

A new policy is one function and one row of SCORES.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-6  # least square of a length; a floor, because the optimizer of torch.onnx.export drops `+ 1e-12`


def keydiff(keys: Tensor) -> Tensor:
    """Score each row by how little its key resembles the others (higher = keep).

    KeyDiff (arXiv 2504.15364, equation 6): s_j = -cos(k_j, mean_i k_i/‖k_i‖), the mean over all M rows.
    keys [KV,M,d] after RoPE -> scores [KV,M].
    """
    small = keys / 16  # or the square of a key of length 256 leaves the range of an NPU's fp16
    unit = small * torch.rsqrt(small.pow(2).sum(-1, keepdim=True).clamp(min=TINY))
    anchor = unit.mean(1, keepdim=True)
    anchor = anchor * torch.rsqrt(anchor.pow(2).sum(-1, keepdim=True).clamp(min=TINY))
    return -(unit * anchor).sum(-1)


def sinks(keys: Tensor) -> Tensor:
    """Score each row by its age: the newest stay, and what the policy protects (StreamingLLM, arXiv
    2309.17453).

    keys [KV,M,d] -> scores [KV,M].
    """
    return (
        torch.arange(keys.shape[1], dtype=keys.dtype, device=keys.device).expand(keys.shape[0], -1)
        / keys.shape[1]
    )


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"keydiff": keydiff, "sinks": sinks}
