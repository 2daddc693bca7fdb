"""The commands that make a draft: a target's own prompts and samples, and a training on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgespec.config_draft import DraftCurveConfig, DraftPromptsConfig, DraftSamplesConfig, DraftTrainConfig
from edgespec.console import load, print_json
from edgespec.progress import Progress


def draft_prompts(config: DraftPromptsConfig, as_json: bool, progress: Progress) -> int:
    """Let the target write prompts of users, where there are too few of real ones to make samples from."""
    config.check()
    from edgespec.prompts import digest, read

    run = load("edgespec.exporters.draft", "write_prompts")
    render = load("edgespec.runtime.text", "render")
    excluded = {digest(prompt.text) for path in config.exclude for prompt in read(path)}
    facts = run(config, excluded, render, progress)
    if as_json:
        print_json("draft.prompts", facts)
    else:
        print(facts["file"])
        progress.note(f"{facts['prompts']:,} prompts of {facts['written']:,} written")
    progress.note(f"next: edgespec draft samples {config.target} --prompts {facts['file']} -o SAMPLES")
    return 0


def draft_samples(config: DraftSamplesConfig, as_json: bool, progress: Progress) -> int:
    """Let the target answer prompts, and keep what it saw at every place: what a draft is trained on."""
    config.check()
    from edgespec.prompts import read

    run = load("edgespec.exporters.draft", "write_samples")
    render = load("edgespec.runtime.text", "render")
    prompts = [prompt for path in config.prompts for prompt in read(path)]
    facts = run(config, prompts, render, progress)
    if as_json:
        print_json("draft.samples", facts)
    else:
        print(config.output)
        progress.note(f"{facts['texts']:,} texts, {facts['tokens']:,} tokens written")
    progress.note(f"next: edgespec draft train {config.target} --samples {config.output} -o DRAFT")
    return 0


def draft_train(config: DraftTrainConfig, as_json: bool, progress: Progress) -> int:
    """Train a draft on its target's samples; its embedding and LM head stay the target's."""
    config.check()
    facts = load("edgespec.exporters.draft", "train_draft", extra="train")(config, progress)
    if as_json:
        print_json("draft.train", facts)
    else:
        print(config.output)
        progress.note(
            f"BE {facts['block_efficiency']:.3f} on held-out texts, {facts['drafts']} drafts a round"
        )
    progress.note(f"next: edgespec export {config.target} --draft {config.output} -o BUNDLE")
    return 0


def draft_curve(config: DraftCurveConfig, as_json: bool, progress: Progress) -> int:
    """Show trainings side by side at equal steps: loss and held-out BE."""
    config.check()
    from edgespec import curves

    found = [curves.read(Path(folder)) for folder in config.drafts]
    table = curves.to_table(found)
    if config.png:
        load("edgespec.curves", "write_png", extra="plots")(found, Path(config.png))
    if as_json:
        print_json("draft.curve", curves.to_json(found))
    else:
        print(table, end="")
    return 0


COMMANDS: tuple[tuple[Callable[..., int], type], ...] = (
    (draft_prompts, DraftPromptsConfig),
    (draft_samples, DraftSamplesConfig),
    (draft_train, DraftTrainConfig),
    (draft_curve, DraftCurveConfig),
)
GROUPS = {"draft": "Make a draft for a target: prompts, samples of its texts, and a training on them."}
