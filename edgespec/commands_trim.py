"""The command that chooses the rows of a draft's head."""

from __future__ import annotations

from collections.abc import Callable

from edgespec.config_trim import TrimConfig
from edgespec.console import load, print_json
from edgespec.progress import Progress


def trim(config: TrimConfig, as_json: bool, progress: Progress) -> int:
    """Choose the rows of a draft's LM head by what the target writes, and write a vocabulary file."""
    config.check()
    from pathlib import Path

    run = load("edgespec.exporters.trim_run", "trim")
    render = load("edgespec.runtime.text", "render")
    from edgespec import trim_report, vocabulary

    result, chosen = run(config, render, progress)
    vocabulary.write(chosen, Path(config.output))
    if config.html is not None:
        trim_report.write_html(result, Path(config.html))
    if config.png is not None:
        trim_report.write_png(result, Path(config.png))
    if as_json:
        print_json("trim", {"output": config.output, **result.to_json()})
    else:
        print(trim_report.to_table(result), end="")
    draft = f"--draft {config.draft or 'demo'} --draft-vocab {config.output}"
    progress.note(f"next: edgespec export {config.target} {draft} -o out/trimmed.bundle")
    return 0


COMMANDS: tuple[tuple[Callable[..., int], type], ...] = ((trim, TrimConfig),)
GROUPS: dict[str, str] = {}
