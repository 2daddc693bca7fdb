"""What a call takes on a device, from what it moves and computes and from the device's profile.

    call = dispatches · dispatch + max(weights/BW_w + kv/BW_kv + activations/BW_a, ops/(rate · efficiency))

A call streams its weights, then its cache, then what passes between its operators: one after the other, on
one memory bus, so their times add. Arithmetic hides behind them, or they behind it. Nothing here is random
or reads a clock: the same work and profile give the same figure.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgespec.errors import InputError
from edgespec.profiles import Profile
from edgespec.work import ModelWork, Work

RESOURCES = ("dispatch", "weights", "kv", "activations", "compute", "host")


@dataclass(frozen=True)
class Times:
    """Seconds of a call by what it waits for; `compute_s` is what arithmetic takes beyond the memory's
    time.
    """

    dispatch_s: float = 0.0
    weights_s: float = 0.0
    kv_s: float = 0.0
    activations_s: float = 0.0
    compute_s: float = 0.0
    host_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All of it."""
        return sum(getattr(self, f"{name}_s") for name in RESOURCES)

    def by_resource(self) -> dict[str, float]:
        """The same as a dict, without the names' unit."""
        return {name: getattr(self, f"{name}_s") for name in RESOURCES}

    def __add__(self, other: Times) -> Times:
        return Times(*(getattr(self, f"{n}_s") + getattr(other, f"{n}_s") for n in RESOURCES))


def call_time(work: Work, profile: Profile) -> Times:
    """What a call takes; InputError where the device does not compute in the call's arithmetic."""
    dispatch = work.dispatches * profile.dispatch_s.value
    plain = work.bytes_weights - work.bytes_widened
    weights = plain / profile.bandwidth_weights_bytes_per_s.value
    weights += work.bytes_widened / profile.bandwidth_widened_bytes_per_s.value
    kv = work.bytes_kv / profile.bandwidth_kv_bytes_per_s.value
    activations = work.bytes_activations / profile.bandwidth_activations_bytes_per_s.value
    compute = work.ops / rate(profile, work.arithmetic) if work.ops else 0.0
    return Times(dispatch, weights, kv, activations, max(0.0, compute - weights - kv - activations))


def rate(profile: Profile, arithmetic: str) -> float:
    """Operations a second that the device sustains in an arithmetic."""
    peak = profile.value(f"ops_{arithmetic}_per_s")
    if peak is None:
        able = ", ".join(profile.precisions()) or "nothing"
        raise InputError(
            f"no rate of {profile.name} is known for {arithmetic} arithmetic (known: {able})",
            "estimate another --precision, or add the figure to a profile of your own",
        )
    return peak * profile.efficiency.value


def copy_time(rows: int, model: ModelWork, profile: Profile) -> Times:
    """What the processor takes to copy cached rows."""
    moved = rows * model.bytes_row(profile.bytes_float.value)
    return Times(host_s=moved / profile.bandwidth_host_bytes_per_s.value)


def sample_time(rows: int, model: ModelWork, profile: Profile, temperature: float) -> Times:
    """The processor's share of a round of so many rows: the loop, and, where it samples, reading the
    logits.

    A greedy token comes out of the graph.
    """
    read = 4 * rows * model.head_rows / profile.bandwidth_host_bytes_per_s.value if temperature > 0 else 0.0
    return Times(host_s=profile.host_s.value + read)
