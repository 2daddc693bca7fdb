"""Random image encoders of every family, as models and as folders, and images to show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIZE, PATCH, LAYERS = 28, 7, 4
CLASSES = {
    "vit": ("ViTConfig", "ViTModel"),
    "deit": ("DeiTConfig", "DeiTModel"),
    "dinov2": ("Dinov2Config", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel"),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel"),
}
PREFIX = {
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "siglip_vision_model": 0,
    "clip_vision_model": 1,
}


def model(family: str, layers: int = LAYERS) -> Any:
    """A model whose every parameter counts: norms and layer scales are not left at their first values."""
    import transformers

    config, kind = (getattr(transformers, name) for name in CLASSES[family])
    torch.manual_seed(0)
    made = kind(
        config(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=SIZE,
            patch_size=PATCH,
        )
    ).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return made


def folder(path: Path, family: str = "dinov2", size: int = SIZE, layers: int = LAYERS) -> Path:
    """The model as a Hugging Face folder whose processor makes images of `size` pixels."""
    model(family, layers).save_pretrained(path)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def images(path: Path, count: int = 12) -> Path:
    """Images of shapes on a ground, each another, of several sizes."""
    path.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        high, wide = draw.integers(30, 60, 2)
        array = np.full((high, wide, 3), draw.integers(0, 256, 3), np.uint8)
        for _ in range(3):
            y, x = draw.integers(0, high - 9), draw.integers(0, wide - 9)
            array[y : y + 9, x : x + 9] = draw.integers(0, 256, 3)
        Image.fromarray(array).save(path / f"{number:02}.png")
    return path
