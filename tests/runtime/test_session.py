"""A session: the chat template in its sandbox, stop ids, limits, and text that is the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgespec.bundle import Bundle
from edgespec.config import ExportConfig
from edgespec.errors import BundleError, InputError
from edgespec.exporters import export
from edgespec.exporters.checkpoint import open_checkpoint
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.runtime.session import Session
from tests.helpers import tiny
from tests.helpers.checkpoints import write_directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("session") / "model", tiny.model("llama"))


def make(source: Path, name: str, **more: Any) -> Bundle:
    given: dict[str, Any] = {"budget": 64, "block": 16, "widths": (2,), "weights": "fp32", **more}
    return export(ExportConfig(str(source), str(source.parent / name), **given), Progress(quiet=True), Engine)


@pytest.fixture(scope="module")
def bundle(source: Path) -> Bundle:
    return make(source, "plain.bundle", policy="none")


def test_greedy_text_is_transformers_own(source: Path, bundle: Bundle) -> None:
    session = Session(bundle, threads=1)
    ids = session.encode("hello there", raw=True)
    model = open_checkpoint(str(source)).load_model()
    wanted = list(ids)
    with torch.no_grad():
        for _ in range(20):
            wanted.append(int(model(torch.tensor([wanted])).logits[0, -1].argmax()))
    answer = session.generate("hello there", tokens=20, raw=True)
    stop = set(bundle.manifest.tokenizer.stop_ids)
    ours = wanted[len(ids) :]
    cut = next((i for i, token in enumerate(ours) if token in stop), len(ours))
    assert list(answer.tokens) == ours[:cut]
    assert answer.prompt_tokens == len(ids)
    assert answer.ended == ("stop" if cut < len(ours) else "length")


def test_a_second_prompt_starts_from_nothing(bundle: Bundle) -> None:
    session = Session(bundle, threads=1)
    first = session.generate("one", tokens=8, raw=True).tokens
    session.generate("something else", tokens=8, raw=True)
    assert session.generate("one", tokens=8, raw=True).tokens == first


def test_without_eviction_a_long_prompt_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="more than the 80 slots of a cache without eviction"):
        Session(bundle, threads=1).generate("x" * 200, raw=True)


def test_without_eviction_generation_ends_where_the_cache_does(bundle: Bundle) -> None:
    answer = Session(bundle, threads=1).generate("x" * 70, tokens=50, raw=True)
    assert answer.ended in ("positions", "stop")
    assert answer.prompt_tokens + len(answer.tokens) <= 81


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (
            "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os.system('true') }}",
            BundleError,
            "cannot be rendered",
        ),
        ("{% for m in messages %}{{ m.content }", BundleError, "cannot be rendered"),
        ("{{ raise_exception('roles must alternate') }}", InputError, "roles must alternate"),
    ],
)
def test_a_hostile_or_broken_template_is_two_lines(
    bundle: Bundle, template: str, error: type, message: str
) -> None:
    session = Session(bundle, threads=1)
    session.template = template
    with pytest.raises(error, match=message):
        session.encode("hi")


def test_the_template_is_applied_unless_raw(bundle: Bundle) -> None:
    session = Session(bundle, threads=1)
    session.template = (
        "<{{ messages[0].role }}>{{ messages[0].content }}{% if add_generation_prompt %}<a>{% endif %}"
    )
    assert session.render("hi") == "<user>hi<a>"
    assert session.encode("hi") != session.encode("hi", raw=True)
