"""A vision-language checkpoint in two: its decoder under a causal model's names, and what makes an image's
rows of a prompt, the image encoder with its projector.

LLaVA and Idefics3 (SmolVLM): features take the places of an image's tokens and are attended to like any row.
Knows checkpoints and encoders, nothing of graphs.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from edgespec.errors import InputError
from edgespec.exporters.vision_encoder import Encoder, encoder_of
from edgespec.files import replaced

if TYPE_CHECKING:
    from edgespec.exporters.checkpoint import Checkpoint, Weights
    from edgespec.exporters.gguf_weights import Grid


@dataclass(frozen=True)
class Family:
    """Where a family's model keeps its decoder, its image encoder and its projector."""

    text: str
    encoder: str
    projector: str


LLAVA = Family("model.language_model", "model.vision_tower", "model.multi_modal_projector")
IDEFICS = Family("model.text_model", "model.vision_model", "model.connector")
FAMILIES = {"llava": LLAVA, "idefics3": IDEFICS, "smolvlm": IDEFICS}
OLDER = (  # names in files -> the model's own
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^(model\.vision_tower)\.vision_model\.", r"\1."),
)
HEAD = "lm_head."
ADAPTER = "edgespec.adapter/1"
UNUSED = ("head.", "pooler.")  # of an encoder: what features do not need


@dataclass(frozen=True)
class Renamed:
    """Weights under other names than their files': `places` maps ours to theirs."""

    whole: Weights
    places: Mapping[str, str]

    @property
    def files(self) -> tuple[Path, ...]:
        """The same files."""
        return self.whole.files

    def names(self) -> frozenset[str]:
        """Every name that this view answers to."""
        return frozenset(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """As Weights.shape."""
        return self.whole.shape(self.places[name])

    def tensor(self, name: str) -> Tensor:
        """As Weights.tensor."""
        return self.whole.tensor(self.places[name])

    def grid(self, name: str) -> Grid | None:
        """As Weights.grid."""
        return self.whole.grid(self.places[name])


@dataclass(frozen=True, eq=False)
class ImageSide:
    """What a vision-language checkpoint has beside its decoder: the whole configuration, all weights under
    the model's names, and the folder with its processor.
    """

    config: Any
    weights: Renamed
    folder: Path

    @property
    def family(self) -> Family:
        """Where its parts are."""
        return FAMILIES[self.config.model_type]


def named(weights: Weights) -> Renamed:
    """All weights under the names of Transformers' model, whatever version of it wrote them."""
    places = {}
    for name in weights.names():
        ours = name
        for pattern, better in OLDER:
            ours = re.sub(pattern, better, ours)
        places[ours] = name
    return Renamed(weights, places)


def decoder_of(side: ImageSide) -> tuple[Any, Renamed]:
    """The decoder's configuration, and its weights under the names of a causal model."""
    prefix = side.family.text + "."
    places = {
        "model." + name.removeprefix(prefix) if name.startswith(prefix) else name: place
        for name, place in side.weights.places.items()
        if name.startswith((prefix, HEAD))
    }
    config = copy.deepcopy(side.config.get_text_config())
    config.tie_word_embeddings = bool(side.config.tie_word_embeddings) or f"{HEAD}weight" not in places
    return config, Renamed(side.weights.whole, places)


class Projected(nn.Module):
    """Pixels [1,3,size,size] -> an image's rows of a prompt [1,rows,hidden], through an encoder (`way`) of
    whose tokens the projector takes those from `first` on.
    """

    def __init__(self, way: nn.Module, projector: nn.Module, first: int) -> None:
        super().__init__()
        self.way, self.projector, self.first = way, projector, first

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        features: Tensor = self.projector(self.way(pixels)[:, self.first :])
        return features


class Adapter(nn.Module):
    """What a draft sees of a picture: the means of `rows` equal runs of the target's rows, through a linear
    layer of its own. After arXiv 2404.08856, whose draft has an image adapter, too; so small a one is ours.
    """

    def __init__(self, rows: int, given: int, hidden: int) -> None:
        super().__init__()
        self.rows, self.linear = rows, nn.Linear(given, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """[n,R,given] -> [n,rows,hidden]; R is a multiple of rows."""
        made: Tensor = self.linear(features.unflatten(1, (self.rows, -1)).mean(2))
        return made

    def save(self, path: Path) -> None:
        """As safetensors; whole or not at all."""
        held = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        data = save(held, metadata={"edgespec": json.dumps({"schema": ADAPTER, "rows": self.rows})})
        replaced(path, lambda temporary: temporary.write_bytes(data))

    @classmethod
    def load(cls, path: Path) -> Adapter:
        """The adapter in a file; InputError where it is none."""
        again = "train the draft again"
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads((file.metadata() or {}).get("edgespec", "{}"))
                held = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path.name} is no adapter ({error})", again) from None
        weight, rows = held.get("linear.weight"), said.get("rows")
        right = said.get("schema") == ADAPTER and type(rows) is int and rows > 0
        if not right or weight is None or weight.dim() != 2:
            raise InputError(f"{path.name} is not of schema {ADAPTER}", again)
        made = cls(rows, weight.shape[1], weight.shape[0])
        try:
            made.load_state_dict(held)
        except RuntimeError:
            raise InputError(f"{path.name} holds other tensors than an adapter has", again) from None
        return made.eval()


class ForBoth(nn.Module):
    """Pixels -> a target's rows, and a draft's through its adapter."""

    def __init__(self, projected: Projected, adapter: Adapter) -> None:
        super().__init__()
        self.projected, self.adapter = projected, adapter

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[1,3,size,size] -> [1,rows,hidden], [1,draft rows,draft hidden]."""
        features = self.projected(pixels)
        return features, self.adapter(features)


def encoder_and_projector(side: ImageSide, source: str) -> tuple[Encoder, nn.Module, int]:
    """The encoder up to the layer whose features are used, the projector, and the first token it takes.

    InputError where weights are missing, or features come from several layers.
    """
    config = side.config
    layer = getattr(config, "vision_feature_layer", None)
    if layer is not None and not isinstance(layer, int):
        raise InputError(
            f"{source} takes features of {len(layer)} layers of its image encoder",
            "one layer's can be exported",
        )
    model = shell(config)
    for path in (side.family.encoder, side.family.projector):
        fill(model.get_submodule(path), path, side.weights, source)
    encoder = encoder_of(model.get_submodule(side.family.encoder))
    if layer is not None:  # as Transformers counts hidden states: 0 is the embedding
        count = layer if layer >= 0 else len(encoder.layers) + 1 + layer
        if not 1 <= count <= len(encoder.layers):
            said = (
                f"{source} takes features of layer {layer}, and its image encoder has {len(encoder.layers)}"
            )
            raise InputError(said, "download its config.json again")
        # The last hidden state is that after the last norm, but of SigLIP.
        if count < len(encoder.layers) or config.vision_config.model_type == "siglip_vision_model":
            encoder.layers, encoder.last = encoder.layers[:count], nn.Identity()
    skips = getattr(config, "vision_feature_select_strategy", "full") == "default"
    return encoder, model.get_submodule(side.family.projector).eval(), int(skips)


def shell(config: Any) -> Any:
    """The whole model, its decoder with neither layers nor a vocabulary: only the image side is wanted."""
    bare = copy.deepcopy(config)
    text = bare.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 1, None
    if getattr(text, "layer_types", None):
        text.layer_types = []
    with no_init_weights():
        model = AutoModelForImageTextToText.from_config(bare, dtype=torch.float32, trust_remote_code=False)
    return model.eval()


@torch.no_grad()
def fill(part: nn.Module, path: str, weights: Renamed, source: str) -> None:
    """A module's parameters from the checkpoint; InputError where one is missing or of another shape."""
    for name, parameter in part.named_parameters():
        full = f"{path}.{name}"
        if full in weights.places and weights.shape(full) == tuple(parameter.shape):
            parameter.copy_(weights.tensor(full))
        elif name.startswith(UNUSED):
            parameter.zero_()
        elif full in weights.places:
            held, wanted = list(weights.shape(full)), list(parameter.shape)
            raise InputError(
                f"{source} holds {full} as {held}, its configuration as {wanted}",
                "the configuration and the weights are of different models: download both again",
            )
        else:
            raise InputError(f"{source} lacks {full}", "use a checkpoint that holds the whole model")


def images_of(checkpoint: Checkpoint) -> ImageSide:
    """The image side of a checkpoint; InputError where it has none."""
    if checkpoint.images is None:
        known = ", ".join(FAMILIES)
        raise InputError(f"{checkpoint.source} reads no images", f"name a vision-language model ({known})")
    return checkpoint.images
