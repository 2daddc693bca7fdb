"""Tiny random vision-language models as Hugging Face folders, with the processors of their families."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from edgespec.exporters.checkpoint import layer_of, open_checkpoint
from edgespec.exporters.draft_checkpoint import save_draft, tables
from edgespec.exporters.vision_language import Adapter
from tests.helpers.checkpoints import CONTROL, LETTERS, MERGES, SIZES, tokenizer_json

logging.disable_progress_bar()

SIZE, PATCH = 28, 7
PARTS = [f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)]
SPECIAL = (*CONTROL, "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *PARTS)
TOKENS = [*SPECIAL, *LETTERS, *("".join(pair) for pair in MERGES)]
IMAGE = SPECIAL.index("<image>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIZE,
    "patch_size": PATCH,
}
KINDS = ("llava", "llava-siglip", "idefics3", "smolvlm")


def config(kind: str) -> Any:
    """The configuration of a tiny model."""
    import transformers as t

    text = t.LlamaConfig(**{**SIZES, "max_position_embeddings": 512})
    if kind == "llava":
        encoder = t.CLIPVisionConfig(**ENCODER)
        return t.LlavaConfig(
            vision_config=encoder, text_config=text, image_token_id=IMAGE, image_seq_length=16
        )
    if kind == "llava-siglip":
        return t.LlavaConfig(
            vision_config=t.SiglipVisionConfig(**ENCODER),
            text_config=text,
            image_token_id=IMAGE,
            image_seq_length=16,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    made = {"idefics3": t.Idefics3Config, "smolvlm": t.SmolVLMConfig}[kind]
    return made(vision_config=dict(ENCODER), text_config=text, image_token_id=IMAGE, scale_factor=2)


def model(kind: str) -> Any:
    """A random model whose attention is peaked and whose image says as much as its words."""
    torch.manual_seed(0)
    made = AutoModelForImageTextToText.from_config(config(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(10.0 if "q_proj" in name or "k_proj" in name else 4.0)
    return made


def folder(path: Path, kind: str, splits: bool = False) -> Path:
    """The model with its tokenizer, template and processor; `splits`: large images become several."""
    model(kind).save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(SPECIAL)))
    special = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(special))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    colours = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    if kind.startswith("llava"):
        full = kind == "llava-siglip"
        images = {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": SIZE},
            "do_center_crop": True,
            "crop_size": {"height": SIZE, "width": SIZE},
        }
        whole = {
            "processor_class": "LlavaProcessor",
            "patch_size": PATCH,
            "num_additional_image_tokens": 0 if full else 1,
            "vision_feature_select_strategy": "full" if full else "default",
            "image_token": "<image>",
        }
    else:
        images = {
            "image_processor_type": "Idefics3ImageProcessor"
            if kind == "idefics3"
            else "SmolVLMImageProcessor",
            "do_resize": True,
            "size": {"longest_edge": 2 * SIZE},
            "max_image_size": {"longest_edge": SIZE},
            "do_image_splitting": splits,
            "do_pad": True,
        }
        whole = {"processor_class": "Idefics3Processor", "image_seq_len": 4}
    (path / "preprocessor_config.json").write_text(json.dumps(images | colours | {"do_rescale": True}))
    (path / "processor_config.json").write_text(json.dumps(whole))
    return path


def draft(path: Path, source: Path, rows: int) -> Path:
    """A draft of the target's first layer that sees `rows` rows of a picture; 0: it reads words alone."""
    target = open_checkpoint(str(source))
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = 1
    names = [name for name in target.names() if layer_of(name) in (0, None)]
    own = {name: target.tensor(name) for name in names if name not in tables(target)}
    save_draft(path, target, config, own, list(range(len(TOKENS))), {})
    if rows:
        torch.manual_seed(1)
        adapter = Adapter(rows, config.hidden_size, config.hidden_size)
        torch.nn.init.eye_(adapter.linear.weight)
        adapter.save(path / "adapter.safetensors")
    return path
