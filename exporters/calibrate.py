"""GPTQ: rounds a checkpoint's linear layers to the 4-bit grid so that their outputs change least.

One decoder layer is in memory at a time, read from the checkpoint when the text reaches it. For checkpoints
that do not come on a grid of their own; knows nothing of graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from edgespec.errors import InputError
from edgespec.exporters.checkpoint import Checkpoint, Grid, layer_of
from edgespec.exporters.forms import BLOCK, LEVELS
from edgespec.exporters.step import LargeOnMeta

DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper's code
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # shares of a block's span that are tried
COLUMNS = 128  # columns whose error is carried on lazily


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


def gptq(weight: Tensor, hessian: Tensor) -> tuple[Grid, Tensor]:
    """A weight's codes on the asymmetric grid, and the weight they stand for.

    GPTQ (arXiv 2210.17323, algorithm 1): columns are rounded one after the other, and each one's error is
    spread over those to come by the inverse Hessian of the inputs. The grid is fixed beforehand (grid_of), so
    that columns can be taken in order of falling importance (the authors' later "act-order").
    weight [N,K], hessian X'X [K,K].
    """
    n, k = weight.shape
    hessian = hessian.clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    scales, lows = grid_of(weight, hessian.diagonal())
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


class Streamed(nn.Module):
    """A decoder layer that is read when called, calibrated on what it is called with, and dropped."""

    def __init__(
        self,
        layer: nn.Module,
        path: str,
        checkpoint: Checkpoint,
        wanted: Callable[[str], bool],
        found: Callable[[str, Grid], None],
    ) -> None:
        super().__init__()
        self.layer, self.path, self.checkpoint = layer, path, checkpoint
        self.wanted, self.found = wanted, found
        self.last: tuple[Tensor, Tensor] | None = None  # an input and its Hessian
        for name in ("attention_type", "layer_type"):  # some models look at their layers' kind
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, each linear rounded at the moment it is reached, on inputs already rounded."""
        for name, _ in list(self.layer.named_parameters()):
            place(self.layer, name, self.checkpoint.tensor(f"{self.path}.{name}"))
        linears = [(name, m) for name, m in self.layer.named_modules() if isinstance(m, nn.Linear)]
        handles = [
            m.register_forward_pre_hook(self.rounding(f"{self.path}.{name}.weight")) for name, m in linears
        ]
        out = self.layer(*args, **kwargs)
        for handle in handles:
            handle.remove()
        for name, parameter in list(self.layer.named_parameters()):
            place(self.layer, name, torch.empty(parameter.shape, device="meta"))
        self.last = None
        return out

    def rounding(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A hook that rounds one linear before it multiplies."""

        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if module.in_features % BLOCK or not self.wanted(name):
                return
            if self.last is None or self.last[0] is not given[0]:  # q, k and v read one input
                rows = given[0].reshape(-1, given[0].shape[-1])
                self.last = given[0], rows.T @ rows
            grid, module.weight.data = gptq(module.weight.data, self.last[1])
            self.found(name, grid)

        return hook


def place(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter this value, whatever device it was on."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def needed(checkpoint: Checkpoint) -> bool:
    """True where some matrix of a decoder layer is on no grid of its own."""
    inside = (n for n in checkpoint.names() if layer_of(n) is not None and len(checkpoint.shape(n)) == 2)
    return any(checkpoint.grid(name) is None for name in inside)


def calibrate(
    checkpoint: Checkpoint,
    windows: Tensor,
    rounded: Callable[[str], bool],
    advance: Callable[[int, int], None],
) -> dict[str, Grid]:
    """The grid of every linear inside the decoder's layers that is `rounded` and on no grid, by name.

    windows [n, length] token ids of a text that is not the one a check measures on. InputError where a model
    keeps its layers in an unknown way. Memory: one layer, its Hessians [K,K], and the text's hidden states.
    """
    with LargeOnMeta(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.config)).eval()
    layers = checkpoint.config.num_hidden_layers
    stacks = [
        (path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers
    ]
    if len(stacks) != 1:
        raise InputError(
            f"{checkpoint.source} keeps its decoder layers in an unknown way, so int4 cannot be calibrated",
            "use --weights int8",
        )
    path, stack = stacks[0]
    grids: dict[str, Grid] = {}
    inside = {id(p) for p in stack.parameters()}
    head = model.get_output_embeddings()
    skip = set() if head is None else {id(p) for p in head.parameters()}
    for name, parameter in list(model.named_parameters()):
        if id(parameter) not in inside and (id(parameter) not in skip or name in checkpoint.names()):
            place(model, name, checkpoint.tensor(name))

    def wanted(name: str) -> bool:
        return rounded(name) and checkpoint.grid(name) is None

    def found(name: str, grid: Grid) -> None:
        grids[name] = grid
        advance(int(name[len(path) + 1 :].split(".")[0]) + 1, layers)

    for i, layer in enumerate(stack):
        stack[i] = Streamed(layer, f"{path}.{i}", checkpoint, wanted, found)
    with torch.no_grad():
        model.get_decoder()(input_ids=windows, use_cache=False)
    return grids
