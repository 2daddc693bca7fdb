"""Trains a draft on what its target wrote (arXiv 2403.00858): batches, the loop, checkpoints to go on from.

The draft's embedding and LM head are the target's own and stay frozen, so that a trimmed head and context
rows fit and neither is stored again. Hugging Face accelerate drives it: the same command on a CPU, a GPU or
many machines.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from edgespec.errors import InputError
from edgespec.exporters.losses import LOSSES
from edgespec.exporters.samples import Sample
from edgespec.files import replaced, written_whole

STATE, CURVE, MODEL, RESUME = "state.json", "curve.jsonl", "model.safetensors", "resume.safetensors"


@dataclass(frozen=True)
class Training:
    """How a draft is trained. `tokens` are the padded tokens of one step, of all processes together."""

    steps: int = 2000
    loss: str = "kl"
    rate: float = 7e-4
    warmup: int = 50
    tokens: int = 800
    longest: int = 320
    seed: int = 0
    measure: int = 200  # steps between two measurements, each with a checkpoint
    patience: int = 0  # measurements without a better BE before it stops early; 0: never
    drafts: int = 4  # drafted tokens a round, for BE


@dataclass(frozen=True)
class Batch:
    """Texts side by side: `tokens` [n, T] padded on the right, and the places whose next token is learned.

    `rows`, `columns` [m] are those places; `top_ids`, `top_p` [m, K] what the target saw after each.
    """

    tokens: Tensor
    rows: Tensor
    columns: Tensor
    top_ids: Tensor
    top_p: Tensor


def cut(sample: Sample, longest: int) -> Sample:
    """The sample with at most `longest` tokens: its prompt's beginning goes first, then its own end."""
    written = min(len(sample.tokens) - sample.prompt, longest - 1)
    prompt = min(sample.prompt, longest - written)
    start = sample.prompt - prompt
    end = sample.prompt + written
    return replace(
        sample,
        tokens=sample.tokens[start:end],
        prompt=prompt,
        top_ids=sample.top_ids[:written],
        top_logp=sample.top_logp[:written],
    )


def schedule(lengths: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """The texts of each step of an epoch: shuffled, of like length together, at most `tokens` padded."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(lengths))
    batches: list[list[int]] = []
    window = max(256, tokens // 16)
    for start in range(0, len(order), window):
        group: list[int] = []
        for i in sorted(order[start : start + window], key=lambda i: lengths[i]):
            if group and lengths[i] * (len(group) + 1) > tokens:
                batches.append(group)
                group = []
            group.append(int(i))
        batches.append(group)
    return [batches[i] for i in draw.permutation(len(batches))]


@dataclass(frozen=True)
class Texts:
    """Samples end to end on a device: tokens int32, and top_ids int32 and top_logp float16 [places, K].

    `lengths`, `prompts`, `starts` (in tokens) and `tops` (in top_ids) int64 have a number for every text.
    """

    tokens: Tensor
    top_ids: Tensor
    top_logp: Tensor
    lengths: Tensor
    prompts: Tensor
    starts: Tensor
    tops: Tensor

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some of the texts side by side."""
        n = torch.tensor(numbers, device=self.tokens.device)
        length, prompt = self.lengths[n, None], self.prompts[n, None]
        column = torch.arange(int(length.max()), device=n.device)
        place = (self.starts[n, None] + column).clamp_max(len(self.tokens) - 1)
        tokens = self.tokens[place].long().masked_fill(column >= length, 0)
        rows, columns = ((column >= prompt - 1) & (column < length - 1)).nonzero(as_tuple=True)
        top = self.tops[n][rows] + columns - prompt[rows, 0] + 1
        return Batch(tokens, rows, columns, self.top_ids[top].long(), self.top_logp[top].float().exp())


def packed(samples: Sequence[Sample], device: Any = "cpu") -> Texts:
    """The samples on a device, where batches of them are put together."""
    lengths = np.array([len(s.tokens) for s in samples], np.int64)
    prompts = np.array([s.prompt for s in samples], np.int64)
    written = lengths - prompts
    fields = {"tokens": np.int32, "top_ids": np.int32, "top_logp": np.float16}
    joined = (np.concatenate([getattr(s, name) for s in samples]).astype(t) for name, t in fields.items())
    arrays = (*joined, lengths, prompts, np.cumsum(lengths) - lengths, np.cumsum(written) - written)
    return Texts(*(torch.from_numpy(a).to(device) for a in arrays))


def law(batch: Batch, kept: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """The target's likeliest tokens as columns of `kept` (-1: lacking), and their share of what is left."""
    column = kept.new_full((vocab,), -1)
    column[kept] = torch.arange(len(kept), device=kept.device)
    index = column[batch.top_ids]
    p = batch.top_p.masked_fill(index < 0, 0.0)
    return index, p / p.sum(1, keepdim=True).clamp_min(1e-6)


class Draft(nn.Module):
    """A Transformers decoder whose hidden rows meet chosen rows of a frozen head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.get_input_embeddings().weight.requires_grad_(False)
        model.get_output_embeddings().weight.requires_grad_(False)

    def forward(self, tokens: Tensor, rows: Tensor, columns: Tensor, kept: Tensor) -> Tensor:
        """Log-softmax [m, len(kept)] at the named places; the head multiplies in float32 always."""
        hidden = self.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[rows, columns]
        head = self.model.get_output_embeddings()
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), head.weight[kept]).log_softmax(-1)

    def learned(self) -> dict[str, Tensor]:
        """The parameters that training changes, under the checkpoint's names."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


@torch.no_grad()
def block_efficiency(
    draft: Draft, samples: Sequence[Sample], kept: np.ndarray, drafts: int, tokens: int, context: bool = True
) -> float:
    """BE over greedy texts: tokens / verify calls with `drafts` drafted a round; no round is run for it.

    `tokens` padded ones are read at once.

    Greedy drafts that are accepted are the text itself, so one pass over the text tells where the draft's
    likeliest token is the next one; a round takes the run of such places. Candidates are `kept` and, with
    `context`, every token that the text has had so far (context rows).
    """
    emitted = calls = 0
    texts = packed(samples, next(draft.parameters()).device)
    static = torch.from_numpy(kept).to(texts.tokens.device)
    for numbers in schedule([len(s.tokens) for s in samples], tokens, 0):
        batch = texts.batch(numbers)
        hits = predicted(draft, batch, static, context) == batch.tokens[batch.rows, batch.columns + 1]
        for row in hits.cpu().split(batch.rows.bincount().tolist()):
            emitted, calls = emitted + len(row), calls + rounds(row.tolist(), drafts)
    return emitted / max(1, calls)


def predicted(draft: Draft, batch: Batch, kept: Tensor, context: bool) -> Tensor:
    """The draft's likeliest token at every place [m], of `kept` and of the text before the place."""
    if not context:
        return kept[draft(batch.tokens, batch.rows, batch.columns, kept).argmax(1)]
    ids, column = torch.cat([kept, batch.tokens.flatten()]).unique(return_inverse=True)
    n, length = batch.tokens.shape
    since = ids.new_full((n, len(ids)), length, dtype=torch.int32)  # a text's first place that has the token
    places = torch.arange(length, device=ids.device, dtype=torch.int32).expand(n, -1)
    since.scatter_reduce_(1, column[len(kept) :].view(n, -1), places, "amin")
    since[:, column[: len(kept)]] = 0
    logq = draft(batch.tokens, batch.rows, batch.columns, ids)
    return ids[logq.masked_fill(since[batch.rows] > batch.columns[:, None], -torch.inf).argmax(1)]


def rounds(hits: Sequence[bool], drafts: int) -> int:
    """How many verify calls write a text whose places the draft told or did not."""
    place = calls = 0
    while place < len(hits):
        run = 0
        while run < drafts and place + run < len(hits) and hits[place + run]:
            run += 1
        place += run + 1
        calls += 1
    return calls


def learning_rate(step: int, training: Training) -> float:
    """A linear warm-up, then half a cosine to zero."""
    if step < training.warmup:
        return training.rate * (step + 1) / training.warmup
    part = (step - training.warmup) / max(1, training.steps - training.warmup)
    return training.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def train(
    model: Any,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    kept: np.ndarray,
    folder: Path,
    training: Training,
    accelerator: Any,
    advance: Callable[[int, int], None],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Train `model` in place, the best checkpoint kept in the folder; goes on where a run stopped. Its state.

    Each measurement is a line of curve.jsonl (step, tokens, loss, BE on `held_out`'s greedy texts, seconds).
    InputError where the folder's run had other settings, and where the loss is no number.
    """
    draft = Draft(model)
    learned_from = [cut(s, training.longest) for s in samples]
    greedy = [cut(s, training.longest) for s in held_out if s.temperature == 0]
    if not learned_from or not greedy:
        raise InputError("there are too few samples to train on and to measure with", "make more samples")
    draft.to(accelerator.device)
    weights = [p for p in draft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=training.rate, betas=(0.9, 0.95), weight_decay=0.01)
    state = resume(folder, draft, optimizer, training)
    ready, optimizer = accelerator.prepare(draft, optimizer)
    loss_of = LOSSES[training.loss]
    vocab, static = model.config.vocab_size, torch.from_numpy(kept).to(accelerator.device)
    texts = packed(learned_from, accelerator.device)
    steps = endless([len(s.tokens) for s in learned_from], training)
    losses: list[float] = []
    for step in range(training.steps):
        numbers = next(steps)
        if step < state["step"]:
            continue
        began = time.monotonic()
        mine = numbers[accelerator.process_index :: accelerator.num_processes] or numbers[:1]
        batch = texts.batch(mine)
        ids = torch.cat([static, batch.tokens.flatten()]).unique()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        index, p = law(batch, ids, vocab)
        loss = loss_of(index, p, ready(batch.tokens, batch.rows, batch.columns, ids))
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss of step {step} is {loss.item()}", "use a lower --rate; the last checkpoint is kept"
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        state["tokens"] += len(batch.rows) * accelerator.num_processes
        state["seconds"] += time.monotonic() - began
        advance(step + 1, training.steps)
        if (step + 1) % training.measure == 0 or step + 1 == training.steps:
            state["step"] = step + 1
            if accelerator.is_main_process:
                measured(folder, draft, optimizer, greedy, kept, state, losses, training, note)
            accelerator.wait_for_everyone()
            losses = []
            if (
                training.patience
                and state["step"] - state["best_step"] >= training.patience * training.measure
            ):
                note(f"stopped early: no better BE since step {state['best_step']}")
                break
    return state


def endless(lengths: Sequence[int], training: Training) -> Iterator[list[int]]:
    """The texts of every step, epoch after epoch: a function of the seed, so that a run can be resumed."""
    epoch = 0
    while True:
        yield from schedule(lengths, training.tokens, training.seed * 1_000_003 + epoch)
        epoch += 1


def measured(
    folder: Path,
    draft: Draft,
    optimizer: Any,
    greedy: Sequence[Sample],
    kept: np.ndarray,
    state: dict[str, Any],
    losses: Sequence[float],
    training: Training,
    note: Callable[[str], None],
) -> None:
    """Measure BE, add a line to the curve, and save: the best model apart from what a resumed run needs."""
    draft.eval()
    found = block_efficiency(draft, greedy, kept, training.drafts, training.tokens)
    draft.train()
    line = {
        "step": state["step"],
        "tokens": state["tokens"],
        "loss": sum(losses) / len(losses),
        "block_efficiency": found,
        "seconds": round(state["seconds"], 1),
    }
    with (folder / CURVE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    note(f"step {line['step']:>6}  loss {line['loss']:.4f}  BE {found:.3f}  {state['tokens']:,} tokens")
    learned = {name: p.detach().contiguous() for name, p in draft.learned().items()}
    if found > state["best"]:
        state |= {"best": found, "best_step": state["step"]}
        replaced(folder / MODEL, lambda path: path.write_bytes(save(learned)))
    numbered = optimizer.state_dict()["state"]  # AdamW's moments and step counts by the parameter's number
    moments = {f"{name}.{i}": v.contiguous() for i, held in numbered.items() for name, v in held.items()}
    replaced(folder / RESUME, lambda path: path.write_bytes(save(learned | moments)))
    written_whole(folder / STATE, json.dumps(state | {"training": asdict(training)}, indent=1) + "\n")


def resume(folder: Path, draft: Draft, optimizer: Any, training: Training) -> dict[str, Any]:
    """The state of the folder's run, its weights and moments put in place; a fresh one in a new folder."""
    path = folder / STATE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CURVE).unlink(missing_ok=True)
        return {"step": 0, "tokens": 0, "seconds": 0.0, "best": 0.0, "best_step": 0}
    state = json.loads(path.read_text(encoding="utf-8"))
    held = Training(**state.pop("training"))
    if replace(held, patience=training.patience, measure=training.measure) != training:
        raise InputError(f"{folder} holds a training with other settings", "choose another folder with -o")
    saved = load_file(folder / RESUME)
    with torch.no_grad():
        for name, parameter in draft.learned().items():
            parameter.copy_(saved.pop(name))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in saved.items():
        kind, _, number = name.rpartition(".")
        moments.setdefault(int(number), {})[kind] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return state
