"""Tiny random models of many families with weights that behave like trained ones, and their graphs.

"Trained-like": attention is peaked, norms and biases are not the identity; with an initialiser's own weights
every row attends to all others alike, and neither a wrong mask nor a dropped row would show.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from edgespec.exporters import assemble, exporter
from edgespec.exporters.checkpoint import Checkpoint, open_checkpoint
from edgespec.exporters.program import build_program
from edgespec.exporters.step import model_spec
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.spec import CacheSpec
from tests.helpers.checkpoints import SIZES, write_directory

logging.disable_progress_bar()
torch.set_num_threads(1)

POSITIONS, WINDOW = 1024, 12
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
MUP = {"embedding_multiplier": 3.0, "attention_multiplier": 0.15, "residual_multiplier": 0.6}
# Transformers' model type and what its config changes; the names are those the tests print.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**MIXED, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**MIXED, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5}),
    "granite": ("granite", {"residual_multiplier": 0.6, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {"logit_scale": 1.0}),
    "cohere2": ("cohere2", {**MIXED, "logit_scale": 1.0}),
    "hyperclovax": ("hyperclovax", {**MUP, "logits_scaling": 0.5}),
    "glm": ("glm", {"partial_rotary_factor": 0.5}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.5}),
}


def family_config(name: str, **changes: Any) -> Any:
    """The tiny config of a family."""
    kind, own = FAMILIES[name]
    return CONFIG_MAPPING[kind](**{**SIZES, "max_position_embeddings": POSITIONS, **own, **changes})


def trained_like(config: Any, seed: int = 0) -> PreTrainedModel:
    """A random model of this config whose attention is peaked."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(
                    10.0 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 4.0
                )
            if "q_norm" in name:
                parameter.mul_(3.0).add_(
                    2.0 * ("gemma" in config.model_type)
                )  # Gemma stores a norm's scale less 1
    return model


@functools.cache
def model(name: str, seed: int = 0) -> PreTrainedModel:
    """A family's trained-like model, made once."""
    return trained_like(family_config(name), seed)


def checkpoint(path: Path, what: PreTrainedModel) -> Checkpoint:
    """A model saved as a Hugging Face directory with the tiny tokenizer, opened as a user's checkpoint is."""
    write_directory(path, what)
    return open_checkpoint(str(path))


@functools.cache
def _program(key: str, *what: Any) -> Any:
    bones, spec = WAITING.pop()
    return build_program(bones, spec)


WAITING: list[Any] = []
_policy_graphs = functools.cache(assemble.policy_graphs)


def export_tiny(
    source: Checkpoint,
    cache: CacheSpec,
    folder: Path,
    widths: tuple[int, ...] = (2, 4),
    form: str = "onnx",
    **job: Any,
) -> Engine:
    """A model's graphs written by the exporter, and the engine that runs them.

    A checkpoint is traced once, whatever the caches and forms asked for: tracing takes longer than the rest.
    """
    job = {"name": "target", "precision": dict.fromkeys(("linear", "head", "embedding"), "fp32"), **job}
    spec = model_spec(source.config)
    work = assemble.Job(
        checkpoint=source, spec=spec, cache=cache, widths=widths, fused=cache.contract == "append", **job
    )
    config = hashlib.sha256(source.config.to_json_string().encode()).hexdigest()

    def traced(bones: Any, spec: Any) -> Any:
        WAITING[:] = [(bones, spec)]
        return _program(config, work.head_rows)

    folder.mkdir(parents=True, exist_ok=True)
    with (
        mock.patch.object(assemble, "build_program", traced),
        mock.patch.object(assemble, "policy_graphs", _policy_graphs),
    ):
        entry, _ = exporter(form)(work, folder, Progress(quiet=True))
    return Engine(folder, entry, threads=1)
