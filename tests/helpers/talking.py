"""A bundle with a tokenizer and a chat template but no graphs: for sessions over the scripted runtime."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from edgespec.bundle import Bundle, creating, open_bundle
from tests.helpers.bundles import fill, manifest
from tests.helpers.checkpoints import TEMPLATE, tokenizer_json

FAKE = Path(__file__).parent / "fake_runtime.py"


def talking(path: Path, template: str = TEMPLATE) -> Bundle:
    """Stop ids are the tiny tokenizer's end-of-turn token alone."""
    with creating(path) as staging:
        what = manifest()
        what = replace(
            what,
            tokenizer=replace(what.tokenizer, chat_template="chat.jinja", stop_ids=(2,), bos_id=None),
        )
        fill(staging.path, what)
        (staging.path / what.tokenizer.tokenizer).write_text(json.dumps(tokenizer_json()))
        (staging.path / "chat.jinja").write_text(template)
        staging.finish(what)
    return open_bundle(path)


def program(path: Path, how: str) -> Path:
    """The scripted runtime as a file that can be started like the real one."""
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(FAKE))} {how} "$@"\n')
    path.chmod(0o755)
    return path
