"""The commands about latency: estimate, and profile list, show, fit, measure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgespec.config_latency import (
    EstimateConfig,
    ProfileFitConfig,
    ProfileListConfig,
    ProfileMeasureConfig,
    ProfileShowConfig,
)
from edgespec.console import load, print_json, verified, written
from edgespec.errors import InputError
from edgespec.flags import flag_name
from edgespec.progress import Progress
from edgespec.spec import VISION

PREFILL = 128


def estimate(config: EstimateConfig, as_json: bool, progress: Progress) -> int:
    """Predict tokens/s, time to the first token and memory on a device, from a bundle or a config.json."""
    config.check()
    from edgespec.profiles import load as load_profile

    profile = load_profile(config.profile)
    if config.search:
        return _search(config, profile, as_json)
    if _is_bundle(config.model):
        return _of_bundle(config, profile, as_json, progress)
    if config.trace:
        raise InputError(f"{config.model} is no bundle", "replay a trace with the bundle that made it")
    return _print_estimate(
        _shape_models(config, profile.kind), profile, config.precision or "w4a16", config, as_json
    )


def _is_bundle(model: str) -> bool:
    """Does the path hold a bundle, rather than a config.json?"""
    from edgespec.bundle import MANIFEST

    return (Path(model) / MANIFEST).is_file()


def _of_bundle(config: EstimateConfig, profile: Any, as_json: bool, progress: Progress) -> int:
    from edgespec.latency_report import replay_table
    from edgespec.replay import replay_work
    from edgespec.trace import read_trace
    from edgespec.work import of_bundle

    for name in ("precision", "draft", "draft_rows"):
        if getattr(config, name):
            word = flag_name(name)
            raise InputError(f"{word} is the bundle's own matter", f"leave {word} out, or give a config.json")
    trace = read_trace(config.trace) if config.trace else None
    bundle = verified(config.model, progress)
    models = of_bundle(bundle)
    if bundle.manifest.device != profile.kind:
        progress.note(
            f"the bundle's graphs are for {bundle.manifest.device}, {profile.name} is of kind {profile.kind}"
        )
    if trace is None:
        stored = bundle.model("target").precision["linear"]
        return _print_estimate(models, profile, stored, config, as_json)
    run = replay_work(trace, profile, models)
    if as_json:
        print_json("replay", run.to_json())
    else:
        print(replay_table(run), end="")
    return 0


def _shape_models(config: EstimateConfig, kind: str) -> dict[str, Any]:
    """The target of a config.json, and its draft, over a static cache of `context` rows."""
    from edgespec.shape import precision, read_shape
    from edgespec.work import of_shape

    stored = precision(config.precision or "w4a16", kind)
    block = min(PREFILL, max(1, config.context // 2))
    budget = max(1, config.context - block)
    steps = [("prefill", block), ("decode", 1), ("verify", config.width)]
    appends = kind == "cpu"
    models = {"target": of_shape(read_shape(config.model), stored, steps, budget, block, appends=appends)}
    if config.draft:
        drafts = [("prefill", block), ("draft", 2)]
        shape, rows = read_shape(config.draft), config.draft_rows
        if rows > shape.vocab:
            raise InputError(
                f"draft_rows {rows} are more than the vocabulary of {shape.vocab}", "use fewer --draft-rows"
            )
        models["draft"] = of_shape(shape, stored, drafts, budget, block, "draft", rows, appends)
    return models


def _print_estimate(
    models: dict[str, Any], profile: Any, stored: str, config: EstimateConfig, as_json: bool
) -> int:
    from edgespec.estimate import block_efficiency
    from edgespec.estimate import estimate as run
    from edgespec.latency_report import estimate_table

    chance = config.acceptance
    be = config.be or (1.0 if chance is None else block_efficiency(chance, config.width))
    if config.images and VISION not in models:
        hint = "give a bundle with an image encoder, or leave --images out"
        raise InputError(f"{config.model} reads no images", hint)
    said = run(models, profile, stored, config.context, config.prompt, config.width, be, config.images)
    if as_json:
        print_json("estimate", said.to_json())
    else:
        print(estimate_table(said), end="")
    return 0


def _search(config: EstimateConfig, profile: Any, as_json: bool) -> int:
    from edgespec.estimate import acceptance_of
    from edgespec.latency_report import search_table
    from edgespec.search import Question, on_ray, search
    from edgespec.shape import read_shape

    if _is_bundle(config.model):
        hint = "search from its model's config.json"
        raise InputError(f"{config.model} is a bundle, whose settings are decided", hint)
    chance = config.acceptance
    if chance is None:
        chance = acceptance_of(config.be or 1.0, config.width)
    target, draft = read_shape(config.model), read_shape(config.draft) if config.draft else None
    question = Question(target, draft, profile, config.context, config.prompt, chance)
    found = search(question, on_ray) if config.ray else search(question)
    if as_json:
        print_json("search", {"profile": profile.name, "found": [one.to_json() for one in found]})
    else:
        print(search_table(found), end="")
    return 0


def profile_list(config: ProfileListConfig, as_json: bool, progress: Progress) -> int:
    """Print the devices that have a profile."""
    from edgespec.latency_report import profile_list as shown
    from edgespec.profiles import load as load_profile
    from edgespec.profiles import names

    found = [load_profile(name) for name in names()]
    if as_json:
        print_json("profile-list", {"profiles": [one.to_json() for one in found]})
    else:
        print(shown(found), end="")
    progress.note("next: edgespec profile show NAME")
    return 0


def profile_show(config: ProfileShowConfig, as_json: bool, progress: Progress) -> int:
    """Print a device's figures, each with its source."""
    from edgespec.latency_report import profile_table
    from edgespec.profiles import load as load_profile

    found = load_profile(config.name)
    if as_json:
        print_json("profile", found.to_json())
    else:
        print(profile_table(found), end="")
    return 0


def profile_fit(config: ProfileFitConfig, as_json: bool, progress: Progress) -> int:
    """Fit a device's bandwidths and call cost to published figures, and say how far each row is missed."""
    config.check()
    from edgespec.fit import fit
    from edgespec.latency_report import fit_table
    from edgespec.profiles import load as load_profile
    from edgespec.published import rows

    made = fit(load_profile(config.name), rows())
    _keep(made.profile, config.output, progress)
    if as_json:
        print_json("fit", made.to_json())
    else:
        print(fit_table(made), end="")
    return 0


def profile_measure(config: ProfileMeasureConfig, as_json: bool, progress: Progress) -> int:
    """Measure this machine by a bundle's calls, and keep the result as the profile this-machine."""
    config.check()
    from edgespec.latency_report import profile_table
    from edgespec.profiles.profile import own_path

    bundle = verified(config.bundle, progress)
    runtime_type = load("edgespec.runtime.session", "Runtime", extra="onnx")
    settings_type = load("edgespec.runtime.session", "Settings", extra="onnx")
    cpu = load("edgespec.runtime.session", "cpu", extra="onnx")
    from edgespec.measure import measure

    path = Path(config.output) if config.output else own_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with runtime_type.open(bundle.path, config.threads, note=progress.note, tuned=False) as runtime:
        found = measure(bundle, runtime, settings_type, config.runs, cpu(), progress)
    _keep(found, str(path), progress)
    if as_json:
        print_json("profile", found.to_json())
    else:
        print(profile_table(found), end="")
    progress.note(f"next: edgespec estimate {config.bundle} --profile {config.output or found.name}")
    return 0


@contextmanager
def predicted_costs(bundle: str, profile: str) -> Iterator[Path | None]:
    """A file with the call costs that a device is predicted to have; None where no profile is named."""
    if not profile:
        yield None
        return
    from tempfile import TemporaryDirectory

    from edgespec.bundle import open_bundle
    from edgespec.profiles import load as load_profile
    from edgespec.table import predicted_table
    from edgespec.work import of_bundle

    device = load_profile(profile)
    opened = open_bundle(bundle, verify=False)
    with TemporaryDirectory(prefix="edgespec-") as folder:
        path = Path(folder) / "costs.json"
        path.write_text(json.dumps(predicted_table(opened, of_bundle(opened), device)), encoding="utf-8")
        yield path


def _keep(profile: Any, path: str | None, progress: Progress) -> None:
    from edgespec.profiles.profile import to_toml

    if path is None:
        return
    with written(path) as file:
        file.write(to_toml(profile))
    progress.note(f"written to {path}")


COMMANDS: tuple[tuple[Callable[..., int], type], ...] = (
    (estimate, EstimateConfig),
    (profile_list, ProfileListConfig),
    (profile_show, ProfileShowConfig),
    (profile_fit, ProfileFitConfig),
    (profile_measure, ProfileMeasureConfig),
)
GROUPS = {"profile": "Devices: what is known of each, fitted to published figures or measured here."}
