"""What the step graph cannot honour is refused by name, and the refused export leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from edgespec.config import ExportConfig
from edgespec.errors import BackendError, EdgespecError, InputError
from edgespec.exporters import export, plan
from edgespec.exporters.attention import StepCache, attention, calling
from edgespec.exporters.step import model_spec, skeleton, trace
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.spec import ModelSpec
from tests.helpers import tiny
from tests.helpers.checkpoints import SIZES, edit_json, write_directory

OWN_HEADS: dict[str, Any] = {"num_key_value_heads": None, "head_dim": None}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONG |= {"original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}
GPT2 = {**OWN_HEADS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
# model type, changes to its config -> part of the message
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixture of experts": ("mixtral", {}, "mixtral is a mixture of experts (config.num_experts)"),
    "router": (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 8},
        "qwen3_moe is a mixture of experts",
    ),
    "latent attention": ("deepseek_v3", {}, "deepseek_v3 is a mixture of experts"),
    "attention sinks": ("gpt_oss", {}, "gpt_oss is a mixture of experts"),
    "state space": ("mamba", {}, "mamba has layers of kind 'linear_attention'"),
    "reshape by width": (
        "gpt2",
        GPT2,
        "gpt2: a reshape to [1, 13, 192] depends on the number of tokens in a call",
    ),
    "dynamic scaling": (
        "llama",
        {"rope_parameters": DYNAMIC},
        "scaling 'dynamic' depends on the length of the text",
    ),
    "longrope": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 64},
        "scaling 'longrope'",
    ),
    "own attention": (
        "bloom",
        {},
        "layers [0, 1] of BloomForCausalLM do not attend through Transformers' attention",
    ),
    "heads": (
        "persimmon",
        {},
        "PersimmonAttention computes 4 key-value heads of 16 dimensions, its configuration",
    ),
    "untraceable": ("ctrl", OWN_HEADS, "ctrl cannot be traced with fixed shapes: Failed to convert"),
    "alibi": (
        "falcon",
        {**OWN_HEADS, "alibi": True},
        "falcon is a model with ALiBi positions (config.alibi)",
    ),
}


def save(path: Path, kind: str, **changes: Any) -> Path:
    sizes = {key: value for key, value in {**SIZES, **changes}.items() if value is not None}
    torch.manual_seed(0)
    return write_directory(path, AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes)))


def refusal(source: Path, kind: type[EdgespecError] = InputError, **flags: Any) -> EdgespecError:
    """The error of an export; nothing may stand beside the bundle that did not come to be."""
    folder = source.parent / "out"
    folder.mkdir(exist_ok=True)
    small = dict(weights="fp32", budget=32, block=8, sinks=2, recent=4)
    config = ExportConfig(target=str(source), output=str(folder / "bundle"), **{**small, **flags})
    with pytest.raises(kind) as caught:
        export(config, Progress(quiet=True), Engine)
    assert not list(folder.iterdir())
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("what", MODELS)
def test_a_model_is_refused_by_the_name_of_what_it_needs(tmp_path: Path, what: str) -> None:
    """Bugs: a mixture of experts was told that it lacked tensors, and a failed conversion was a traceback."""
    kind, changes, message = MODELS[what]
    assert message in refusal(save(tmp_path / "source", kind, **changes)).message


def test_an_encoder_decoder_is_refused_although_a_causal_class_exists(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "bart", d_model=64, encoder_layers=1, decoder_layers=1, **OWN_HEADS)
    edit_json(source / "config.json", is_encoder_decoder=True)
    assert "is an encoder-decoder" in refusal(source).message


def spec_of(config: Any) -> ModelSpec:
    """model_spec without its own refusals: the attention function must refuse too."""
    return ModelSpec("tiny", 2, 64, 4, 2, 16, 288, 128, False, (0, 0))


def test_a_model_that_builds_its_own_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **named: torch.zeros(1, 1, 13, 13))
    config = tiny.family_config("llama")
    with pytest.raises(InputError, match="LlamaAttention passes its own attention mask"):
        trace(skeleton(config).model, spec_of(config))


def test_attention_that_is_not_causal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.family_config("llama")
    bones = skeleton(config)
    bones.model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(InputError, match="LlamaAttention is not causal"):
        trace(bones.model, spec_of(config))


ROWS = (1, 2, 3, 16)
BAD_ROWS = [
    (ROWS, (1, 2, 3, 32), {}, "Module has keys of 16 and values of 32 dimensions"),
    (
        (1, 4, 3, 16),
        (1, 4, 3, 16),
        {},
        "Module computes 4 key-value heads of 16 dimensions, its configuration names 2",
    ),
    (
        (1, 2, 3, 24),
        (1, 2, 3, 24),
        {},
        "Module computes 2 key-value heads of 24 dimensions, its configuration names 2",
    ),
    (
        ROWS,
        ROWS,
        {"s_aux": torch.zeros(4)},
        "Module needs the attention feature 's_aux'",
    ),  # gpt-oss's own sinks
    (ROWS, ROWS, {"position_bias": torch.zeros(4)}, "Module needs the attention feature 'position_bias'"),
]


@pytest.mark.parametrize(("key", "value", "more", "message"), BAD_ROWS)
def test_attention_refuses_what_it_cannot_honour(
    key: tuple[int, ...], value: tuple[int, ...], more: dict[str, Any], message: str
) -> None:
    """Bug: a configuration that names other heads than its model computes ended in ONNX Runtime's words."""
    module = torch.nn.Module()
    module.layer_idx = 0
    rows = torch.zeros(1, 2, 8, 16)
    with (
        calling(StepCache([rows], [rows], torch.zeros(1, dtype=torch.int64))),
        pytest.raises(InputError, match=message),
    ):
        attention(module, torch.zeros(1, 4, 3, key[-1]), torch.zeros(key), torch.zeros(value), None, **more)


def test_a_budget_below_the_window_needs_a_word(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "mistral", sliding_window=40)
    error = refusal(source)
    assert error.message == "budget 32 is below source's sliding window of 40 tokens"
    assert error.hint == "use --budget 40 or more, or --truncate-window to shorten the window"
    error = refusal(source, draft="layers", budget=40)
    assert error.message == "budget 256 + block 8 are more slots than source's 128 positions"
    error = refusal(source, draft="layers", budget=40, draft_budget=32)
    assert error.message.startswith("budget 32 is below") and "--draft-budget 40" in error.hint
    assert plan.plan(ExportConfig(target=str(source), output="x", budget=32, block=8, truncate_window=True))


def test_compact_positions_need_layers_that_turn_alike(tmp_path: Path) -> None:
    error = refusal(save(tmp_path / "windows", "mistral", sliding_window=24), positions="compact")
    assert "attend to the whole cache; windows has sliding windows" in error.message
    assert error.hint == "leave --positions out"
    error = refusal(save(tmp_path / "nope", "smollm3", no_rope_layers=[1, 0]), positions="compact")
    assert error.message.endswith("turn their keys alike; those of smollm3 do not")


def test_attention_capped_differently_has_no_queries_to_store(tmp_path: Path) -> None:
    """The caps of all layers stand once in the manifest."""
    config = save(tmp_path / "source", "gemma2", attn_logit_softcapping=5.0)
    assert (
        plan.plan(ExportConfig(str(config), "x", budget=64, block=8, policy="snapkv"))[0].spec.softcap == 5.0
    )


def test_a_window_that_no_position_reaches_is_none(tmp_path: Path) -> None:
    """Bug: a model of 128 positions and a window of 4,096 was told to use a budget of 4,096."""
    config = CONFIG_MAPPING["mistral"](**SIZES, sliding_window=4096)
    assert model_spec(config).windows == (0, 0)


def test_more_slots_than_positions_are_refused(tmp_path: Path) -> None:
    error = refusal(save(tmp_path / "source", "llama"), budget=124)
    assert error.message == "budget 124 + block 8 are more slots than source's 128 positions"
    assert error.hint == "use --budget 120 or less"
    error = refusal(tmp_path / "source", budget=128, block=128, widths=(2,))
    assert error.hint == "use --block 64 or less"  # no budget would do


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_a_weight_that_is_not_a_number_is_named(tmp_path: Path, weights: str) -> None:
    """Bug: with int4 it was a traceback out of the calibration, with int8 a bundle."""
    source, name = save(tmp_path / "source", "llama"), "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    error = refusal(source, weights=weights)
    assert error.message == f"source: {name} holds a value that is not a finite number"


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    error = refusal(save(tmp_path / "source", "llama"), BackendError)
    assert "not enough disk" in error.message
    assert "0 MiB free" in error.message


def test_an_npu_looks_nothing_up_in_codes(tmp_path: Path) -> None:
    """Bug: it was exported, and only the check found the operator that an NPU lacks."""
    source = save(tmp_path / "source", "llama")
    given: dict[str, Any] = dict(budget=32, block=8, device="npu", widths=(2,), sinks=2, recent=4)
    with pytest.raises(InputError, match="embedding int4 cannot run on device npu"):
        ExportConfig(str(source), str(tmp_path / "x"), embedding="int4", **given).check()
    config = ExportConfig(str(source), str(tmp_path / "x"), weights="fp16", head="int4", **given).check()
    assert plan.precisions(config) == {"linear": "fp16", "head": "int4", "embedding": "fp16"}


def test_a_draft_of_another_tokenizer_is_refused_and_a_padded_one_is_not(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    draft = save(tmp_path / "draft", "llama", vocab_size=320, num_hidden_layers=1)
    flags = dict(draft=str(draft), draft_budget=32)
    config = ExportConfig(target=str(source), output="x", budget=32, block=8, **flags)
    assert [job.name for job in plan.plan(config)] == ["target", "draft"]
    tokens = json.loads((draft / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    a, b = "hell", "he"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (draft / "tokenizer.json").write_text(json.dumps(tokens))
    error = refusal(source, **flags)
    assert error.message.startswith("the tokenizers of source and draft differ in 2 ids: ")
    assert f"{vocabulary[a]} is 'he' in source and 'hell' in draft" in error.message


def test_an_export_that_would_not_fit_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "memory_available", lambda: 10**9)
    error = refusal(save(tmp_path / "source", "llama"), BackendError)
    assert error.message == "the export needs 1.5 GB of memory and 1.0 GB are free"


def test_positions_that_are_counted_with_are_whole_numbers(tmp_path: Path) -> None:
    """Bug: BioGPT adds an offset to its positions; the graph added int32 to int64 and did not load."""
    source = save(tmp_path / "source", "biogpt", **OWN_HEADS)
    flags = dict(weights="fp32", budget=32, block=8, widths=(2,), policy="none")
    bundle = export(
        ExportConfig(str(source), str(tmp_path / "bundle"), **flags), Progress(quiet=True), Engine
    )
    tokens = list(range(3, 23))
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits[0, -1]
    got = Engine(tmp_path / "bundle", bundle.manifest.models[0], 1).prefill(tokens)
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=1e-5)
