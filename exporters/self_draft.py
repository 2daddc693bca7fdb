"""A draft made of a target's own layers, until a trained one ships: the checkpoint with fewer layers."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from edgespec.exporters.checkpoint import Checkpoint, Grid, Weights

LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class LayerView:
    """Weights in which layer i is layer `layers[i]` of another checkpoint's."""

    whole: Weights
    layers: tuple[int, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The same files."""
        return self.whole.files

    def original(self, name: str) -> str:
        """The name in the whole checkpoint."""
        return LAYER.sub(lambda found: str(self.layers[int(found.group())]), name, count=1)

    def names(self) -> frozenset[str]:
        """Every name that this view answers to."""
        shown = {str(layer): str(i) for i, layer in enumerate(self.layers)}
        found = ((name, LAYER.search(name)) for name in self.whole.names())
        return frozenset(
            LAYER.sub(shown[m.group()], name, count=1) if m else name
            for name, m in found
            if not m or m.group() in shown
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """As Weights.shape."""
        return self.whole.shape(self.original(name))

    def tensor(self, name: str) -> Tensor:
        """As Weights.tensor."""
        return self.whole.tensor(self.original(name))

    def grid(self, name: str) -> Grid | None:
        """As Weights.grid."""
        return self.whole.grid(self.original(name))


def draft_of(target: Checkpoint, layers: tuple[int, ...]) -> Checkpoint:
    """The target's checkpoint with these layers only."""
    config: Any = copy.deepcopy(target.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    if getattr(config, "no_rope_layers", None):
        config.no_rope_layers = [config.no_rope_layers[i] for i in layers]
    return replace(target, config=config, weights=LayerView(target.weights, layers))
