"""Where a draft comes from: a trained one in the package or a folder, the target's layers, or a checkpoint.

A trained draft is a folder without an embedding and an LM head: both are the target's. Its matrices are int8
with a scale a row, which an int8 export keeps as they are. Knows checkpoints and nothing of graphs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from edgespec import vocabulary
from edgespec.errors import InputError
from edgespec.exporters.checkpoint import (
    DEMO,
    Checkpoint,
    Grid,
    Weights,
    open_checkpoint,
    require_parameters,
    vocabularies_differ,
)
from edgespec.exporters.hf_directory import SINGLE, directory_config, opened
from edgespec.exporters.rounded import by_row
from edgespec.exporters.self_draft import draft_of
from edgespec.exporters.step import refuse_foreign, skeleton
from edgespec.exporters.tokenizer import optional_json
from edgespec.exporters.vision_language import Adapter
from edgespec.files import replaced, written_whole
from edgespec.vocabulary import Vocabulary

FACTS, VOCABULARY, SCHEMA = "draft.json", "vocabulary.json", "edgespec.draft/1"
ADAPTER = "adapter.safetensors"
OWN, OWN_LAYERS = "layers", 2  # the word for a draft of the target's own layers, and how many it has


def open_draft(word: str, target: Checkpoint) -> Checkpoint:
    """The draft a user named, ready to stand beside its target; InputError where it cannot."""
    if word == OWN:
        layers = min(OWN_LAYERS, target.config.get_text_config().num_hidden_layers)
        return replace(draft_of(target, tuple(range(layers))), source=OWN)
    folder = shipped() if word == DEMO else Path(word)
    if word == DEMO or (folder / FACTS).is_file():
        return trained(DEMO if word == DEMO else folder.name, folder, target)
    draft = open_checkpoint(word)
    if differing := vocabularies_differ(target.tokenizer, draft.tokenizer):
        shown = ", ".join(
            f"{i} is {ours!r} in {target.source} and {theirs!r} in {draft.source}"
            for i, ours, theirs in differing[:3]
        )
        raise InputError(
            f"the tokenizers of {target.source} and {draft.source} differ in {len(differing):,} ids: {shown}",
            f"use a draft of the same tokenizer, or --draft {OWN} (two of the target's own layers)",
        )
    return draft


def shipped() -> Path:
    """The folder of the demo's draft."""
    return Path(str(files("edgespec.exporters").joinpath("demo_draft")))


def vocabulary_of(checkpoint: Checkpoint) -> Path | None:
    """The vocabulary file that came with a trained draft."""
    path = checkpoint.weights.files[0].parent / VOCABULARY
    return path if isinstance(checkpoint.weights, Borrowing) and path.is_file() else None


@dataclass(frozen=True)
class Borrowing:
    """A trained draft's own tensors, and the target's for its embedding and head."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    target: Weights
    borrowed: frozenset[str]

    @property
    def files(self) -> tuple[Path, ...]:
        """The draft's own file, and its adapter's."""
        adapter = self.path.parent / ADAPTER
        return (self.path, *([adapter] if adapter.is_file() else []))

    def names(self) -> frozenset[str]:
        """The draft's own parameters and the borrowed ones."""
        return frozenset(self.shapes) | self.borrowed

    def shape(self, name: str) -> tuple[int, ...]:
        """As Weights.shape."""
        return self.target.shape(name) if name in self.borrowed else self.shapes[name]

    def tensor(self, name: str) -> Tensor:
        """As Weights.tensor: codes times their row's scale."""
        if name in self.borrowed:
            return self.target.tensor(name)
        with opened(self.path) as file:
            if len(self.shapes[name]) < 2:
                return file.get_tensor(name).to(torch.float32)
            return (
                file.get_tensor(f"{name}.codes").to(torch.float32) * file.get_tensor(f"{name}.scale")[:, None]
            )

    def grid(self, name: str) -> Grid | None:
        """As Weights.grid: its own matrices are on no 4-bit grid."""
        return self.target.grid(name) if name in self.borrowed else None


def trained(source: str, folder: Path, target: Checkpoint) -> Checkpoint:
    """A folder that `edgespec draft train` wrote; InputError where it was trained for another target."""
    facts = optional_json(folder / FACTS)
    if facts.get("schema") != SCHEMA:
        raise InputError(
            f"{source}/{FACTS} is not of schema {SCHEMA}", "train the draft again with this version"
        )
    if facts.get("tokenizer_sha256") != vocabulary.hash_of(target.tokenizer.tokenizer_json):
        raise InputError(
            f"draft {source} was trained for {facts.get('target')}, whose tokenizer is not {target.source}'s",
            f"train one for it (edgespec draft train {target.source}), or use --draft {OWN}",
        )
    config = directory_config(folder)
    refuse_foreign(config)
    path, shapes = folder / SINGLE, {}
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            shape = tuple(file.get_slice(name).get_shape())
            if name.endswith(".codes"):
                shapes[name.removesuffix(".codes")] = shape
            elif not name.endswith(".scale"):
                shapes[name] = shape
    borrowed = tables(target)
    hidden = target.weights.shape(min(borrowed))[1]
    if hidden != config.hidden_size:
        raise InputError(
            f"draft {source} has a hidden size of {config.hidden_size}, {target.source} of {hidden}",
            f"train one for it (edgespec draft train {target.source}), or use --draft {OWN}",
        )
    weights = Borrowing(path, shapes, target.weights, borrowed)
    require_parameters(f"draft {source}", config, weights)
    adapter = None
    if (folder / ADAPTER).is_file():
        adapter = Adapter.load(folder / ADAPTER)
        fits = (adapter.linear.in_features, adapter.linear.out_features) == (hidden, config.hidden_size)
        if target.images is None or not fits:
            raise InputError(
                f"draft {source} sees pictures by an adapter that is not for {target.source}",
                "train one for it",
            )
    own = (source, config, target.tokenizer, weights, None, adapter)
    return Checkpoint(*own)


def tables(target: Checkpoint) -> frozenset[str]:
    """The names of a checkpoint's embedding and LM head."""
    model = skeleton(target.config).model
    both = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, p in named if id(p) in both) & target.names()


def save_draft(
    folder: Path,
    target: Checkpoint,
    config: Any,
    learned: Mapping[str, Tensor],
    kept: Sequence[int],
    facts: Mapping[str, Any],
) -> None:
    """Write a trained draft's folder, `kept` the ids of its head's rows; draft.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, value in learned.items():
        if value.dim() < 2:
            tensors[name] = value.detach().float().contiguous()
            continue
        codes, scale = by_row(value.detach())
        tensors |= {f"{name}.codes": codes.contiguous(), f"{name}.scale": scale.contiguous()}
    replaced(folder / SINGLE, lambda path: path.write_bytes(save(tensors)))
    digest = vocabulary.hash_of(target.tokenizer.tokenizer_json)
    made = {"by": "edgespec draft train", "target": target.source}
    vocabulary.write(Vocabulary(vocabulary.SCHEMA, digest, tuple(kept), made), folder / VOCABULARY)
    written_whole(folder / "config.json", config.to_json_string())
    said = {"schema": SCHEMA, "target": target.source, "tokenizer_sha256": digest, **facts}
    written_whole(folder / FACTS, json.dumps(said, indent=1) + "\n")
