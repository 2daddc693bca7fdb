"""GPTQ: rounds a checkpoint's linear layers to the 4-bit grid so that their outputs change least.

One decoder layer is in memory at a time, read from the checkpoint when the text reaches it. For checkpoints
that do not come on a grid of their own; knows nothing of graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from edgespec.exporters.checkpoint import Checkpoint, Grid, layer_of
from edgespec.exporters.grids import BLOCK, LEVELS, MIDDLE4
from edgespec.exporters.streaming import streamed

DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper's code
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # shares of a block's span that are tried
COLUMNS = 128  # columns whose error is carried on lazily
GridRule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # weight [N,K], importance [K] -> scale, low


def grid_of(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """scale and low [N,K/32] of each block: the share of its span whose rounding error weighs least.

    importance [K] is the Hessian's diagonal: an input that is never large may be rounded badly.
    """
    blocks = weight.reshape(len(weight), -1, BLOCK)
    weigh = importance.reshape(-1, BLOCK)
    least, most = blocks.amin(-1), blocks.amax(-1)
    best = torch.full_like(least, torch.inf)
    scale, low = torch.zeros_like(least), torch.zeros_like(least)
    for share in SHRINK:
        trim = (most - least) * (1 - share) / 2
        for shift in (0.0, 1.0, 2.0) if share < 1 else (0.0,):  # cut off above, on both sides, below
            at = least + shift * trim
            step = ((most - least) * share / LEVELS).clamp_min(1e-12)
            codes = ((blocks - at[..., None]) / step[..., None]).round().clamp(0, LEVELS)
            error = ((codes * step[..., None] + at[..., None] - blocks).pow(2) * weigh).sum(-1)
            better = error < best
            best, scale, low = (
                torch.where(better, x, y) for x, y in ((error, best), (step, scale), (at, low))
            )
    return scale, low


def steps_of(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a grid around 0 whose scales are whole steps of their output's (forms.CodedBlocks)."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    weigh = importance.reshape(-1, BLOCK)
    most = blocks.abs().amax(-1) / (MIDDLE4 - 1)
    size = (most.amax(1, keepdim=True) / LEVELS).clamp_min(1e-12)
    best = torch.full_like(most, torch.inf)
    scale = torch.zeros_like(most)
    for share in SHRINK:
        tried = (most * share / size).ceil().clamp(1, LEVELS) * size
        codes = (blocks / tried[..., None]).round().clamp(-MIDDLE4, MIDDLE4 - 1)
        error = ((codes * tried[..., None] - blocks).pow(2) * weigh).sum(-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    return scale, -MIDDLE4 * scale


def gptq(weight: Tensor, hessian: Tensor, rule: GridRule = grid_of) -> tuple[Grid, Tensor]:
    """A weight's codes on the asymmetric grid, and the weight they stand for.

    GPTQ (arXiv 2210.17323, algorithm 1): columns are rounded one after the other, and each one's error is
    spread over those to come by the inverse Hessian of the inputs. The grid is fixed beforehand (`rule`), so
    that columns can be taken in order of falling importance (the authors' later "act-order").
    weight [N,K], hessian X'X [K,K].
    """
    n, k = weight.shape
    hessian = hessian.clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    scales, lows = rule(weight, hessian.diagonal())
    order = hessian.diagonal().argsort(descending=True)
    left, hessian = weight[:, order], hessian[order][:, order]
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    scale, low = scales[:, order // BLOCK], lows[:, order // BLOCK]
    codes, rounded = torch.zeros(n, k, dtype=torch.uint8), torch.zeros_like(weight)
    for start in range(0, k, COLUMNS):
        end = min(start + COLUMNS, k)
        errors = torch.zeros(n, end - start)
        for i in range(start, end):
            code = ((left[:, i] - low[:, i]) / scale[:, i]).round().clamp(0, LEVELS)
            value = code * scale[:, i] + low[:, i]
            codes[:, order[i]], rounded[:, order[i]] = code.to(torch.uint8), value
            error = (left[:, i] - value) / inverse[i, i]
            left[:, i:end] -= error[:, None] * inverse[i, i:end]
            errors[:, i - start] = error
        left[:, end:] -= errors @ inverse[start:end, end:]
    return Grid(codes.numpy(), scales.numpy(), lows.numpy()), rounded


class Rounding:
    """Rounds each linear of a layer at the moment it is reached, on inputs already rounded."""

    def __init__(
        self, wanted: Callable[[str], bool], found: Callable[[str, Grid], None], grid: GridRule
    ) -> None:
        self.wanted, self.found, self.grid = wanted, found, grid
        self.last: tuple[Tensor, Tensor] | None = None  # an input and its Hessian

    @contextlib.contextmanager
    def around(self, layer: nn.Module, path: str) -> Iterator[None]:
        """The layer's linears round themselves before they multiply."""
        linears = [(name, m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]
        handles = [m.register_forward_pre_hook(self.hook(f"{path}.{name}.weight")) for name, m in linears]
        yield
        for handle in handles:
            handle.remove()
        self.last = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """What rounds one linear."""

        def rounds(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if module.in_features % BLOCK or not self.wanted(name):
                return
            if self.last is None or self.last[0] is not given[0]:  # q, k and v read one input
                rows = given[0].reshape(-1, given[0].shape[-1])
                self.last = given[0], rows.T @ rows
            grid, module.weight.data = gptq(module.weight.data, self.last[1], self.grid)
            self.found(name, grid)

        return rounds


def needed(checkpoint: Checkpoint) -> bool:
    """True where some matrix of a decoder layer is on no grid of its own."""
    inside = (n for n in checkpoint.names() if layer_of(n) is not None and len(checkpoint.shape(n)) == 2)
    return any(checkpoint.grid(name) is None for name in inside)


def calibrate(
    checkpoint: Checkpoint,
    windows: Tensor,
    rounded: Callable[[str], bool],
    advance: Callable[[int, int], None],
    rule: GridRule = grid_of,
) -> dict[str, Grid]:
    """The grid of every linear inside the decoder's layers that is `rounded`, by name; by the default rule,
    of those that are on no grid of their own.

    windows [n, length] token ids of a text that is not the one a check measures on. InputError where a model
    keeps its layers in an unknown way. Memory: one layer, its Hessians [K,K], and the text's hidden states.
    """
    grids: dict[str, Grid] = {}
    layers = checkpoint.config.num_hidden_layers

    def wanted(name: str) -> bool:
        return rounded(name) and (rule is not grid_of or checkpoint.grid(name) is None)

    def found(name: str, grid: Grid) -> None:
        grids[name] = grid
        advance((layer_of(name) or 0) + 1, layers)

    streamed(checkpoint, windows, Rounding(wanted, found, rule).around)
    return grids
