"""Each loss against its definition over the whole vocabulary, and TVD++'s gradient against autograd of the
definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgespec.exporters.losses import kl, lk, tvd, tvd_plus

V, N = 7, 5


@pytest.fixture(name="case")
def _case() -> tuple[Tensor, Tensor, Tensor]:
    """Logits that ask for a gradient, and the target's whole law as (index, p): every token is among its
    likeliest."""
    torch.manual_seed(1)
    p, index = torch.randn(N, V).softmax(-1).sort(descending=True)
    return torch.randn(N, V, requires_grad=True), index, p


def laws(logits: Tensor, index: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """p and q over the vocabulary in its own order."""
    return torch.zeros(N, V).scatter(1, index, p), logits.softmax(-1)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def test_values(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, index, p = case
    whole, q = laws(*case)
    logq = logits.log_softmax(-1)
    cross = kl(index, p, logq) + (whole * whole.log()).sum(1).mean()
    torch.testing.assert_close(cross, torch.nn.functional.kl_div(q.log(), whole, reduction="batchmean"))
    torch.testing.assert_close(tvd(index, p, logq), 0.5 * (whole - q).abs().sum(1).mean())


def test_a_token_that_the_vocabulary_lacks_counts_nothing(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, index, p = case
    gone = index.clone()
    gone[:, -1] = -1
    p = p.masked_fill(gone < 0, 0)
    logq = logits.log_softmax(-1)
    for loss in (kl, tvd, tvd_plus, lk):
        shorter = loss(index[:, :-1], p[:, :-1], logq)
        torch.testing.assert_close(loss(gone, p, logq), shorter)
        torch.testing.assert_close(gradient(loss(gone, p, logq), logits), gradient(shorter, logits))


def test_tvd_plus_is_the_gradient_of_tvd_rescaled(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """The policy gradient with exact sums points where TVD's own does, place by place, 1/std as long."""
    logits, index, p = case
    whole, q = laws(*case)
    exact = gradient(0.5 * (whole - q).abs().sum(1).mean(), logits)
    found = gradient(tvd_plus(index, p, logits.log_softmax(-1)), logits)
    reward = (whole > q).float()
    mean = (q * reward).sum(1).mean()
    spread = (q * (reward - mean).square()).sum(1).mean().sqrt()
    torch.testing.assert_close(found, (exact / spread).detach())


def test_tvd_plus_of_samples_tends_to_the_exact_one(case: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, index, p = case
    exact = gradient(tvd_plus(index, p, logits.log_softmax(-1)), logits)
    sampled = gradient(tvd_plus(index, p, logits.log_softmax(-1), samples=200_000), logits)
    torch.testing.assert_close(sampled, exact, atol=3e-3, rtol=0.05)


def test_lk_lies_between(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """Where the laws meet its gradient is TVD's, where they share nothing KL's."""
    _, index, p = case
    near = p.gather(1, index.argsort(1)).log().requires_grad_()
    far = torch.full((N, V), -30.0).scatter(1, index[:, -1:], 0.0).requires_grad_()
    one = p.clone()
    one[:, 1:] = 0
    one[:, 0] = 1
    for logits, law, pure in ((far, one, kl),):
        logq = logits.log_softmax(-1)
        torch.testing.assert_close(
            gradient(lk(index, law, logq), logits), gradient(pure(index, law, logq), logits)
        )
    logq = near.log_softmax(-1)
    assert lk(index, p, logq) < 0.06 * kl(index, p, logq)
