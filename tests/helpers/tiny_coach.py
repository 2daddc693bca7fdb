"""A tiny model that was taught to watch: <next> for a dark frame, <feedback> and a word for a bright one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from edgespec.workloads.stream.coach import FEEDBACK, NEXT, PROMPT
from tests.helpers import tiny_vlm

torch.set_num_threads(1)

FRAMES, BATCH, STEPS = 4, 8, 80
WORD = "well"
ROWS = 4


def frame(bright: bool, seed: int = 0, size: tuple[int, int] = (40, 40)) -> bytes:
    """An image file's content."""
    level = (210 if bright else 20) + seed % 20
    out = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(out, "PNG")
    return out.getvalue()


def folder(path: Path) -> Path:
    """The model's checkpoint, taught anew: a few seconds."""
    path.mkdir()
    tiny_vlm.folder(path, "idefics3")
    text = (path / "tokenizer.json").read_text()
    for old, new in zip(tiny_vlm.PARTS, (NEXT, FEEDBACK), strict=False):
        text = text.replace(json.dumps(old), json.dumps(new))
    (path / "tokenizer.json").write_text(text)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny_vlm.config("idefics3"), dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(path, backend="pil")
    ids = {
        name: tiny_vlm.SPECIAL.index(old) for name, old in zip((NEXT, FEEDBACK), tiny_vlm.PARTS, strict=False)
    }
    _teach(model, processor, ids)
    model.generation_config.eos_token_id = [tiny_vlm.SPECIAL.index("<|im_end|>"), ids[NEXT]]
    model.eval().save_pretrained(path)
    return path


def _teach(model: nn.Module, processor: object, ids: dict[str, int]) -> None:
    encode = lambda text: processor.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    (end,) = encode("<|im_end|>")
    prompt = encode(f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n")
    answers = {False: [ids[NEXT]], True: [ids[FEEDBACK], *encode(WORD), end]}
    pictures = {
        bright: torch.cat(
            [
                processor.image_processor(
                    images=[[Image.open(io.BytesIO(frame(bright, s)))]], return_tensors="pt"
                )["pixel_values"][0]
                for s in range(20)
            ]
        )
        for bright in answers
    }
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        texts, wanted, seen = [], [], []
        for _ in range(BATCH):
            text, want = list(prompt), [-100] * len(prompt)
            for bright in (torch.rand(FRAMES, generator=draw) < 0.4).tolist():
                text += [tiny_vlm.IMAGE] * ROWS + answers[bright]
                want += [-100] * (ROWS - 1) + answers[bright] + [-100]
                seen.append(pictures[bright][int(torch.randint(20, (1,), generator=draw))])
            texts.append(torch.tensor(text))
            wanted.append(torch.tensor(want))
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # behind: what is wanted stands before
        pixels = torch.stack(seen).unflatten(0, (BATCH, FRAMES))
        logits = model(input_ids=ids, pixel_values=pixels).logits
        labels = nn.utils.rnn.pad_sequence(wanted, batch_first=True, padding_value=-100)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, "the tiny coach did not learn"
