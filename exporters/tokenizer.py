"""A checkpoint's tokenizer as one tokenizer.json, its chat template and the ids that end a text.

`tokenizer.json` is the format of the tokenizers library, which the command line and the tests both read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from edgespec.errors import InputError
from edgespec.prompts import Prompt

# Tokens that end a turn or a text. Not <|end|>: gpt-oss ends its reasoning with it, and Phi-3, whose turn
# it ends, lists it in generation_config.json.
END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|endofturn|>",
    "<|stop|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "</s>",
    "<eos>",
)
# HyperCLOVA X's turn is blocks (reasoning, a tool's call, the answer) that each end with <|im_end|>; then
# <|endofturn|> ends the turn, or <|stop|> where a tool is to answer, which a template need not write.
BLOCK_END, BLOCKS_END = "<|im_end|>", ("<|endofturn|>", "<|stop|>")
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
PADDING = re.compile(r"\[PAD\d+\]|<\|?(dummy|pad|unused)_?\d+\|?>")
USE_DIRECTORY = "export from the model's directory with its tokenizer.json instead"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer; `stop_ids` end a text, `bos_id` starts a raw one (None where the model wants none).

    Callers encode without special tokens and put `bos_id` in front; a chat template writes its own.
    """

    tokenizer_json: bytes
    chat_template: str
    stop_ids: tuple[int, ...]
    bos_id: int | None

    @cached_property
    def encoder(self) -> Any:
        """The tokenizers library's form of it."""
        return tokenizers.Tokenizer.from_str(self.tokenizer_json.decode())


def vocabularies_differ(target: Tokenizer, draft: Tokenizer) -> list[tuple[int, str | None, str | None]]:
    """The ids whose token differs, each with the target's and the draft's token (None: it has no such id).

    Padding is no difference: embedding rows without a token, and converters' placeholders ([PAD151646]).
    """
    ours, theirs = _tokens(target), _tokens(draft)
    differing = []
    for i in sorted(ours.keys() | theirs.keys()):
        pair = ours.get(i), theirs.get(i)
        if pair[0] != pair[1] and not (None in pair and PADDING.fullmatch(pair[0] or pair[1] or "")):
            differing.append((i, *pair))
    return differing


def _tokens(tokenizer: Tokenizer) -> dict[int, str]:
    return {i: token for token, i in _load(tokenizer.tokenizer_json, "tokenizer.json").get_vocab().items()}


def asked(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], render: Callable[..., str]
) -> list[tuple[list[int], str]]:
    """Prompts as token ids with their categories: a user's first turn, where there is a chat template.

    `render` fills a template; a prompt of no token is left out.
    """
    found = []
    for prompt in prompts:
        if ids := encoded(tokenizer, first_turn(tokenizer, prompt.text, render)):
            found.append((ids, prompt.category))
    return found


def pieces(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], size: int) -> list[tuple[list[int], str]]:
    """(name, text) as token ids in pieces of at most `size`, each with the text's name; 2 tokens at least."""
    found = []
    for name, text in texts:
        ids = tokenizer.encoder.encode(text, add_special_tokens=False).ids
        found += [(ids[i : i + size], name) for i in range(0, len(ids) - 1, size)]
    return [one for one in found if len(one[0]) > 1]


def unasked(
    tokenizer: Tokenizer, beginnings: Sequence[str], render: Callable[..., str]
) -> list[tuple[list[int], str]]:
    """Token ids of a user's turn that goes no further than its first words, with these words; InputError
    where a chat template says nothing of users."""
    if not tokenizer.chat_template:
        raise InputError("the target has no chat template, so it writes no prompts of users", "give prompts")
    mark = "\N{SNOWMAN}"
    before, found, _ = first_turn(tokenizer, mark, render).partition(mark)
    if not found:
        raise InputError("the target's chat template leaves out what a user says", "give prompts")
    return [(encoded(tokenizer, before + words), words) for words in beginnings]


def decoder(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """From token ids to their text, special tokens left out."""
    return lambda ids: str(tokenizer.encoder.decode(list(ids)))


def first_turn(tokenizer: Tokenizer, text: str, render: Callable[..., str]) -> str:
    """The text as a user's first turn, where there is a chat template."""
    if not tokenizer.chat_template:
        return text
    text_of = lambda i: (tokenizer.encoder.id_to_token(i) or "") if i is not None else ""  # noqa: E731
    end = text_of(tokenizer.stop_ids[0]) if len(tokenizer.stop_ids) == 1 else ""
    message = [{"role": "user", "content": text}]
    return render(tokenizer.chat_template, message, text_of(tokenizer.bos_id), end)


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """A rendered text as token ids: a template has written its own first token, a raw text has not."""
    raw = not tokenizer.chat_template and tokenizer.bos_id is not None
    return ([tokenizer.bos_id] if raw else []) + tokenizer.encoder.encode(text, add_special_tokens=False).ids


def directory_tokenizer(directory: Path, config_eos: int | list[int] | None) -> Tokenizer:
    """The tokenizer of a Hugging Face directory. Stop ids: generation_config.json, the configuration, the
    tokenizer's eos token and the template's end-of-turn tokens together."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        found = (
            " (only the SentencePiece tokenizer.model)" if (directory / "tokenizer.model").exists() else ""
        )
        raise InputError(
            f"{directory.name} has no tokenizer.json{found}",
            "save a fast tokenizer there: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    content = path.read_bytes()
    tokenizer = _load(content, f"{directory.name}/tokenizer.json")
    settings = optional_json(directory / "tokenizer_config.json")
    generation = optional_json(directory / "generation_config.json")
    template = _directory_template(directory, settings)
    named = _token_text(settings.get("eos_token"))
    eos = [*token_ids(generation.get("eos_token_id")), *token_ids(config_eos)]
    eos += token_ids(tokenizer.token_to_id(named) if named else None)
    bos = _added_bos(tokenizer)
    if settings.get("add_bos_token") is True:
        bos = tokenizer.token_to_id(_token_text(settings.get("bos_token")) or "")
    elif settings.get("add_bos_token") is False:
        bos = None
    return Tokenizer(content, template, _stop_ids(tokenizer, template, eos), bos)


def gguf_tokenizer(fields: dict[str, Any], file: str) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata: byte-level BPE with a pre-tokenizer known by name."""
    kind, split = fields.get("tokenizer.ggml.model"), str(fields.get("tokenizer.ggml.pre"))
    if kind is None:
        raise InputError(f"{file} holds no tokenizer", USE_DIRECTORY)
    if kind != "gpt2" or split not in PRE_TOKENIZERS:
        raise InputError(
            f"{file} has a tokenizer of a kind that is not read ({kind}, {split})", USE_DIRECTORY
        )
    try:
        tokenizer = _byte_level(fields, split)
    except Exception as error:  # the library raises bare Exception, and a damaged file holds anything
        raise InputError(f"{file} has a damaged tokenizer ({error})", USE_DIRECTORY) from None
    template = fields.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else ""
    eos = [
        *token_ids(fields.get("tokenizer.ggml.eos_token_id")),
        *token_ids(fields.get("tokenizer.ggml.eot_token_id")),
    ]
    content = tokenizer.to_str().encode()
    return Tokenizer(content, template, _stop_ids(tokenizer, template, eos), _added_bos(tokenizer))


def _byte_level(fields: dict[str, Any], split: str) -> tokenizers.Tokenizer:
    """Byte-level BPE from a file's tokens and merges, control and user-defined tokens matched whole."""
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    kinds = dict(zip(tokens, types, strict=True))
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[token] != UNUSED}
    pairs = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split == "llama-bpe")
    )
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    special = [AddedToken(t, normalized=False, special=True) for t, kind in kinds.items() if kind == CONTROL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, kind in kinds.items() if kind == USER_DEFINED]
    )
    # llama.cpp's own default where the file does not say
    if fields.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"):
        bos = fields["tokenizer.ggml.bos_token_id"]
        text = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[text, "$A"], special_tokens=[(text, bos)]
        )
    return tokenizer


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _smollm() -> pre_tokenizers.PreTokenizer:
    # Every digit alone, then GPT-2's words. Transformers' GGUF converter forgets the digits: spaces before a
    # number come out otherwise than in the model's own tokenizer.json.
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


PRE_TOKENIZERS = {
    "smollm": _smollm,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: _split(WORDS + r"\p{N}{1,3}" + REST),
    "qwen2": lambda: _split(WORDS + r"\p{N}" + REST),
}


def _stop_ids(tokenizer: tokenizers.Tokenizer, template: str, eos: list[int]) -> tuple[int, ...]:
    special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    turns = {t for t in END_OF_TURN if t in special and t in template}
    if BLOCKS_END[0] in turns:
        turns = (turns - {BLOCK_END}) | {t for t in BLOCKS_END if t in special}
    return tuple(sorted({*eos, *(special[t] for t in turns)}))


def _added_bos(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id that the tokenizer's own post-processor puts before a text."""
    plain, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return full[0] if len(full) > len(plain) and full[:1] != plain[:1] else None


def _directory_template(directory: Path, settings: dict[str, Any]) -> str:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    template: Any = ""
    for name in ("chat_template.json", "processor_config.json"):  # a processor's own goes first, as there
        template = template or optional_json(directory / name).get("chat_template") or ""
    template = template or settings.get("chat_template") or ""
    if isinstance(template, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default") or ""
    return template if isinstance(template, str) else ""


def _load(content: bytes, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"{name} is damaged ({error})", "download it again, or save the tokenizer again"
        ) from None


def optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no such file; InputError where it is not an object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path.parent.name}/{path.name} is not JSON ({error})", "download it again"
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"{path.parent.name}/{path.name} is not a JSON object", "download it again")
    return value


def token_ids(value: Any) -> list[int]:
    """Token ids from an id, a list of ids or nothing."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _token_text(value: Any) -> str | None:
    """A token's text, which older files keep in an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
