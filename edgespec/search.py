"""The best settings of a model on a device: tokens a second against memory, over everything an export
decides.

Precision and budget change what a model says, and how much this module cannot know: so the table holds, for
each of them, the settings that nothing beats in both speed and memory. Draft width, the rows of the draft's
head and the block change neither text nor quality. The same code runs here, or in pieces on Ray's workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, product
from math import log
from typing import Any

from edgespec.errors import BackendError, EdgespecError
from edgespec.estimate import block_efficiency, estimate
from edgespec.profiles import Profile
from edgespec.shape import Shape, precision
from edgespec.work import of_shape

WIDTHS = (1, 2, 3, 4, 6, 8, 12)
BLOCKS = (32, 64, 128, 256)
BUDGETS = (512, 1024, 2048, 4096, 8192)
HEAD_ROWS = (2048, 4096, 8192, 16384, 32768, 0)
STORED = {"npu": ("w4a16", "w8a16", "int4", "fp16"), "cpu": ("int4", "int8", "fp16")}
WORTH = 1.01  # a setting that takes more memory must be faster by this much to be listed
# Share of tokens of a text (WikiText-2 test, 4,438 of SmolLM2's tokens) among the rows that `edgespec export`
# keeps by another (WikiText-2 validation); a token outside is never drafted. Another language or tokenizer
# has # other shares.
COVERAGE = {2048: 0.765, 4096: 0.815, 8192: 0.876, 16384: 0.937, 32768: 0.984}
PIECES = 16


@dataclass(frozen=True)
class Setting:
    """What an export decides; `draft_rows` 0 is a whole head."""

    precision: str
    budget: int
    block: int
    width: int
    draft_rows: int


@dataclass(frozen=True)
class Found:
    """A setting and what it comes to. `best`: no other of any precision and budget beats it in both."""

    setting: Setting
    block_efficiency: float
    tokens_per_s: float
    ttft_s: float
    bytes_memory: float
    fits: bool | None
    best: bool = False

    def to_json(self) -> dict[str, Any]:
        """Setting and figures in one object."""
        flat = asdict(self)
        return flat.pop("setting") | flat | {"ttft_ms": self.ttft_s * 1e3}


@dataclass(frozen=True)
class Question:
    """What a search is about: a target and its draft (or none), on a device, for texts of `context`
    tokens.
    """

    target: Shape
    draft: Shape | None
    profile: Profile
    context: int
    prompt: int
    acceptance: float


def settings(question: Question) -> tuple[Setting, ...]:
    """Every setting worth asking for; the precisions are those that the device computes in."""
    kind, rates = question.profile.kind, question.profile.precisions()
    able = [name for name in STORED[kind] if precision(name, kind).arithmetic in rates]
    budgets = [n for n in BUDGETS if n < question.context] or [BUDGETS[0]]
    budgets.append(max(question.context - BLOCKS[0], BLOCKS[-1]))
    trims = [rows for rows in HEAD_ROWS if question.draft and rows < question.draft.vocab] or [0]
    found = []
    for name, budget, block, width in product(able, sorted(set(budgets)), BLOCKS, WIDTHS):
        if block <= budget and width <= block:
            found += [Setting(name, budget, block, width, rows) for rows in (trims if width > 1 else [0])]
    return tuple(found)


def coverage(rows: int, vocab: int) -> float:
    """The share of tokens that a head of so many rows can draft: COVERAGE between its points, in log rows."""
    if rows in (0, vocab) or rows > vocab:
        return 1.0
    points = [*sorted(COVERAGE.items()), (max(vocab, 49152), 1.0)]
    if rows <= points[0][0]:
        return points[0][1] * rows / points[0][0]
    for (low, below), (high, above) in pairwise(points):
        if rows <= high:
            return below + (above - below) * log(rows / low) / log(high / low)
    return 1.0


def evaluate(question: Question, batch: Sequence[Setting]) -> list[Found]:
    """What each setting comes to."""
    return [_evaluate(question, setting) for setting in batch]


def _evaluate(q: Question, s: Setting) -> Found:
    stored = precision(s.precision, q.profile.kind)
    steps = [("prefill", s.block), ("decode", 1), ("verify", s.width)]
    appends = q.profile.kind == "cpu"
    models = {"target": of_shape(q.target, stored, steps, s.budget, s.block, appends=appends)}
    chance = q.acceptance
    if q.draft and s.width > 1:
        chance *= coverage(s.draft_rows, q.draft.vocab)
        drafts = [("prefill", s.block), ("draft", 2)]
        models["draft"] = of_shape(q.draft, stored, drafts, s.budget, s.block, "draft", s.draft_rows, appends)
    be = block_efficiency(chance, s.width)
    said = estimate(models, q.profile, s.precision, q.context, q.prompt, s.width, be)
    held = said.memory
    return Found(s, be, said.tokens_per_s, said.ttft_s, held.bytes_peak, held.fits)


def search(question: Question, engine: Callable[..., Iterable[list[Found]]] = map) -> tuple[Found, ...]:
    """The settings that stay, cheapest in memory first, precision by precision and budget by budget.

    `engine` maps a function over batches of settings: the builtin, or `on_ray`.
    """
    asked = settings(question)
    batches = [asked[i::PIECES] for i in range(PIECES)]
    found = [one for batch in engine(partial(evaluate, question), batches) for one in batch]
    order = sorted(found, key=lambda f: (f.bytes_memory, -f.tokens_per_s, *asdict(f.setting).values()))
    overall = set(_front(order))
    kept: list[Found] = []
    for group in sorted({(f.setting.precision, f.setting.budget) for f in order}):
        own = [f for f in order if (f.setting.precision, f.setting.budget) == group]
        kept += [Found(**vars(f) | {"best": f in overall}) for f in _front(own)]
    return tuple(kept)


def _front(order: Sequence[Found]) -> list[Found]:
    """Those of an order by memory that are faster than everything before them."""
    front: list[Found] = []
    for one in order:
        if not front or one.tokens_per_s > WORTH * front[-1].tokens_per_s:
            front.append(one)
    return front


def on_ray(work: Callable[[Sequence[Setting]], list[Found]], batches: Iterable[Sequence[Setting]]) -> Any:
    """The batches' results from Ray's workers; BackendError where ray is not installed or does not start."""
    try:
        import ray
    except ModuleNotFoundError:
        raise BackendError(
            "ray is not installed", "pip install 'edgespec[ray]', or leave --ray out"
        ) from None
    try:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        remote = ray.remote(work.func if isinstance(work, partial) else work)
        given = work.args if isinstance(work, partial) else ()
        return ray.get([remote.remote(*given, batch) for batch in batches])
    except EdgespecError:
        raise
    except Exception as error:  # ray raises many kinds
        raise BackendError(f"ray failed: {str(error)[:200]}", "leave --ray out") from error
