"""What `edgespec trim` can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

from edgespec.config import DRAFTS
from edgespec.errors import BackendError, InputError
from edgespec.flags import RANDOM, between, check_file, check_model, flag, listed

AUTO = "auto"


@dataclass(frozen=True)
class TrimConfig:
    """`edgespec trim`: whose head to trim, by which prompts' answers, and where the results go."""

    target: str = flag("Hugging Face folder, .gguf file, or the word demo", positional=True)
    output: str = flag("vocabulary file to write", short="-o")
    prompts: tuple[str, ...] = flag("files of prompts, each a corpus of its own", (), many=True)
    texts: tuple[str, ...] = flag(
        "files of prompts with their answers instead: counted as they stand, the target writes nothing",
        (),
        many=True,
    )
    weights_of: tuple[int, ...] = flag(
        "how much each corpus counts (default: all alike); 0: it is judged and not counted", ()
    )
    draft: str | None = flag("draft that the size is chosen for, as export --draft", None)
    size: str = flag("rows of the head, or auto: as many as give the largest MBSU", AUTO)
    context_rows: int = flag("context rows that the draft will have beside them", 256)
    samples: str | None = flag(
        "folder of the target's answers, made there if need be (default: beside the output); without "
        "--prompts: as edgespec draft samples made it",
        None,
    )
    limit: int = flag("prompts or texts of each file, spread over it", 200)
    html: str | None = flag("page to write with the table and the curves", None)
    png: str | None = flag("picture of the curves to write", None)

    @property
    def rows(self) -> int | None:
        """The wanted size, None for auto."""
        return None if self.size == AUTO else int(self.size)

    @property
    def corpora(self) -> int:
        """How many corpora are judged; a folder of samples is one."""
        return max(1, len(self.prompts or self.texts))

    def check(self) -> TrimConfig:
        """Itself, or an InputError for the first value that cannot work."""
        check_model("target", self.target)
        check_model("draft", self.draft, DRAFTS)
        for name in ("prompts", "texts"):
            for path in getattr(self, name):
                check_file(name, path)
        if self.texts and (self.prompts or self.samples):
            raise InputError("texts are given with prompts or samples", "leave one of them out")
        if not self.prompts and not self.texts and self.samples is None:
            raise InputError(
                "there is nothing to count", "give --prompts FILE, --texts FILE or --samples FOLDER"
            )
        if self.target.startswith(RANDOM) and not self.texts:
            raise InputError(f"{self.target} writes nothing of meaning", "give --texts FILE")
        if self.size != AUTO and not (self.size.isascii() and self.size.isdigit() and 0 < len(self.size) < 9):
            raise InputError(
                f"size {self.size[:40]!r} is no number of rows", "use --size auto, or --size 4096"
            )
        self._check_weights()
        between("context_rows", self.context_rows, 0, 2**16)
        between("limit", self.limit, 5, 10**7)
        for name in ("output", "html", "png"):
            path = os.path.abspath(getattr(self, name) or self.output)
            if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path)):
                raise InputError(f"{name} {path!r} can be no file", "name a file in an existing folder")
        if self.png is not None and find_spec("matplotlib") is None:
            raise BackendError("matplotlib is not installed", "pip install 'edgespec[plots]', or use --html")
        return self

    def _check_weights(self) -> None:
        weights, corpora = self.weights_of, self.corpora
        if weights and (len(weights) != corpora or min(weights) < 0 or not any(weights)):
            raise InputError(
                f"weights_of {listed(weights)} are not a number for each of {corpora} corpora, one above 0",
                f"use --weights-of {listed((1,) * corpora)}",
            )
