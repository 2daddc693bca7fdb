"""What a model takes of a device's memory at its peak, against what the device allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from edgespec.profiles import Profile
from edgespec.work import ModelWork


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, and the device's limits (None: unknown). `bytes_spare`: one layer's rows while a
    commit re-lays them. `contexts`: compiled graphs that the largest model must be split into.
    """

    bytes_weights: float
    bytes_caches: float
    bytes_spare: float
    bytes_policy: float
    bytes_activations: float
    bytes_peak: float
    limit_memory: float | None
    fits: bool | None
    contexts: int | None


def memory(models: Mapping[str, ModelWork], profile: Profile) -> Memory:
    """The peak: weights, caches of the largest bucket, a spare layer, what a policy keeps, the widest
    call.
    """
    number = profile.bytes_float.value
    caches = spare = policy = activations = 0.0
    for model in models.values():
        rows = max(step.rows for step in model.steps.values())
        whole = rows * model.bytes_row(number)
        caches, spare = caches + whole, max(spare, whole / model.layers)
        policy += model.bytes_policy * number / 4
        each = model.bytes_activation or number
        widest = max(step.numbers_activations for step in model.steps.values()) / model.layers
        activations = max(activations, widest * each)
    weights = float(sum(model.bytes_weights for model in models.values()))
    peak = weights + caches + spare + policy + activations
    limit, context = profile.value("bytes_memory"), profile.value("bytes_context")
    largest = max(model.bytes_weights for model in models.values())
    contexts = None if context is None else ceil(largest / context)
    fits = None if limit is None else peak <= limit
    return Memory(weights, caches, spare, policy, activations, peak, limit, fits, contexts)
