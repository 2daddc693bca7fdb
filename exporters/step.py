"""The step graph as an nn.Module around a Transformers decoder, and its trace: prefill, verify, decode and
draft are widths of it.

    (tokens [1,S], positions [1,S], row [R], count [1], keys L x [1,KV,slots,d], values likewise)
      -> logits [1,R,V], new keys and values L x [1,KV,S,d]

Knows nothing of ONNX and of devices. The same module runs eagerly (the oracle of `check`) and is traced
without weights.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from edgespec.errors import InputError
from edgespec.exporters.attention import NAME, StepCache, calling
from edgespec.exporters.recognise import angle_table, named_rope, recognise_norm
from edgespec.spec import ModelSpec

TRACED_WIDTH = 13  # a number that no constant of a model is likely to be
FOREIGN = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "is_encoder_decoder": "an encoder-decoder",
    "mamba_d_state": "a state-space model",
    "ssm_state_size": "a state-space model",
    "alibi": "a model with ALiBi positions",
}


class Step(nn.Module):
    """One call of the decoder over S token rows."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(
        self, tokens: Tensor, positions: Tensor, row: Tensor, count: Tensor, caches: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """See the module's docstring; `row` names the rows whose logits are wanted."""
        logits, cache = self.run(tokens, positions, row, count, caches)
        order = range(self.layers)
        return logits, [cache.new_keys[i] for i in order], [cache.new_values[i] for i in order]

    def run(
        self, tokens: Tensor, positions: Tensor, row: Tensor, count: Tensor, caches: list[Tensor]
    ) -> tuple[Tensor, StepCache]:
        """The logits, and the cache view with what every layer gave it: new rows, and queries [1,H,S,d]."""
        with calling(StepCache(caches[: self.layers], caches[self.layers :], count)) as cache:
            logits = self.model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=row,
            ).logits
        if sorted(cache.new_keys) != list(range(self.layers)):
            missing = sorted(set(range(self.layers)) - set(cache.new_keys))
            raise InputError(
                f"layers {missing} of {type(self.model).__name__} do not attend through Transformers' "
                "attention interface",
                "only decoders whose every layer is softmax attention can be exported",
            )
        return logits, cache


def refuse_foreign(config: Any) -> None:
    """InputError for a kind of model that is no dense decoder."""
    for word, what in FOREIGN.items():
        if getattr(config, word, None):
            raise InputError(
                f"{config.model_type} is {what} (config.{word})", "choose a dense decoder-only model"
            )


def model_spec(config: Any) -> ModelSpec:
    """A decoder's facts from its Transformers config.

    InputError names what the step graph cannot be built for.
    """
    refuse_foreign(config)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    window = getattr(config, "sliding_window", None) or 0
    if not getattr(config, "use_sliding_window", True) or window >= config.max_position_embeddings:
        window = 0  # unused, or never reached
    kinds = getattr(config, "layer_types", None) or (
        ["sliding_attention"] * layers if window else ["full_attention"] * layers
    )
    if strange := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise InputError(
            f"{config.model_type} has layers of kind {strange[0]!r}",
            "only full and sliding-window attention can be exported",
        )
    return ModelSpec(
        family=config.model_type,
        layers=layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        tied=bool(config.tie_word_embeddings),
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
        softcap=float(getattr(config, "attn_logit_softcapping", None) or 0),
    )


FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})
SMALL = 1 << 16  # elements


class LargeOnMeta(TorchFunctionMode):
    """Large tensors get no data.

    Small ones do, so that a model's constants (a scale, say) keep their values.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Send a factory call for more than SMALL elements to the meta device."""
        kwargs = kwargs or {}
        if function in FACTORIES:
            size = kwargs.get("size", args)
            size = size[0] if size and isinstance(size[0], tuple | list | torch.Size) else size
            if math.prod(int(n) for n in size) > SMALL:
                kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Skeleton:
    """A model without weights (on the meta device) and the values of its buffers, by name."""

    model: nn.Module
    constants: dict[str, Tensor]


def skeleton(config: Any) -> Skeleton:
    """The model without weights, its norms and rotary tables replaced by recognised parts."""
    with LargeOnMeta():
        try:
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        except ValueError as error:
            raise InputError(
                f"Transformers has no causal language model for {config.model_type!r}",
                str(error).splitlines()[0],
            ) from error
    prepare(model.eval())
    constants = {name: value.clone() for name, value in model.named_buffers() if value.device.type != "meta"}
    model.to("meta")
    model.tie_weights()  # a small table had data, and moving it to meta made two of what was one
    return Skeleton(model, constants)


def prepare(model: nn.Module) -> nn.Module:
    """Replace norms and rotary modules by what computes the same (recognise.py); route attention to ours."""
    config = model.config
    for path, module in list(model.named_modules()):
        parent, _, leaf = path.rpartition(".")
        owner = model.get_submodule(parent)
        if type(module).__name__.endswith("RotaryEmbedding"):
            setattr(owner, leaf, angle_table(module, config.max_position_embeddings, config))
        elif (found := recognise_norm(module)) is not None:
            setattr(owner, leaf, found)
    config._attn_implementation = NAME
    return model


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


@contextlib.contextmanager
def ready(model: nn.Module, spec: ModelSpec) -> Iterator[None]:
    """What must hold while the model is traced or run: the rotary function emits our operator."""
    with named_rope(model, spec.head_dim), torch.no_grad():
        yield


def trace(model: nn.Module, spec: ModelSpec) -> torch.export.ExportedProgram:
    """The step's program at width TRACED_WIDTH over two cache slots: no constant in it depends on a width
    or a cache.

    The lowering sets the width and the slots; `model` comes from skeleton() or prepare().
    """
    device = device_of(model)
    ints = lambda *shape: torch.zeros(*shape, dtype=torch.int64, device=device)  # noqa: E731
    caches = [torch.zeros(1, spec.kv_heads, 2, spec.head_dim, device=device) for _ in range(2 * spec.layers)]
    example = (ints(1, TRACED_WIDTH), ints(1, TRACED_WIDTH), ints(TRACED_WIDTH), ints(1), caches)
    with ready(model, spec):
        return torch.export.export(Step(model, spec.layers).eval(), example, strict=False)
