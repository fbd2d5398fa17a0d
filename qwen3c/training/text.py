"""Text files -> documents -> windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import TrainingError
from .checkpoint import fingerprint
from .vocabulary import TextEncoder, end_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_CONTROL = 0.01  # a file with a larger share of control characters counts as binary


@dataclass(frozen=True)
class Document:
    name: str
    text: str


class NotText(TrainingError):
    """A file is binary."""


def read_documents(paths: Sequence[Path], say: Callable[[str], None] = lambda line: None) -> list[Document]:
    """Every file named, and every file below a folder named, in sorted order; hidden ones are left out.

    say: gets a line about binary files in folders, which are skipped. TrainingError, one line, for a path
    that is missing or empty, or a binary file that was named itself.
    """
    documents, skipped = [], []
    for path in paths:
        for file in _files(path):
            try:
                documents.append(_read(file))
            except NotText as error:
                if file == path:
                    raise
                skipped.append((file, error))
    documents = [d for d in documents if d.text.strip()]
    if skipped:
        count = f"{len(skipped):,} files are" if len(skipped) > 1 else "1 file is"
        left_out = f"{count} not text and left out, such as {skipped[0][0]}"
    if not documents:
        raise TrainingError(
            f"{', '.join(map(str, paths))}: no text in there" + (f": {left_out}" if skipped else "")
        )
    if skipped:
        say(left_out)
    return documents


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file())
        yield from (p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))
    elif path.exists():
        raise TrainingError(f"{path}: is neither a file nor a folder")
    else:
        raise TrainingError(f"{path}: no such file or folder")


def _read(path: Path) -> Document:
    try:
        text = path.read_text("utf-8-sig")  # skips the byte order mark that some editors write
    except UnicodeDecodeError as error:
        raise NotText(f"{path}: is not text: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from None
    controls = sum(c < " " and c not in "\n\t\r\f\v" for c in text)
    if controls > MAX_CONTROL * len(text):
        raise NotText(f"{path}: is not text: {controls} of {len(text)} characters are control characters")
    return Document(str(path), text)


def documents_fingerprint(documents: Sequence[Document]) -> str:
    """The fingerprint of the texts in their order; the paths do not count."""
    return fingerprint(d.text.encode() for d in documents)


def split(documents: list[Document], fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(train, validation) by document: the `fraction` of them whose hash with the seed is smallest.

    A single document is cut instead: its end is for validation.
    """
    if len(documents) == 1:
        name, text = documents[0].name, documents[0].text
        cut = len(text) - max(1, round(fraction * len(text)))
        return [Document(name, text[:cut])], [Document(name, text[cut:])]
    ranked = sorted(documents, key=lambda d: hashlib.sha256(f"{seed} {d.text}".encode()).digest())
    held_out = {id(d) for d in ranked[: max(1, round(fraction * len(documents)))]}
    return [d for d in documents if id(d) not in held_out], [d for d in documents if id(d) in held_out]


class Windows:
    """Documents as one stream of tokens, each ended by the end-of-text token, cut into windows.

    A window is (context + 1,) token ids: the inputs, and shifted by one the targets. Each epoch has other
    cuts and another order, both functions of (seed, epoch).
    """

    def __init__(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, context: int, seed: int
    ) -> None:
        end, encoder, stream = end_of_text(tokenizer), TextEncoder(tokenizer), []
        for ids in encoder.encode_all((d.name, d.text) for d in documents):
            stream += ids
            stream.append(end)
        self.stream = np.array(stream, dtype=np.int32)
        self.context, self.seed = context, seed
        self.bytes_per_token = sum(len(d.text.encode()) for d in documents) / len(stream)
        if len(stream) <= context:
            raise TrainingError(
                f"{documents[0].name}{', ...' if len(documents) > 1 else ''}: {len(stream)} tokens in all, "
                "too few for a "
                f"window of {context}: give more text or a --context of at most {len(stream) - 1}"
            )
        self._epoch: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    @property
    def n_tokens(self) -> int:
        return len(self.stream)

    def starts(self, n: int, length: int) -> list[list[int]]:
        """At most `n` pieces of `length` tokens, evenly spread over the text."""
        last = len(self.stream) - length
        places = dict.fromkeys(i * last // max(n - 1, 1) for i in range(n))
        return [self.stream[place : place + length].tolist() for place in places]

    @property
    def n_windows(self) -> int:
        """Windows per epoch: one fewer than fit (at least one), which leaves room to shift the first cut."""
        return max(1, (len(self.stream) - 1) // self.context - 1)

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        """The window number `index` of the endless sequence of epochs."""
        epoch, i = divmod(index, self.n_windows)
        if self._epoch[0] != epoch:
            random = np.random.default_rng((self.seed, epoch))
            first = random.integers(min(self.context, len(self.stream) - self.n_windows * self.context))
            self._epoch = epoch, first + self.context * random.permutation(self.n_windows)
        start = int(self._epoch[1][i])
        return self.stream[start : start + self.context + 1]

    def in_order(self, limit: int) -> Iterator[NDArray[np.int32]]:
        """At most `limit` windows for validation, evenly spread over the text, always the same ones."""
        n = (len(self.stream) - 1) // self.context
        for i in range(min(n, limit)):
            start = i * n // min(n, limit) * self.context
            yield self.stream[start : start + self.context + 1]
