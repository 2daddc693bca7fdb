"""The commands about image encoders: selectors, what pruning costs, and the graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from edgespec.config_vision import VisionEvalConfig, VisionExportConfig, VisionTrainConfig, VisionTuneConfig
from edgespec.console import load, print_json
from edgespec.files import written_whole
from edgespec.progress import Progress
from edgespec.rendering import grid, printed


def vision_train_selector(config: VisionTrainConfig, as_json: bool, progress: Progress) -> int:
    """Train what chooses an image encoder's patches: ToSA's selectors, the encoder frozen."""
    config.check()
    facts = load("edgespec.exporters.vision", "train_selector", extra="vision")(config, progress)
    if as_json:
        print_json("vision.train-selector", facts)
    else:
        print(config.output)
        kl, same = ([facts[f"{what}_{when}"] for when in ("before", "after")] for what in ("kl", "overlap"))
        progress.note(f"KL to the true attention {kl[0]:.4f} -> {kl[1]:.4f} nats")
        progress.note(f"of the half that it would choose, {same[0]:.1%} -> {same[1]:.1%} are chosen")
    given = f"--selectors {config.output} --images {config.images}"
    progress.note(f"next: edgespec vision eval {config.model} {given} -o OUT")
    return 0


def vision_tune(config: VisionTuneConfig, as_json: bool, progress: Progress) -> int:
    """Train an image encoder on with fewer tokens in its layers, to give the whole one's features."""
    config.check()
    facts = load("edgespec.exporters.vision_tuning", "tune", extra="vision")(config, progress)
    if as_json:
        print_json("vision.tune", facts)
    else:
        print(config.output)
        before, after = (facts[f"similarity_{when}"] for when in ("before", "after"))
        progress.note(f"likeness to the whole encoder's features, held out: {before:.4f} -> {after:.4f}")
    chosen = f" --selectors {config.output}/selectors.safetensors" if config.selectors else ""
    given = f"--method {config.method}{chosen} --keep {config.keep}"
    progress.note(f"next: edgespec vision export {config.output} {given} -o OUT")
    return 0


def vision_eval(config: VisionEvalConfig, as_json: bool, progress: Progress) -> int:
    """Show what leaving patches out costs in features, beside other ways to choose and to merge."""
    config.check()
    Path(config.output).mkdir(exist_ok=True)
    found = load("edgespec.exporters.vision", "evaluate", extra="vision")(config, progress)
    rows = [
        (
            row["method"],
            f"{row['keep']:.2f}",
            f"{row['flops']:.1%}",
            f"{row['similarity']:.4f}",
            f"{row['worst']:.4f}",
        )
        for row in found["rows"]
    ]
    table = printed([grid(("method", "keep", "FLOPs", "similarity", "worst image"), rows)])
    written_whole(Path(config.output) / "vision.json", json.dumps(found, indent=1) + "\n")
    if as_json:
        print_json("vision.eval", found)
    else:
        print(table, end="")
    return 0


def vision_export(config: VisionExportConfig, as_json: bool, progress: Progress) -> int:
    """Export an image encoder as one fixed-shape graph, patches left out where asked."""
    config.check()
    facts = load("edgespec.exporters.vision", "export", extra="vision")(config, progress)
    if as_json:
        print_json("vision.export", facts)
    else:
        print(config.output)
        part = facts["flops"] / facts["flops_whole"]
        progress.note(f"{facts['flops'] / 1e9:.2f} GFLOPs, {part:.1%} of the whole encoder's layers")
        progress.note(f"furthest from PyTorch: {facts['furthest_from_pytorch']:.1e} of the largest feature")
    return 0


COMMANDS: tuple[tuple[Callable[..., int], type], ...] = (
    (vision_train_selector, VisionTrainConfig),
    (vision_tune, VisionTuneConfig),
    (vision_eval, VisionEvalConfig),
    (vision_export, VisionExportConfig),
)
GROUPS = {"vision": "Prune an image encoder (ToSA): selectors, what it costs, and the graph."}
