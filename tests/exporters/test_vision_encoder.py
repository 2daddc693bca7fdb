"""An encoder of ours gives Transformers' features, for every family, at its own size and at others."""

from __future__ import annotations

import pytest
import torch

from edgespec.errors import InputError
from edgespec.exporters.vision_encoder import encoder_of
from tests.helpers.tiny_vision import CLASSES, PATCH, PREFIX, SIZE, model


@pytest.mark.parametrize("family", CLASSES)
def test_features_are_transformers(family: str) -> None:
    theirs = model(family)
    ours = encoder_of(theirs)
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs(pixels).last_hidden_state, atol=2e-5, rtol=1e-5)
    assert ours.prefix == PREFIX[family] and ours.patches == (SIZE // PATCH) ** 2
    assert ours.tokens == ours.prefix + ours.patches


@pytest.mark.parametrize("family", ["vit", "dinov2", "siglip_vision_model", "clip_vision_model"])
def test_another_size_has_positions_between_its_own(family: str) -> None:
    theirs = model(family)
    ours = encoder_of(theirs, 42)
    pixels = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    more = {} if family == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        torch.testing.assert_close(
            ours(pixels), theirs(pixels, **more).last_hidden_state, atol=2e-5, rtol=1e-5
        )
    assert ours.patches == 36


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="no patch of 7"):
        encoder_of(model("vit"), 6)
    theirs = model("vit")
    theirs.config.model_type = "beit"
    with pytest.raises(InputError, match="beit is no image encoder"):
        encoder_of(theirs)
