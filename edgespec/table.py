"""A table of call costs as `edgespec tune` writes it, predicted for a device instead of measured.

The runtime's `cost` rule decides by such a table how much to draft; only ratios matter there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgespec.bundle import Bundle
from edgespec.latency import call_time, sample_time
from edgespec.profiles import Profile
from edgespec.work import ModelWork

FILLED = 4  # a cache is a quarter full, as `tune` measures


def name_of(profile: Profile) -> str:
    """What a table made from a profile is called, in the runtime's figures and in a trace."""
    return f"profile {profile.name}"


def predicted_table(bundle: Bundle, models: Mapping[str, ModelWork], profile: Profile) -> dict[str, Any]:
    """Microseconds of each verify width (1 is decode), of a draft's step and of its prefill, the processor's
    share included.
    """
    target = models["target"]
    calls = [("decode", 1)] if target.widths("decode") else []
    calls += [("verify", width) for width in target.widths("verify")]
    verify = {str(width): _microseconds(target, kind, width, profile) for kind, width in calls}
    table: dict[str, Any] = {
        "name": name_of(profile),
        "verify": verify,
        "widths_agree": bundle.model("target").widths_agree,
    }
    if draft := models.get("draft"):
        for name, kind in (("draft", "draft"), ("draft_prefill", "prefill")):
            table[name] = _microseconds(draft, kind, draft.widths(kind)[-1], profile)
    return table


def _microseconds(model: ModelWork, kind: str, width: int, profile: Profile) -> float:
    filled = model.budget // FILLED
    work = model.call(kind, width, model.bucket(filled + width), filled, profile.bytes_float.value)
    host = sample_time(width, model, profile, 0.0).total_s if model.name == "target" else 0.0
    return (call_time(work, profile).total_s + host) * 1e6
