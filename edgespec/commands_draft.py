"""The commands that make a draft: samples of the target, and a training on them."""

from __future__ import annotations

from collections.abc import Callable

from edgespec.config_draft import DraftSamplesConfig, DraftTrainConfig
from edgespec.console import load, print_json
from edgespec.progress import Progress


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


COMMANDS: tuple[tuple[Callable[..., int], type], ...] = (
    (draft_samples, DraftSamplesConfig),
    (draft_train, DraftTrainConfig),
)
GROUPS = {"draft": "Make a draft for a target: samples of its texts, and a training on them."}
