"""Runs a checkpoint's decoder over texts, one layer in memory at a time; whoever calls sees what happens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from edgespec.errors import InputError
from edgespec.exporters.checkpoint import Checkpoint
from edgespec.exporters.step import LargeOnMeta

Around = Callable[[nn.Module, str], AbstractContextManager[None]]


class Streamed(nn.Module):
    """A decoder layer that is read when called, called within `around(layer, path)`, and dropped."""

    def __init__(self, layer: nn.Module, path: str, checkpoint: Checkpoint, around: Around) -> None:
        super().__init__()
        self.layer, self.path, self.checkpoint, self.around = layer, path, checkpoint, around
        for name in ("attention_type", "layer_type"):  # some models look at their layers' kind
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        for name, _ in list(self.layer.named_parameters()):
            place(self.layer, name, self.checkpoint.tensor(f"{self.path}.{name}"))
        with self.around(self.layer, self.path):
            out = self.layer(*args, **kwargs)
        for name, parameter in list(self.layer.named_parameters()):
            place(self.layer, name, torch.empty(parameter.shape, device="meta"))
        return out


def place(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter this value, whatever device it was on."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def streamed(
    checkpoint: Checkpoint,
    windows: Tensor,
    around: Around,
    positions: Tensor | None = None,
    head: bool = False,
    attention: str | None = None,
) -> None:
    """Run windows [n, length] of token ids through the decoder, each layer within `around(layer, path)`, then
    through the LM head, where wanted, within `around(head, "head")`, a window at a time.

    `positions` [n, length] are the tokens' (from 0 on, if not given). `attention` names a function of
    Transformers' interface, which is given no mask. InputError where a model keeps its layers in an unknown
    way. Memory: one layer, embedding and head, and the windows' hidden states.
    """
    with LargeOnMeta(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.config)).eval()
    if attention is not None:
        model.set_attn_implementation(attention)
    layers = checkpoint.config.num_hidden_layers
    stacks = [
        (path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers
    ]
    if len(stacks) != 1:
        raise InputError(
            f"{checkpoint.source} keeps its decoder layers in an unknown way, so it cannot be calibrated",
            "use --weights int8, or fp16 on an npu",
        )
    path, stack = stacks[0]
    inside = {id(p) for p in stack.parameters()}
    output = model.get_output_embeddings()
    stored = checkpoint.names()
    tied = not any(m is output and f"{name}.weight" in stored for name, m in model.named_modules())
    ends = set() if output is None else {id(p) for p in output.parameters()}
    for name, parameter in list(model.named_parameters()):
        if id(parameter) not in inside and (id(parameter) not in ends or name in stored):
            place(model, name, checkpoint.tensor(name))
    for i, layer in enumerate(stack):
        stack[i] = Streamed(layer, f"{path}.{i}", checkpoint, around)
    with torch.no_grad():
        given = {} if positions is None else {"position_ids": positions}
        hidden = model.get_decoder()(input_ids=windows, use_cache=False, **given).last_hidden_state
        if not head:
            return
        if tied:
            output.weight = model.get_input_embeddings().weight
        with around(output, "head"):
            for window in hidden:
                output(window)
