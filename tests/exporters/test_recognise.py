"""Norms and rotary functions are known by what they compute: a look-alike that differs is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from edgespec.errors import InputError
from edgespec.exporters.recognise import (
    AngleTable,
    LayerAngles,
    Norm,
    angle_table,
    named_rope,
    recognise_norm,
    recognise_rope,
    rope,
)
from edgespec.exporters.step import prepare, skeleton
from tests.helpers import tiny

torch.set_num_threads(1)
SIZE = 24


def rms(x: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


class LookAlikeNorm(nn.Module):
    """A norm by name and attributes; `compute` says what it does."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor], **extra: Any) -> None:
        super().__init__()
        self.weight, self.eps, self.compute = nn.Parameter(torch.ones(SIZE)), 1e-5, compute
        for name, value in extra.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


SAME: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "rms": lambda m, x: m.weight * rms(x, m.eps),
    "rms by norm": lambda m, x: x / (x.norm(dim=-1, keepdim=True).pow(2) / SIZE + m.eps).sqrt() * m.weight,
    "one plus": lambda m, x: (1 + m.weight) * rms(x, m.eps),
    "layer norm": lambda m, x: nn.functional.layer_norm(x, (SIZE,), m.weight, None, m.eps),
}
OTHER: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "epsilon outside the root": lambda m, x: m.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 0.01),
    "another epsilon": lambda m, x: m.weight * rms(x, 10 * m.eps),
    "sum for mean": lambda m, x: m.weight * rms(x, m.eps) / SIZE**0.5,
    "no scale": lambda m, x: rms(x, m.eps),
    "two plus": lambda m, x: (2 + m.weight) * rms(x, m.eps),
    "the first alone": lambda m, x: (
        m.weight * x * torch.rsqrt(x[..., :12].pow(2).mean(-1, keepdim=True) + m.eps)
    ),
    "half centred": lambda m, x: m.weight * rms(x - x.mean(-1, keepdim=True) / 2, m.eps),
    "a hidden bias": lambda m, x: m.weight * rms(x, m.eps) + 0.01,
    "one norm for all rows": lambda m, x: m.weight * x * torch.rsqrt(x.pow(2).mean() + m.eps),
    "clipped": lambda m, x: m.weight * rms(x, m.eps).clamp(-1.5, 1.5),
}


@pytest.mark.parametrize("what", SAME)
def test_what_computes_a_norm_is_one(what: str) -> None:
    module = LookAlikeNorm(SAME[what])
    found = recognise_norm(module)
    assert isinstance(found, Norm) and found.weight is module.weight
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-1, 2, SIZE))
        for scale in (1e-3, 1.0, 300.0):
            x = torch.randn(1, 5, SIZE, generator=torch.Generator().manual_seed(1)) * scale
            torch.testing.assert_close(found(x), module(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", OTHER)
def test_a_look_alike_is_left_alone(what: str) -> None:
    assert recognise_norm(LookAlikeNorm(OTHER[what])) is None


def test_what_is_no_norm_by_shape_is_left_alone() -> None:
    rms_norm = SAME["rms"]
    assert recognise_norm(LookAlikeNorm(rms_norm, bias=nn.Parameter(torch.zeros(SIZE)))) is None
    wide = LookAlikeNorm(rms_norm)
    wide.weight = nn.Parameter(torch.ones(2, SIZE))
    assert recognise_norm(wide) is None
    assert recognise_norm(nn.LayerNorm(SIZE)) is None  # its bias
    nameless = type("Scale", (LookAlikeNorm,), {})(rms_norm)
    assert recognise_norm(nameless) is None
    unknown = LookAlikeNorm(rms_norm)
    del unknown.eps
    assert recognise_norm(unknown) is None


@pytest.mark.parametrize(
    ("module", "centred", "offset"),
    [
        (LlamaRMSNorm(SIZE, 1e-5), False, 0.0),
        (Gemma2RMSNorm(SIZE), False, 1.0),
        (CohereLayerNorm(SIZE), True, 0.0),
    ],
    ids=["llama", "gemma2", "cohere"],
)
def test_transformers_own_norms(module: nn.Module, centred: bool, offset: float) -> None:
    found = recognise_norm(module)
    assert found is not None and (found.centred, found.offset) == (centred, offset)
    on_meta = recognise_norm(copy.deepcopy(module).to("meta"))
    assert on_meta is not None and on_meta.epsilon == found.epsilon


def tables(name: str, **changes: Any) -> tuple[Any, AngleTable]:
    """A family's own rotary module, and the table that stands for it."""
    config = tiny.family_config(name, max_position_embeddings=8192, **changes)
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    table = angle_table(rotary, 8192, config)
    assert isinstance(table, AngleTable)
    return rotary, table


def test_angles_are_the_formula_s_in_fp64() -> None:
    """cos and sin of position x frequency, to the last bit of float32, the model's own frequencies given.

    Transformers holds base^(-2i/d) in float32: 2e-5 of an angle by position 8,191, which training saw.
    """
    rotary, table = tables("qwen2")
    places = torch.arange(8192, dtype=torch.float64)[:, None]
    exact = 10000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    for inverse, error in ((rotary.inv_freq.double(), 1e-7), (exact, 3e-5)):
        for name, want in (("cos", (places * inverse).cos()), ("sin", (places * inverse).sin())):
            assert table.values[name].shape == (8192, 8) and table.values[name].dtype == torch.float32
            assert (table.values[name].double() - want).abs().max() < error


def test_llama3_scaling_is_the_formula_s() -> None:
    """Llama 3's wavelength rule, written out: long waves are stretched, short ones kept, the rest between."""
    _, table = tables("llama")
    scaling = tiny.LLAMA3
    old, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    inverse = []
    for i in range(0, 16, 2):
        wave = 2 * torch.pi * 10000.0 ** (i / 16)
        share = (old / wave - scaling["low_freq_factor"]) / (
            scaling["high_freq_factor"] - scaling["low_freq_factor"]
        )
        share = min(1.0, max(0.0, share))
        inverse.append((share + (1 - share) / factor) * 10000.0 ** (-i / 16))
    angles = torch.arange(8192, dtype=torch.float64)[:, None] * torch.tensor(inverse, dtype=torch.float64)
    assert (table.values["cos"].double() - angles.cos()).abs().max() < 3e-5


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "cohere", "phi3", "smollm3", "glm", "olmo2", "hyperclovax"]
)
def test_angles_are_near_transformers_fp32_at_position_8000(family: str) -> None:
    rotary, table = tables(family)
    places = torch.tensor([[0, 1, 17, 300, 2000, 8000]])
    with torch.no_grad():
        want = rotary(torch.zeros(1), places)
    for ours, theirs in zip(table(torch.zeros(1), places), want, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_a_table_for_each_layer_type() -> None:
    bones = skeleton(tiny.family_config("gemma3"))
    rotary = bones.model.model.rotary_emb
    assert isinstance(rotary, LayerAngles)
    local, whole = (rotary.tables[kind].values["cos"] for kind in ("sliding_attention", "full_attention"))
    assert (local[1] - torch.cos(10000.0 ** -(torch.arange(0, 16, 2) / 16))).abs().max() < 1e-6
    assert (whole[1] - torch.cos(1000000.0 ** -(torch.arange(0, 16, 2) / 16))).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotary_module_whose_scaling_depends_on_the_length_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match=f"rotary scaling '{kind}' depends on the length"):
        angle_table(SimpleNamespace(rope_type=kind), 8, None)
    with pytest.raises(InputError, match=kind):
        angle_table(
            SimpleNamespace(rope_type={"full_attention": kind, "sliding_attention": "default"}), 8, None
        )


class Odd(nn.Module):
    """A rotary module whose angles follow neither layout."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        turned = (
            places[..., None].double() * torch.rand(8, generator=torch.Generator().manual_seed(0)).double()
        )
        angles = {"own": turned, "odd": turned[..., :7], "flat": turned[0]}[self.shape]
        return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    ("shape", "message"), [("own", "every dimension its own angle"), ("odd", "shape"), ("flat", "shape")]
)
def test_angles_of_another_layout_are_refused(shape: str, message: str) -> None:
    with pytest.raises(InputError, match=f"Odd gives .*{message}"):
        AngleTable(Odd(shape), 8, ())


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)


def apply(turn: Callable[[Tensor], Tensor], sign: float = 1) -> Callable[..., tuple[Tensor, Tensor]]:
    """An `apply_rotary_pos_emb` that turns by this rule."""

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        c, s = cos.unsqueeze(1), sign * sin.unsqueeze(1)
        return q * c + turn(q) * s, k * c + turn(k) * s

    return function


def angles(interleaved: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    turned = torch.arange(1.0, 4)[None, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    full = turned.repeat_interleave(2, -1) if interleaved else torch.cat([turned, turned], -1)
    return full.cos(), full.sin(), turned.cos(), turned.sin()


def test_rotary_functions_are_known_by_what_they_turn() -> None:
    assert recognise_rope(apply(halves), *angles(False), 8) is False
    assert recognise_rope(apply(pairs), *angles(True), 8) is True
    assert recognise_rope(apply(halves, -1), *angles(False), 8) is None  # the other way round
    assert recognise_rope(apply(halves), *angles(True), 8) is None  # angles of the other layout
    assert recognise_rope(apply(lambda x: x), *angles(False), 8) is None
    assert recognise_rope(lambda q, k: (q, k), *angles(False), 8) is None
    one = apply(halves)
    assert recognise_rope(lambda *a: (one(*a)[0] * 1.001, one(*a)[1]), *angles(False), 8) is None


def test_a_rotary_function_that_turns_keys_otherwise_is_left_alone() -> None:
    """Bug: only the queries were looked at; a function that scales its keys would have lost the scale."""
    one = apply(halves)
    assert recognise_rope(lambda *a: (one(*a)[0], one(*a)[1] * 2), *angles(False), 8) is None
    assert recognise_rope(lambda *a: (one(*a)[0], a[1]), *angles(False), 8) is None


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_the_first_dimensions_only(interleaved: bool) -> None:
    full_cos, full_sin, cos, sin = angles(interleaved)
    x = torch.randn(1, 2, 3, 12, generator=torch.Generator().manual_seed(0))
    turned = apply(pairs if interleaved else halves)(x[..., :8], x[..., :8], full_cos, full_sin)[0]
    torch.testing.assert_close(rope(x, cos, sin, interleaved), torch.cat([turned, x[..., 8:]], -1))


def test_a_model_with_strange_parts_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was not recognised runs as it was written; the file's own function is put back afterwards."""
    model = tiny.trained_like(tiny.family_config("llama"))
    model.model.layers[0].input_layernorm.forward = lambda x: rms(x, 1e-6).clamp(-1, 1)
    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama,
        "apply_rotary_pos_emb",
        lambda q, k, cos, sin, **more: own(q, k, cos * 0.9, sin, **more),
    )
    strange = modeling_llama.apply_rotary_pos_emb
    prepare(model)
    assert not isinstance(model.model.layers[0].input_layernorm, Norm)
    assert isinstance(model.model.layers[1].input_layernorm, Norm)
    with named_rope(model, 16):
        assert modeling_llama.apply_rotary_pos_emb is strange
    monkeypatch.undo()
    with named_rope(model, 16):
        assert modeling_llama.apply_rotary_pos_emb is not own
    assert modeling_llama.apply_rotary_pos_emb is own
