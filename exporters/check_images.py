"""Proves a bundle's image side: the encoder gives the checkpoint's features, the target reads them as rows.

Images are seeded noise over slow waves: every patch is another, and none is like a word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgespec.bundle import Bundle
from edgespec.exporters.assemble_vision import pruned_as
from edgespec.exporters.checkpoint import Checkpoint
from edgespec.exporters.findings import Finding
from edgespec.exporters.vision_language import Adapter, Projected, encoder_and_projector, images_of
from edgespec.spec import VisionEntry

# Of the largest feature, between a graph's and PyTorch's, both in fp32: XNNPACK's GELU is an approximation.
LARGEST_SHARE = {"onnx": 1e-4, "executorch": 5e-4}
LARGEST_KL = 0.1  # nats, of the token after a picture, where the target's weights are not fp32
LARGEST_LOGIT = 1e-4  # of the largest logit, where they are
IMAGES = 3
AFTER = 5  # words behind a picture


def check_images(
    bundle: Bundle, engine: Any, checkpoint: Checkpoint, words: list[int], adapter: Adapter | None
) -> list[Finding]:
    """The encoder's graph and the embeds graph against the checkpoint; `engine` runs the target's graphs."""
    (entry,) = bundle.manifest.vision
    encoder, projector, first = encoder_and_projector(images_of(checkpoint), checkpoint.source)
    keeps = {int(number): count for number, count in entry.keeps.items()}
    selectors = bundle.path / entry.selectors
    way = pruned_as(encoder, checkpoint.digest, entry.method, keeps, selectors)
    shown = noise(entry.size)
    with torch.no_grad():
        want = Projected(way, projector, first)(shown)
        whole = Projected(encoder, projector, first)(shown)
    seen = [engine.look(entry, image[None].numpy()) for image in shown]
    ours = np.concatenate([features for features, *_ in seen])
    limit = LARGEST_SHARE[bundle.manifest.format]
    share = float(np.abs(ours - want.numpy()).max() / want.abs().max())
    likeness = float(torch.cosine_similarity(torch.from_numpy(ours), whole, dim=-1).mean())
    detail = f"features off by {share:.1e} of the largest (at most {limit:.0e})"
    if keeps:
        detail += f"; {entry.method} in {len(keeps)} layers"
        detail += f", mean cosine to the whole encoder's {likeness:.3f}"
    if adapter is not None:
        with torch.no_grad():
            theirs = adapter(want).numpy()
        drafts = float(np.abs(np.concatenate([d for _, d in seen]) - theirs).max() / np.abs(theirs).max())
        share = max(share, drafts)
        detail += f"; the draft's {adapter.rows} rows of a picture off by {drafts:.1e}"
    figures = {"share": share, "likeness": likeness}
    return [
        Finding("vision numbers", share <= limit, detail, figures),
        check_embeds(entry, engine, checkpoint, want[0], words),
    ]


@torch.no_grad()
def check_embeds(
    entry: VisionEntry, engine: Any, checkpoint: Checkpoint, seen: Tensor, words: list[int]
) -> Finding:
    """A word, a picture and more words: the logits behind them, by the embeds graph and by the checkpoint.

    Of a picture that does not fit the cache, the first rows.
    """
    room = engine.cache.slots - AFTER - 1
    rows = min(entry.rows, room)
    tokens = [words[0], *range(-1, -1 - rows, -1), *words[1 : 1 + AFTER]]
    engine.reset()
    given = np.stack([seen[-1 - t].numpy() if t < 0 else np.zeros(seen.shape[1]) for t in tokens])
    ours = engine.prefill(tokens, given)
    model: Any = checkpoint.load_model()
    table = model.get_input_embeddings()
    embedded = [seen[-1 - t] if t < 0 else table(torch.tensor(t)) for t in tokens]
    theirs = model(inputs_embeds=torch.stack(embedded)[None]).logits[0, -1].numpy()
    off = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    log_ours, log_theirs = (torch.from_numpy(x).log_softmax(-1) for x in (ours, theirs))
    kl = float((log_theirs.exp() * (log_theirs - log_ours)).sum())
    exact = set(engine.entry.precision.values()) == {"fp32"}
    passed = off <= LARGEST_LOGIT if exact else kl <= LARGEST_KL
    detail = f"behind a picture of {rows} rows logits are off by {off:.1e} of the largest, KL {kl:.1e} nats"
    detail += f" (at most {LARGEST_LOGIT:.0e})" if exact else f" (KL at most {LARGEST_KL})"
    return Finding("vision rows", passed, detail, {"share": off, "kl": kl})


def noise(size: int) -> Tensor:
    """[IMAGES,3,size,size], of about the spread of a normalised image."""
    draw = torch.Generator().manual_seed(0)
    wave = torch.linspace(0, 6, size).sin()
    slow = wave[None, :] * wave[:, None]
    return torch.randn(IMAGES, 3, size, size, generator=draw) * 0.5 + slow
