"""Conversations over a bundle: text in, text out. The loop is the native runtime's; this is its driver.

with Runtime.open("demo.bundle") as runtime:
    session = runtime.session()
    for piece in session.stream("Why is the sky blue?"):
        print(piece, end="")
    print(session.answer.stats["tokens_per_s"])
"""

from __future__ import annotations

import base64
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import tokenizers

from edgespec.bundle import Bundle, open_bundle
from edgespec.errors import BackendError, BundleError, InputError
from edgespec.progress import Advance
from edgespec.runtime.build import binary
from edgespec.runtime.machine import cpu, is_of, on_npu, table_of
from edgespec.runtime.pictures import File, Sight, content, images_of, marked, names, read, shared
from edgespec.runtime.process import ANSWERS, Process
from edgespec.runtime.remote import Remote
from edgespec.runtime.text import Message, Streamed, in_parts, render

DECIDING = ("drafter", "stop_rule", "draft_tokens", "temperature")  # what a trace says of how it was made
QUESTIONS = (
    "Explain how a refrigerator works.",
    "Write a short story about a lighthouse keeper and a whale.",
    "What is 12 times 17? Show each step.",
)


@dataclass(frozen=True)
class Settings:
    """How to generate; the fields are the protocol's, checked by the runtime.

    temperature 0 is greedy. `drafter`: who proposes tokens (auto: prompt lookup, then the draft model).
    `stop_rule`: when a draft ends. `draft_tokens`: most drafted tokens a round, 0 for what the graphs hold.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    drafter: str = "auto"
    stop_rule: str = "cost"
    draft_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """A generated text, why it ended (stop, length, cancelled, positions) and the runtime's figures."""

    text: str
    tokens: tuple[int, ...]
    ended: str
    stats: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON data."""
        return asdict(self)


class Runtime:
    """An opened bundle in a process of its own; a context manager."""

    def __init__(self, bundle: Bundle, process: Process) -> None:
        self.bundle, self.process, self.opened = bundle, process, 0
        self.sight: Sight | None = None  # who makes pictures of images, where the bundle reads any
        entry = bundle.manifest.tokenizer
        try:
            text = bundle.file(entry.tokenizer).read_text(encoding="utf-8")
            self.tokenizer = tokenizers.Tokenizer.from_str(text)
            form = entry.chat_template and bundle.file(entry.chat_template).read_text(encoding="utf-8")
        except Exception as error:  # the tokenizers library raises plain Exception
            process.close()
            raise BundleError(
                f"the tokenizer or its chat template cannot be read: {error}", "export the bundle again"
            ) from error
        self.template = form

    @classmethod
    def open(
        cls,
        path: Path | str,
        threads: int = 0,
        command: Sequence[str] = (),
        remote: Remote | None = None,
        timeout: float = ANSWERS,
        note: Callable[[str], None] | None = None,
        tuned: bool = True,
        costs: Path | None = None,
        soc: str = "",
    ) -> Runtime:
        """Start the runtime over the bundle in this folder, compiling it first if need be.

        `threads` 0: the machine's cores, at most 4. `command`: how to start it instead of the local binary,
        such as an emulator's words; `--bundle PATH` is added. `remote`: start it there, on the copy that
        `edgespec push` made. `note` is told what takes long.
        `tuned`: use the table of call costs beside the bundle, where there is one of this processor. `costs`:
        another table instead; the file is read before this returns. `soc`: compile the graphs for this
        Qualcomm SoC (edgespec.soc) and run them on its NPU, which onnxruntime-qnn emulates on x86-64.
        """
        bundle, note = open_bundle(path), note or _to_stderr
        if remote:
            try:
                return cls(bundle, Process(remote.command(bundle.path, threads, tuned), timeout))
            except BackendError as error:
                hint = f'is it there? edgespec push {path} --via "{shlex.join(remote.via)}"'
                raise BackendError(error.message, hint) from None
        start = list(command) or [str(binary(note, form=bundle.manifest.format))]
        start += ["--bundle", str(bundle.path), *(on_npu(soc) if soc else [])]
        if threads:
            start += ["--threads", str(threads)]
        if costs:
            start += ["--table", str(costs)]
        elif tuned and not command and (table := table_of(bundle.path)).is_file():
            if is_of(table, cpu()):
                start += ["--table", str(table)]
            else:
                note(
                    f"{table.name} is of another processor and not used; measure again: edgespec tune {path}"
                )
        return cls(bundle, Process(start, timeout))

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and every session in it."""
        self.process.close()

    def session(self, picture_bytes: int | None = None) -> Session:
        """A new conversation.

        Its pictures' rows are kept to be absorbed again where it is cut back, the oldest no longer than
        `picture_bytes` hold them (None: the runtime's own limit).
        """
        self.opened += 1
        return Session(self, f"session {self.opened}", picture_bytes)

    def tune(self, runs: int, advance: Advance) -> dict[str, Any]:
        """What a call costs at each width, do widths agree there, and how good the draft is."""
        last: dict[str, Any] = {}
        for last in self.process.events("tune", runs=runs):
            if last["event"] == "run":
                advance(last["run"], runs)
        table: dict[str, Any] = last["table"]
        return table | ({"acceptance": self.acceptance()} if "draft" in table else {})

    def acceptance(self) -> float:
        """How often the draft model's next token is the target's, over a few plain questions."""
        accepted = judged = 0
        for question in QUESTIONS:
            session = self.session()
            how = Settings(max_new_tokens=48, drafter="draft", stop_rule="fixed", draft_tokens=3)
            stats = session.generate(question, how).stats
            accepted, judged = (
                accepted + sum(stats["accepted_by_position"]),
                judged + sum(stats["drafted_by_position"]),
            )
            session.close()
        return accepted / max(judged, 1)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation through the chat template (where there is none, of its last message)."""
        if not self.template:
            return self.encode_raw(messages[-1]["content"])
        return self._encode(self.rendered(messages))

    def rendered(self, messages: Sequence[Message]) -> str:
        """A conversation as the text that its chat template makes of it."""
        entry = self.bundle.manifest.tokenizer
        start = "" if entry.bos_id is None else self.tokenizer.id_to_token(entry.bos_id) or ""
        # Of several stop ids the manifest does not say which is the end-of-text token.
        end = self.tokenizer.id_to_token(entry.stop_ids[0]) if len(entry.stop_ids) == 1 else ""
        if self.bundle.manifest.vision:
            try:
                return render(self.template, in_parts(messages), start, end or "")
            except BundleError:  # a template that takes words as they are, and can show no image
                if images_of(messages):
                    raise
        return render(self.template, messages, start, end or "")

    def encode_raw(self, text: str) -> list[int]:
        """The ids of plain text, the model's start token in front."""
        bos = self.bundle.manifest.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self._encode(text)

    def _encode(self, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:  # a lone surrogate, which Python makes of bytes that are not UTF-8
            raise InputError("the text is not valid UTF-8", "type it in UTF-8") from None


class Session:
    """One conversation: what was said (`messages`), its token ids, and its caches in the runtime."""

    def __init__(self, runtime: Runtime, name: str, picture_bytes: int | None = None) -> None:
        self.runtime, self.name = runtime, name
        self.messages: list[Message] = []
        self.tokens: list[int] = []
        self.seen: list[str] = []  # the pictures among them
        self.answer = Answer("", (), "")
        self.unsure = False  # whether the runtime may have absorbed more than `tokens`
        limit = {} if picture_bytes is None else {"picture_bytes": picture_bytes}
        runtime.process.ask("open", session=name, **limit)

    def close(self) -> None:
        """Give back its memory."""
        self.runtime.process.ask("close", session=self.name)

    def generate(self, prompt: str | Sequence[int], settings: Settings | None = None, **more: Any) -> Answer:
        """The whole answer to a prompt; see `stream`."""
        for _ in self.stream(prompt, settings, **more):
            pass
        return self.answer

    def stream(
        self,
        prompt: str | Sequence[int],
        settings: Settings | None = None,
        raw: bool = False,
        stops: Sequence[str] = (),
        trace: TextIO | None = None,
        images: Sequence[Path | str | File] = (),
    ) -> Iterator[str]:
        """Say something and get the answer piece by piece; afterwards `answer` holds it whole.

        `images`: files that the prompt is about, or their names and contents. They stand before its words, or
        where the model's own mark for an image (Sight.slot) stands in the prompt; token ids hold the image's
        id once for each row.

        A text goes through the chat template after what was said before; `raw` text and token ids are
        appended as they are. `stops`: texts that end the answer, not part of it. `trace` gets a JSON line for
        every prompt (with what decided how much was drafted) and round. A reader that leaves early, or
        Ctrl-C, cancels.
        """
        if self.unsure:
            self.truncate(len(self.tokens))
            self.unsure = False
        chat = isinstance(prompt, str) and not raw
        ids, pictures = self._ids(prompt, raw, read(images))
        known, seen, text, said, done = len(self.tokens), len(self.seen), "", [], None
        streamed = Streamed(self.runtime.tokenizer, stops)
        stop_ids = set(self.runtime.bundle.manifest.tokenizer.stop_ids)
        request = asdict(settings or Settings()) | {"tokens": ids, "trace": trace is not None}
        process = self.runtime.process
        decided = {name: request[name] for name in DECIDING}
        decided |= {"table": process.ready.get("table"), "known": known, **self._unheard(len(pictures))}
        try:
            for picture in pictures:
                pixels = base64.b64encode(picture.tobytes()).decode()
                process.ask("look", session=self.name, pixels=pixels)
            self.tokens += ids
            self.seen += names(pictures)
            for event in process.events("generate", session=self.name, **request):
                if trace is not None and event["event"] in ("prompt", "round"):
                    more = decided if event["event"] == "prompt" else {}
                    trace.write(json.dumps({k: v for k, v in event.items() if k != "id"} | more) + "\n")
                done = event if event["event"] == "done" else None
                new = event["tokens"] if event["event"] == "round" else []
                self.tokens += new
                for token in new:
                    if streamed.stopped or token in stop_ids:
                        break
                    said.append(token)
                    if piece := streamed.feed(token):
                        text += piece
                        yield piece
                    if streamed.stopped:
                        process.cancel()
        except InputError:
            del self.tokens[known:], self.seen[seen:]
            if chat:
                self.messages.pop()
            raise
        finally:
            if done is None:  # refused, interrupted or left early: the runtime may be further than was read
                self.unsure = True
                self.answer = Answer(text, tuple(said), "cancelled")
        if piece := streamed.end():
            text += piece
            yield piece
        assert done is not None
        ended = "stop" if streamed.stopped else done["reason"]
        self.answer = Answer(text, tuple(said), ended, done["stats"])
        if chat:
            self.messages.append({"role": "assistant", "content": text})

    def truncate(self, tokens: int) -> None:
        """Keep the conversation's first tokens; the caches follow by absorbing them again where they must."""
        self.runtime.process.ask("truncate", session=self.name, tokens=tokens)
        self.tokens = self.tokens[:tokens]
        for entry in self.runtime.bundle.manifest.vision:
            self.seen = self.seen[: self.tokens.count(entry.token) // entry.rows]

    def snapshot(self, path: Path | str) -> None:
        """Write the conversation's caches and words to a file of the machine that runs it."""
        self.runtime.process.ask("snapshot", session=self.name, path=str(path))
        words = {"messages": self.messages, "tokens": self.tokens, "seen": self.seen}
        Path(f"{path}.json").write_text(json.dumps(words), encoding="utf-8")

    def restore(self, path: Path | str) -> None:
        """Go on where a snapshot was taken; BundleError or InputError where it is not this bundle's."""
        try:
            words = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
            messages, tokens, seen = (list(words[name]) for name in ("messages", "tokens", "seen"))
        except (OSError, ValueError, TypeError, KeyError) as error:
            hint = "keep the two files of a snapshot together"
            raise InputError(f"{path}.json, a snapshot's words, cannot be read: {error}", hint) from None
        self.runtime.process.ask("restore", session=self.name, path=str(path))
        self.messages, self.tokens, self.seen, self.unsure = messages, tokens, seen, False

    def _ids(
        self, prompt: str | Sequence[int], raw: bool, images: Sequence[File]
    ) -> tuple[list[int], Sequence[Any]]:
        """The ids that a prompt adds to what the runtime has absorbed, and the pictures among them.

        Where the rendered conversation differs from that, it is cut back to what they share first.
        """
        if not isinstance(prompt, str):
            return list(prompt), self._sight(self._sight.slot * len(images), images)[1] if images else ()
        if raw or (images and not self.runtime.template):
            bos = self.runtime.bundle.manifest.tokenizer.bos_id
            if not images:
                return self._blind(self.runtime.encode_raw(prompt)), ()
            sight = self._sight
            ids, pictures = sight(marked(prompt, len(images), sight.slot), images)
            return ([] if bos is None else [bos]) + ids, pictures
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()  # its answer was interrupted
        slot = self._sight.slot if images else ""
        messages = [*self.messages, {"role": "user", "content": content(prompt, images, slot)}]
        if every := images_of(messages):
            ids, pictures = self._sight(self.runtime.rendered(messages), every)
        else:
            ids, pictures = self._blind(self.runtime.encode(messages)), ()
        pairs = zip(ids[:-1], self.tokens, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids) - 1, len(self.tokens)))
        for entry in self.runtime.bundle.manifest.vision:
            same, absorbed = shared(ids, same, names(pictures), self.seen, entry)
            pictures = pictures[absorbed:]
        if same < len(self.tokens):
            self.truncate(same)
        self.messages = messages
        return ids[same:], pictures

    def _blind(self, ids: list[int]) -> list[int]:
        """The same ids; InputError where they show a picture, and there is none."""
        for vision in self.runtime.bundle.manifest.vision:
            if vision.token in ids:
                mark = self.runtime.tokenizer.id_to_token(vision.token)
                hint = "give it with --image, or leave the mark out"
                raise InputError(f"the prompt shows an image ({mark}) and none is given", hint)
        return ids

    def _unheard(self, pictures: int) -> dict[str, Any]:
        """What a trace says of a bundle that reads images: how many of the tokens before the prompt, and
        behind it, a draft does not hold.
        """
        for entry in self.runtime.bundle.manifest.vision:
            each = entry.rows - entry.draft_rows
            return {"unheard": [each * len(self.seen), each * (len(self.seen) + pictures)]}
        return {}

    @property
    def _sight(self) -> Sight:
        """Who makes pictures; InputError where the bundle reads none."""
        if not self.runtime.bundle.manifest.vision:
            raise InputError(
                f"{self.runtime.bundle.path} reads no images",
                "export a vision-language model, or leave the image out",
            )
        if self.runtime.sight is None:
            raise InputError("nobody is here to make pictures of images", "set Runtime.sight")
        return self.runtime.sight


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
