"""The invariance of design section 4 on SmolLM2 itself: real text, int8, evicting, bit by bit."""

from __future__ import annotations

import itertools
import random
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edgespec.bundle import Bundle
from edgespec.config import ExportConfig
from edgespec.exporters import export
from edgespec.exporters.plan import shipped
from edgespec.progress import Progress
from edgespec.runtime.engine import Engine
from edgespec.runtime.session import Runtime, Settings
from tests.helpers.absorb import End, Move, by_moves, one_by_one
from tests.helpers.operators import opener

BUDGET, BLOCK, LENGTH = 256, 64, 160
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = ("Write a long story about a lighthouse keeper and a whale.", "Explain how a refrigerator works.")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    config = ExportConfig(
        "demo", str(tmp_path_factory.mktemp("demo") / "bundle"), draft="demo", weights="int8", budget=BUDGET,
        block=BLOCK, widths=(2, 4, 8), draft_budget=64,
    )  # fmt: skip
    return export(config, Progress(quiet=True), Engine)


@pytest.fixture(scope="session")
def prompts(bundle: Bundle) -> list[list[int]]:
    """Two chats, one of them with a long text before the question, and the middle of an article."""
    tokenizer = Tokenizer.from_file(str(bundle.path / bundle.manifest.tokenizer.tokenizer))
    article = shipped("wikitext")[5000:7000]
    texts = [CHAT.format(QUESTIONS[0]), CHAT.format(article + "\n" + QUESTIONS[1]), article]
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def engine(bundle: Bundle, name: str) -> Engine:
    """The plain engine over the operators that the native runtime has."""
    return Engine(bundle.path, next(m for m in bundle.manifest.models if m.name == name), 1, opener)


def moves(seed: int) -> list[Move]:
    chance = random.Random(seed)
    return [
        Move(chance.randrange(9), chance.randint(1, BLOCK), chance.choice((0, 1, 2, 7)), chance.randrange(99))
        for _ in range(40)
    ]


def assert_same(plain: End, other: End) -> None:
    assert other.text == plain.text
    assert (other.count, other.position) == (plain.count, plain.position)
    assert all(np.array_equal(a, b) for a, b in zip(plain.rows, other.rows, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["target", "draft"])
def test_text_and_caches_are_bitwise_those_of_plain_decoding(
    bundle: Bundle, prompts: list[list[int]], name: str
) -> None:
    model = engine(bundle, name)
    assert model.entry.widths_agree
    for number, prompt in enumerate(prompts):
        plain = one_by_one(model, prompt, LENGTH)
        assert plain.position > model.cache.slots or not number  # the later prompts evict
        for seed in (0, 1):
            assert_same(plain, by_moves(model, prompt, plain.text[:LENGTH], moves(10 * number + seed)))


@pytest.mark.slow
def test_speculation_at_its_best_and_at_its_worst_gives_the_same_text(
    bundle: Bundle, prompts: list[list[int]]
) -> None:
    """Every draft right, every draft wrong, and the widest call with one right row."""
    model = engine(bundle, "target")
    plain = one_by_one(model, prompts[0], 300)
    assert plain.position > model.cache.slots
    for right in (7, 0, 1):
        assert_same(plain, by_moves(model, prompts[0], plain.text[:300], [Move(3, 8, right, 5)]))


def test_threads_do_not_change_the_text(bundle: Bundle, prompts: list[list[int]]) -> None:
    one, two = (Engine(bundle.path, bundle.manifest.models[0], threads=threads) for threads in (1, 2))
    assert_same(one_by_one(one, prompts[2][:60], 40), one_by_one(two, prompts[2][:60], 40))


@pytest.fixture(scope="session")
def runtime(bundle: Bundle) -> Iterator[Runtime]:
    with Runtime.open(bundle.path, threads=1) as opened:
        yield opened


def told(
    runtime: Runtime, ids: list[int], cuts: list[int], how: Settings, path: Path
) -> tuple[list[int], bytes]:
    """The text after a prompt that is absorbed piece by piece, and the target's caches, byte for byte."""
    session = runtime.session()
    for a, b in itertools.pairwise([0, *cuts]):
        session.generate(ids[a:b], Settings(max_new_tokens=0))
    session.generate(ids[cuts[-1] if cuts else 0 :], how)
    session.snapshot(path)
    session.close()
    content = path.read_bytes()
    tokens, count, position, size = struct.unpack_from("<12xI32xIIQ", content)
    start = 80 + 4 * tokens
    assert (tokens, position) == (len(session.tokens), len(session.tokens) - 1)
    assert count <= position
    return session.tokens[len(ids) :], content[start : start + size]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.integers(0, 10_000),
    length=st.sampled_from([9, 120, 300, 420]),
    cuts=st.lists(st.integers(1, 400), max_size=3, unique=True),
    drafter=st.sampled_from(["draft", "ngram", "both"]),
    rule=st.sampled_from(["cost", "adaedl", "confidence", "fixed"]),
    cap=st.integers(1, 7),
)
def test_any_prompt_chunks_widths_and_drafts_give_the_same_text_and_caches(
    runtime: Runtime, start: int, length: int, cuts: list[int], drafter: str, rule: str, cap: int
) -> None:
    text = shipped("wikitext")
    ids = runtime.tokenizer.encode(text[start:], add_special_tokens=False).ids[:length]
    inside = sorted(c for c in cuts if c < len(ids))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "snap"
        plain = told(runtime, ids, [], Settings(max_new_tokens=48, drafter="none"), path)
        how = Settings(max_new_tokens=48, drafter=drafter, stop_rule=rule, draft_tokens=cap)
        assert told(runtime, ids, inside, how, path) == plain
