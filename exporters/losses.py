"""The losses that draw a draft to its target, one function each under its equation. Knows tensors only.

All take the target's K likeliest tokens as a law over the draft's vocabulary: `index` [n, K] columns of the
draft's logits (-1: the vocabulary lacks the token), `p` [n, K] their probabilities, made to sum to 1 over
what is left. `logq` [n, V] is the draft's log-softmax. Each returns the mean over the n places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
MIX = 3.0  # of LK: how fast the loss turns from KL to TV as the two laws meet


def seen(index: Tensor, logq: Tensor) -> Tensor:
    """The draft's log-probabilities [n, K] of the target's likeliest tokens; those it lacks count nothing."""
    return logq.gather(1, index.clamp_min(0)).masked_fill(index < 0, 0.0)


def kl(index: Tensor, p: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q), but for the entropy of p, which is constant: -sum_x p(x) log q(x)."""
    return -(p * seen(index, logq)).sum(1).mean()


def tvd(index: Tensor, p: Tensor, logq: Tensor) -> Tensor:
    """Total variation, 1/2 sum_x |p - q| = 1 - sum_x min(p, q): one minus the chance of acceptance."""
    q = seen(index, logq).exp().masked_fill(index < 0, 0.0)
    return 1 - torch.minimum(p, q).sum(1).mean()


def tvd_plus(index: Tensor, p: Tensor, logq: Tensor, samples: int = 0) -> Tensor:
    """TVD++ (arXiv 2403.00858, section 3.2): the policy gradient of TVD with normalised advantages.

    TVD = 1 - sum_x min(p, q) has the gradient -sum_x r(x) grad q(x) = -E_{x~q}[r(x) grad log q(x)] with the
    reward r(x) = 1 where p(x) > q(x), else 0. TVD++ puts A(x) = (r(x) - mean) / std in the place of r(x),
    mean and std being those of r over the batch under q. Since E_q[grad log q] = 0, a constant mean changes
    nothing in expectation, and 1/std rescales: with the exact sum over the vocabulary (`samples` = 0) the
    direction is TVD's own, place by place, and only the step's length differs. It earns its keep on sampled
    tokens (`samples` > 0 drawn from q a place, with PyTorch's global seed), whose variance the mean takes
    away.
    """
    reward = torch.zeros_like(logq)
    q = logq.detach().exp()
    held = seen(index, logq.detach()).exp()
    better = ((p > held) & (index >= 0)).to(logq.dtype)
    reward.scatter_add_(1, index.clamp_min(0), better)
    if samples:
        drawn = torch.multinomial(q, samples, replacement=True)
        got, weight = reward.gather(1, drawn), torch.full_like(drawn, 1 / samples, dtype=logq.dtype)
        advantage = (got - got.mean()) / got.std().clamp_min(1e-4)
        return -(weight * advantage * logq.gather(1, drawn)).sum(1).mean()
    mean = (q * reward).sum(1).mean()
    spread = ((q * (reward - mean).square()).sum(1).mean()).sqrt().clamp_min(1e-4)
    return -(q * (reward - mean) / spread * logq).sum(1).mean()


def lk(index: Tensor, p: Tensor, logq: Tensor) -> Tensor:
    """LK: w KL + (1 - w) TV with w = exp(-MIX a), a = sum_x min(p, q) the place's chance of acceptance.

    w is a constant to the gradient. Far from the target KL leads, near it what counts: the acceptance itself.
    """
    q = seen(index, logq)
    accepted = torch.minimum(p, q.exp().masked_fill(index < 0, 0.0)).sum(1)
    weight = (-MIX * accepted.detach()).exp()
    return (weight * -(p * q).sum(1) + (1 - weight) * (1 - accepted)).mean()


LOSSES: dict[str, Loss] = {"kl": kl, "tvd": tvd, "tvd++": tvd_plus, "lk": lk}
