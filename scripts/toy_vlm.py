"""SmolLM2-135M-Instruct with an image encoder that knows nothing yet, as an Idefics3 model: what the
scripts that train toys begin with.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from edgespec.exporters.checkpoint import open_checkpoint

# SmolLM2's vocabulary has tokens that it never uses: these get a new meaning.
NAMES = {
    "<repo_name>": "<image>",
    "<reponame>": "<fake_token_around_image>",
    "<file_sep>": "<global-img>",
    "<filename>": "<end_of_utterance>",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def start(
    folder: Path,
    size: int,
    patch: int,
    scale: int,
    layers: int = 4,
    more: Mapping[str, str] | None = None,
    ends: tuple[str, ...] = (),
) -> None:
    """The folder with SmolLM2's weights, a fresh ViT of `layers` layers of 128 over size x size pixels,
    whose patches become (size/patch/scale)² rows, and a processor.

    `more`: further unused tokens and what they are to be called; `ends`: those of them that end an answer
    too.
    """
    demo = open_checkpoint("demo")
    text = demo.tokenizer.tokenizer_json.decode()
    for old, new in {**NAMES, **(more or {})}.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    ids = json.loads(text)["model"]["vocab"]
    vision = dict(
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=size,
        patch_size=patch,
    )
    config = Idefics3Config(
        vision_config=vision,
        text_config=demo.config,
        image_token_id=ids["<image>"],
        scale_factor=scale,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config)
    model.model.text_model.load_state_dict(demo.load_model().model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = [ids[name] for name in ("<|im_end|>", *ends)]
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(text)
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    rows = (size // patch // scale) ** 2
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Idefics3Processor", "image_seq_len": rows})
    )
    images = {
        "image_processor_type": "Idefics3ImageProcessor",
        "do_resize": True,
        "size": {"longest_edge": 4 * size},
        "max_image_size": {"longest_edge": size},
        "do_image_splitting": False,
        "do_pad": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def features(model, images: Tensor) -> Tensor:
    """[n,rows,hidden] of pictures [n,3,size,size]."""
    return model.model.connector(model.model.vision_model(images).last_hidden_state)


def words_of(model, tokenizer, phrases: list[str]) -> Tensor:
    """[n,hidden]: the sum of each phrase's words as the decoder reads them."""
    table = model.get_input_embeddings().weight.detach()
    return torch.stack(
        [table[tokenizer(" " + phrase, add_special_tokens=False).input_ids].sum(0) for phrase in phrases]
    )


def paced(name: str, steps: int, begin: int = 0) -> Iterator[int]:
    """Steps, told of with the time that is left."""
    began = time.monotonic()
    for step in range(begin, steps):
        yield step
        if step % 50 == 49:
            left = (time.monotonic() - began) / (step + 1 - begin) * (steps - step - 1)
            print(f"  {name} {step + 1}/{steps}, {left / 60:.1f} min left", file=sys.stderr, flush=True)
