"""Reports made of numbers, without any runtime: two models' graphs, a few prompts, noise by a seed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, get_type_hints

from edgespec.bench import PROMPTS_A_PROCESS
from edgespec.bench_report import (
    PLAIN,
    SPECULATIVE,
    BenchSettings,
    BundleFacts,
    Counted,
    CountedPolicy,
    CountedStep,
    Environment,
    ModelFacts,
    Prediction,
    Report,
    Sample,
    Share,
    Traced,
)
from edgespec.work import Step
from tests.helpers.bundles import cache_spec, model_spec

CATEGORIES = ("writing", "math", "qa")
ENVIRONMENT = Environment("A cpu", 2, 1, "Linux 6 x86_64", "performance", 0.3, 41.0, {"edgespec": "0.1.0"})
SETTINGS = BenchSettings("specbench", 3, "d" * 64, 32, 1, 1, 1, "auto", "cost", 0, "default")


def model_facts(name: str) -> ModelFacts:
    spec = model_spec(2 if name == "target" else 1)
    return ModelFacts(name, spec, cache_spec(), {"linear": "int8"}, 100, 4000, name[0] * 64)


def step(width: int, bytes_weights: int, ops: int) -> dict[str, int]:
    figures = {name: 0 for name in get_type_hints(Step)}
    return figures | {
        "bytes_weights": bytes_weights, "numbers_activations": 50 * width, "ops_weights": ops, "width": width,
        "rows": 23, "dispatches": 1,
    }  # fmt: skip


def counted(name: str, bytes_weights: int = 1000) -> Counted:
    facts = {
        "name": name, "layers": 2, "evicting_layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8,
        "arithmetic": "int8", "bytes_cached": None, "bytes_activation": None, "appends": True, "budget": 16,
        "block": 4, "buckets": [16], "head_rows": 100, "bytes_weights": 4000, "bytes_policy": 0,
    }  # fmt: skip
    kinds = [("decode", 1), ("prefill", 4), ("verify", 2)] if name == "target" else [("draft", 2)]
    ops = 90 if name == "target" else 30
    steps = tuple(CountedStep(k, w, 16, step(w, bytes_weights, ops * w)) for k, w in kinds)
    return Counted(facts, steps, (CountedPolicy("commit", 16, 64),))


def sample(prompt: str, way: str, number: int, process: int, decode_s: float, **more: Any) -> Sample:
    """21 tokens: 20 decoded, in 10 verify calls where it speculates."""
    speculative = way == SPECULATIVE
    given: dict[str, Any] = {
        "tokens_prompt": 7, "tokens_new": 21, "verify_calls": 10 if speculative else 20,
        "draft_calls": 10 if speculative else 0, "drafted_by_position": (10, 8) if speculative else (),
        "accepted_by_position": (7, 2) if speculative else (), "time_first_token_s": 0.1,
        "time_graphs_s": 0.9 * (decode_s + 0.1), "c": 0.25, "bytes_memory": 300 * 2**20, "load": 0.5,
        "temperature_c": 45.0, "text_sha256": "same",
    }  # fmt: skip
    given |= {"time_decode_s": decode_s, **more}
    return Sample(prompt, prompt.split("/")[0], number, process, way, **given)


def traced(prompt: str) -> Traced:
    events: tuple[dict[str, Any], ...] = (
        {"event": "prompt", "tokens": 4, "time_s": 0.1, "calls": [["target", "prefill", 4, 4, 900.0]]},
        {"event": "round", "tokens": [5], "drafted": 0, "accepted": 0, "calls": []},
        {
            "event": "round", "tokens": [6, 7], "drafted": 1, "accepted": 1, "drafter": "draft",
            "stop": "cap", "calls": [["draft", "draft", 2, 2, 30.0], ["target", "verify", 2, 2, 80.0]],
        },
        {"event": "round", "tokens": [8], "drafted": 0, "accepted": 0, "drafter": "none", "stop": "cost",
         "calls": [["target", "decode", 1, 1, 70.0]]},
    )  # fmt: skip
    return Traced(prompt, prompt.split("/")[0], events)


def prediction(profile: str, speed: float = 30.0) -> Prediction:
    shares = (Share("target verify", 2.0), Share("draft draft", 1.0))
    categories = {name: speed for name in CATEGORIES}
    return Prediction(
        profile, "npu", speed, speed / 1.5, 0.2, 5e8, True, None, "this profile", categories, shares
    )


def report(
    prompts: int = 3,
    rounds: int = 1,
    seed: int = 0,
    noise: float = 0.0,
    slower: float = 1.0,
    luck: float = 0.0,
    **more: Any,
) -> Report:
    """Plain decoding takes 50 ms a token, speculative 25 ms, both `slower` times; noise is log-normal.

    `luck`: that of a process, for all that it answers.
    """
    chance = random.Random(seed)
    names = [f"{CATEGORIES[i % 3]}/{i // 3 + 1}" for i in range(prompts)]
    samples: list[Sample] = []
    for number in range(rounds):
        for i, name in enumerate(names):
            if i % PROMPTS_A_PROCESS == 0:
                process = samples[-1].process + 1 if samples else 0
                shift = slower * chance.lognormvariate(0, luck)
            for way, time_s in ((PLAIN, 1.0), (SPECULATIVE, 0.5)):
                took = time_s * shift * chance.lognormvariate(0, noise)
                samples.append(sample(name, way, number, process, took))
    models = (model_facts("target"), model_facts("draft"))
    whole = Report(
        "run", "2026-01-02T03:04:05Z", ENVIRONMENT, BundleFacts("x.bundle", "cpu", "m" * 64, models),
        (counted("target"), counted("draft")), replace(SETTINGS, prompts=prompts, rounds=rounds), (),
        (prediction("phone-a"), prediction("phone-b", 20.0)), tuple(samples),
        tuple(traced(name) for name in names),
    )  # fmt: skip
    return replace(whole, **more)
