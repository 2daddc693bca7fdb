"""Trains ToSA's selectors on a frozen encoder, and keeps them in a file. Knows encoders and selectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edgespec.errors import InputError
from edgespec.exporters.tosa import Pruned, Selector, by_truth, received
from edgespec.exporters.vision_encoder import Encoder, attention_of
from edgespec.files import replaced

SCHEMA = "edgespec.selectors/1"


def fresh(encoder: Encoder, seed: int) -> dict[int, Selector]:
    """A selector for every second layer, which is nearly the attention before it."""
    torch.manual_seed(seed)
    return {number: Selector(encoder.layers[0].heads) for number in Pruned.layers(encoder)}


@torch.no_grad()
def seen(encoder: Encoder, pixels: Tensor, numbers: Iterable[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """{layer: (QK' of the layer before it, its own true attention)}, each [B,H,N,N], in the whole encoder."""
    found, x, before = {}, encoder.embed(pixels), torch.empty(0)
    wanted = set(numbers)
    for number, layer in enumerate(encoder.layers):
        x, scores = layer(x)
        if number in wanted:
            found[number] = before, attention_of(scores, x.shape[-1] // layer.heads)
        before = scores
    return found


def loss_of(encoder: Encoder, selectors: Mapping[int, Selector], pixels: Tensor) -> Tensor:
    """The mean KL(true || predicted) of attention rows over layers, heads and queries, in nats."""
    losses = []
    for number, (scores, true) in seen(encoder, pixels, selectors).items():
        predicted = selectors[number](scores, encoder.table.shape[-1] // encoder.layers[0].heads)
        losses.append((true * (true.clamp_min(1e-12).log() - predicted)).sum(-1).mean())
    return torch.stack(losses).mean()


def train(
    encoder: Encoder,
    selectors: Mapping[int, Selector],
    batches: Iterable[Tensor],
    rate: float,
    steps: int,
    advance: Callable[[int, int], None],
) -> list[float]:
    """Change the selectors in place, one step a batch; the losses. InputError where a loss is no number."""
    weights = [p for one in selectors.values() for p in one.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    for step, pixels in zip(range(steps), batches, strict=False):
        loss = loss_of(encoder, selectors, pixels)
        if not torch.isfinite(loss):
            raise InputError(f"the loss of step {step} is {loss.item()}", "use a lower --rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        advance(step + 1, steps)
    return losses


@torch.no_grad()
def overlap(encoder: Encoder, selectors: Mapping[int, Selector], pixels: Tensor, ratio: float) -> float:
    """The mean part of the patches that the true attention would choose which the selectors choose too."""
    x, found, before = encoder.embed(pixels), [], torch.empty(0)
    count = max(1, round(ratio * encoder.patches))
    for number, layer in enumerate(encoder.layers):
        if number in selectors:
            dim = x.shape[-1] // layer.heads
            ranks = by_truth(number, layer, x, before), received(selectors[number](before, dim).exp())
            chosen = [torch.zeros_like(r[:, encoder.prefix :]) for r in ranks]
            for one, rank in zip(chosen, ranks, strict=True):
                one.scatter_(1, rank[:, encoder.prefix :].topk(count, 1).indices, 1.0)
            found.append((chosen[0] * chosen[1]).sum(1).mean() / count)
        x, before = layer(x)
    return float(torch.stack(found).mean())


def write(path: Path, selectors: Mapping[int, Selector], digest: str, facts: Mapping[str, object]) -> None:
    """The selectors as safetensors, with the digest of the model that they belong to; whole or not at all."""
    tensors = {
        f"{n}.{name}": p.detach().contiguous()
        for n, s in selectors.items()
        for name, p in s.named_parameters()
    }
    held = {"schema": SCHEMA, "model_sha256": digest, "facts": facts}
    metadata = {"edgespec": json.dumps(held)}  # one key: the order of several is not the same in every run
    replaced(path, lambda temporary: temporary.write_bytes(save(tensors, metadata=metadata)))


def read(path: Path, encoder: Encoder, digest: str) -> dict[int, Selector]:
    """The selectors of a file; InputError where it is damaged or belongs to another model."""
    again = "make it again: edgespec vision train-selector"
    selectors = fresh(encoder, 0)
    try:
        with safe_open(path, framework="pt") as file:
            held = json.loads((file.metadata() or {}).get("edgespec", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path.name} is no file of selectors ({error})", again) from None
    if held.get("schema") != SCHEMA:
        raise InputError(f"{path.name} is not of schema {SCHEMA}", again)
    if held.get("model_sha256") != digest:
        raise InputError(f"{path.name} was trained for another model", again)
    wanted = {f"{n}.{name}": p for n, s in selectors.items() for name, p in s.named_parameters()}
    if {n: tuple(t.shape) for n, t in tensors.items()} != {n: tuple(p.shape) for n, p in wanted.items()}:
        raise InputError(f"{path.name} does not fit the model's layers and heads", again)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return selectors
