"""Finds a model's norms, rotary tables and rotary function by what they compute, and names them.

A part is replaced by one operator of ours only if it gave the same numbers on random input, whatever it is
called
and whatever family it comes from; what is not recognised stays as the model wrote it.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgespec.errors import InputError
from edgespec.exporters.attention import CALL

TOLERANCE = 1e-5


@torch.library.custom_op("edgespec::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor, epsilon: float, centred: bool, offset: float) -> Tensor:
    """RMS norm (or, `centred`, layer norm without bias) over the last axis, times (weight + offset)."""
    y = x.float()
    if centred:
        y = y - y.mean(-1, keepdim=True)
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + epsilon) * (weight.float() + offset)).to(
        x.dtype
    )


@norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float, centred: bool, offset: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("edgespec::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first 2r of d dimensions: x [1,H,S,d], cos and sin [1,S,r].

    Pairs (i, i+r), or (2i, 2i+1) if interleaved.
    """
    r = cos.shape[-1]
    head, tail = x[..., : 2 * r], x[..., 2 * r :]
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else (head[..., :r], head[..., r:])
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    pair = (a * c - b * s, a * s + b * c)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, tail], -1)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty_like(x)


class Norm(nn.Module):
    """A recognised norm; keeps the parameter's name."""

    def __init__(self, weight: nn.Parameter, epsilon: float, centred: bool, offset: float) -> None:
        super().__init__()
        self.weight, self.epsilon, self.centred, self.offset = weight, epsilon, centred, offset

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return norm(x, self.weight, self.epsilon, self.centred, self.offset)


class Double(TorchFunctionMode):
    """Runs a module's own code in fp64 although it says float32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`.float()` and `.to(torch.float32)` become their fp64 twins."""
        if function is Tensor.float:
            return args[0].double()
        swap = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        return function(
            *[swap(a) for a in args], **{key: swap(value) for key, value in (kwargs or {}).items()}
        )


class AngleTable(nn.Module):
    """cos and sin by position, built in fp64 by the model's own rotary module: an NPU's fp16 angles are
    garbage by 1,000.

    Buffers hold the half that differs, [positions, r]; the model sees the layout it expects, [1,S,2r].
    """

    def __init__(self, rotary: nn.Module, positions: int, extra: tuple[Any, ...]) -> None:
        super().__init__()
        with Double(), torch.no_grad():
            cos, sin = rotary(torch.zeros(1, dtype=torch.float64), torch.arange(positions)[None], *extra)
        if cos.dim() != 3 or cos.shape[-1] % 2:
            raise InputError(
                f"{type(rotary).__name__} gives angles of shape {tuple(cos.shape)}, "
                "not [1, positions, dimensions]",
                "this rotary embedding is not supported; choose another model",
            )
        r = cos.shape[-1] // 2
        self.interleaved = bool(torch.equal(cos[..., 0::2], cos[..., 1::2]))
        if not self.interleaved and not torch.equal(cos[..., :r], cos[..., r:]):
            raise InputError(
                f"{type(rotary).__name__} gives every dimension its own angle", "choose another model"
            )
        half = (lambda t: t[0, :, 0::2]) if self.interleaved else (lambda t: t[0, :, :r])
        self.values = {"cos": half(cos).float().contiguous(), "sin": half(sin).float().contiguous()}
        for name, value in self.values.items():  # a skeleton's buffers lose their data; its `values` do not
            self.register_buffer(name, value)

    def spread(self, half: Tensor) -> Tensor:
        """[1,S,r] -> [1,S,2r] in the layout that the model's own code expects."""
        return half.repeat_interleave(2, -1) if self.interleaved else torch.cat([half, half], -1)

    def forward(self, x: Tensor, position_ids: Tensor, *extra: Any) -> tuple[Tensor, Tensor]:
        """positions [1,S] -> cos, sin [1,S,2r] in the model's layout."""
        cos, sin = (
            nn.functional.embedding(position_ids, self.cos),
            nn.functional.embedding(position_ids, self.sin),
        )
        full = self.spread(cos), self.spread(sin)
        CALL.angles.append((full[0], cos, sin))
        return full


class LayerAngles(nn.Module):
    """The rotary module of a model whose layer types turn differently (Gemma3): one table per layer type."""

    def __init__(self, rotary: nn.Module, positions: int, kinds: list[str]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({kind: AngleTable(rotary, positions, (kind,)) for kind in kinds})

    def forward(self, x: Tensor, position_ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """As AngleTable, for one layer type."""
        return self.tables[kind](x, position_ids)


def angle_table(rotary: nn.Module, positions: int, config: Any) -> nn.Module:
    """The table that stands for this rotary module (which must be on the CPU).

    Scaling that depends on the length is refused.
    """
    kinds = (
        rotary.rope_type
        if isinstance(getattr(rotary, "rope_type", None), dict)
        else {"": getattr(rotary, "rope_type", "default")}
    )
    for kind in kinds.values():
        if "dynamic" in str(kind) or kind == "longrope":
            raise InputError(
                f"rotary scaling {kind!r} depends on the length of the text",
                "choose a checkpoint with a fixed scaling",
            )
    if "" in kinds:
        return AngleTable(rotary, positions, ())
    return LayerAngles(rotary, positions, sorted(set(config.layer_types)))


def recognise_norm(module: nn.Module) -> Norm | None:
    """The Norm that computes what this module computes, or None."""
    weight = getattr(module, "weight", None)
    if (
        "norm" not in type(module).__name__.lower()
        or weight is None
        or weight.dim() != 1
        or getattr(module, "bias", None) is not None
    ):
        return None
    epsilon = next(
        (getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)),
        None,
    )
    if epsilon is None:
        return None
    trial = copy.deepcopy(module).float()
    if weight.device.type == "meta":
        trial = trial.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        trial.weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
        x = torch.randn(1, 3, weight.shape[0], generator=generator) + 0.3
        x = torch.cat([x, x / 300])  # small rows tell one epsilon from another
        want = trial(x)
        for centred in (False, True):
            for offset in (0.0, 1.0):
                made = norm(x, trial.weight, float(epsilon), centred, offset)
                if torch.allclose(made, want, atol=TOLERANCE, rtol=TOLERANCE):
                    return Norm(weight, float(epsilon), centred, offset)
    return None


def recognise_rope(
    apply: Callable[..., Any], cos: Tensor, sin: Tensor, half_cos: Tensor, half_sin: Tensor, dim: int
) -> bool | None:
    """Whether this function turns pairs interleaved (True) or by halves (False); None: neither."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, cos.shape[1], dim, generator=generator) for heads in (3, 2))
    turned = 2 * half_cos.shape[-1]
    for width in {dim, turned}:  # some files cut the dimensions that turn before they call it
        with contextlib.suppress(TypeError, RuntimeError, ValueError):  # another signature, other shapes
            made_q, made_k = apply(q[..., :width], k[..., :width], cos, sin)
            for interleaved in (False, True):
                if turned <= dim and all(
                    torch.allclose(rope(x[..., :width], half_cos, half_sin, interleaved), y, atol=TOLERANCE)
                    for x, y in ((q, made_q), (k, made_k))
                ):
                    return interleaved
    return None


@contextlib.contextmanager
def named_rope(model: nn.Module, dim: int) -> Iterator[None]:
    """Within it the model file's `apply_rotary_pos_emb` emits our operator, if it was recognised."""
    module: Any = sys.modules[type(model).__module__]
    original = getattr(module, "apply_rotary_pos_emb", None)
    tables = [m for m in model.modules() if isinstance(m, AngleTable)]
    if original is None or not tables:
        yield
        return
    places, kinds = torch.arange(1, 4)[None], set()
    for table in tables:
        half_cos, half_sin = table.values["cos"][places], table.values["sin"][places]
        kinds.add(
            recognise_rope(original, table.spread(half_cos), table.spread(half_sin), half_cos, half_sin, dim)
        )
    if len(kinds) != 1 or None in kinds:
        yield
        return
    interleaved = kinds.pop()

    def apply(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        halves = next(((c, s) for full, c, s in CALL.angles if full is cos), None)
        if halves is None:
            return original(q, k, cos, sin, *args, **kwargs)
        return rope(q, *halves, interleaved), rope(k, *halves, interleaved)

    module.apply_rotary_pos_emb = apply
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = original
