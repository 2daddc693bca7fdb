"""HyperCLOVA X: every switch of its configuration, alone, is honoured or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgespec.errors import InputError
from edgespec.exporters.step import model_spec, skeleton
from edgespec.runtime.engine import Engine
from edgespec.spec import CacheSpec
from tests.helpers import tiny
from tests.helpers.absorb import absorbed_as_wanted
from tests.helpers.oracle import own_logits

TOKENS = [int(i) for i in np.random.default_rng(3).integers(0, 288, 30)]
CALLS = [("prefill", 16, 16), ("verify", 4, 3), ("decode", 1, 1), ("verify", 2, 2), ("prefill", 16, 8)]
PLAIN = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": None,  # 1 / sqrt(d)
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "use_post_norm": False,
}
SWITCHES: dict[str, dict[str, Any]] = {
    "embedding": {"embedding_multiplier": 10.0},
    "attention": {"attention_multiplier": 0.0625},
    "residual": {"residual_multiplier": 0.22},
    "logits": {"logits_scaling": 0.125},
    "post-norms": {"use_post_norm": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "stretched positions": {"rope_parameters": tiny.LLAMA3},
    "gelu": {"hidden_act": "gelu"},
    "a head for every key-value head": {"num_key_value_heads": 4},
}


def config(**changes: Any) -> Any:
    return tiny.family_config("hyperclovax", **{**PLAIN, **changes})


def exported(model: Any, folder: Path, contract: str) -> Engine:
    cache = CacheSpec(contract, 64, 16, "none", 0, 0, (64,), 16)
    return tiny.export_tiny(tiny.checkpoint(folder / "source", model), cache, folder / "graphs")


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_alone_gives_the_logits_of_transformers(switch: str, tmp_path: Path) -> None:
    with_it, without = (tiny.trained_like(config(**changes)) for changes in (SWITCHES[switch], {}))
    wanted, others = (own_logits(model, TOKENS).numpy() for model in (with_it, without))
    assert np.abs(wanted - others).max() > 1e-2  # or the test would pass without the switch
    contract = "rows" if list(SWITCHES).index(switch) % 2 else "append"
    absorbed_as_wanted(exported(with_it, tmp_path, contract), wanted, TOKENS, CALLS, 5e-5)


def test_logits_are_multiplied_where_granite_s_are_divided(tmp_path: Path) -> None:
    weights = tiny.trained_like(config()).state_dict()
    found = {}
    for scale in (1.0, 0.25):
        model = tiny.trained_like(config(logits_scaling=scale))
        model.load_state_dict(weights)
        engine = exported(model, tmp_path / str(scale), "rows")
        found[scale] = engine.prefill(TOKENS[:9]).copy()
    np.testing.assert_allclose(found[0.25], 0.25 * found[1.0], rtol=0, atol=1e-5)


def test_what_cannot_be_honoured_is_refused_by_name() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(InputError, match="scaling 'dynamic' depends on the length of the text"):
        skeleton(config(rope_parameters=dynamic))
    with pytest.raises(InputError, match="hyperclovax is a mixture of experts"):
        model_spec(config(num_experts=4))
