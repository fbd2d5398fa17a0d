"""Text <-> tokens: Hugging Face `tokenizers` on the tokenizer.json inside model.bin.

A BPE of one's own drifts from the model's; this one is the model's. What is added to it:

    text stays text   nothing a user types becomes a control token (<|im_start|>, <think>, ...)
    escapes           what went through a chat template can still be told from the template's own tags
    streams           tokens come out as whole characters, never half of one
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Collection, Iterable
from typing import Any, Protocol

from .format import ModelFile, ModelFileError

ESCAPE = "\ufdd0"
"""Marks escaped text. A Unicode noncharacter: text has no use for it and no normaliser changes it."""


class Tokenizer:
    """data: the bytes of a tokenizer.json. ValueError, one line, if `tokenizers` cannot read it."""

    def __init__(self, data: bytes) -> None:
        import tokenizers

        try:
            self._full = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer.json: {' '.join(str(error).split())}") from None
        self._full.no_truncation()  # some files ask for it, but text is never cut silently
        self._full.no_padding()
        added = self._full.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self._control, self._control_ids = _control_pattern(added)
        self._plain = without_added_tokens(self._full)
        self._byte_level = isinstance(self._full.decoder, tokenizers.decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}

    # ------------------------------------------------------------------------
    # Vocabulary

    @property
    def n_defined(self) -> int:
        """How many tokens the vocabulary defines, added ones included."""
        return self._full.get_vocab_size(with_added_tokens=True)

    def undefined(self, n_tokens: int) -> list[int]:
        """Ids below `n_tokens` that stand for no token; a sampler must never choose one."""
        if self.n_defined == n_tokens and self._full.id_to_token(n_tokens - 1) is not None:
            return []  # the usual case, without the 80 ms that listing a large vocabulary takes
        return sorted(set(range(n_tokens)).difference(self._full.get_vocab(with_added_tokens=True).values()))

    def control_id(self, content: str) -> int | None:
        """The id of the added token written `content`, or None if the vocabulary has no such token."""
        id = self._full.token_to_id(content)
        return id if id in self._added else None

    def is_control(self, id: int) -> bool:
        """Whether `id` is an added token: one that plain text never becomes."""
        return id in self._added

    # ------------------------------------------------------------------------
    # Text -> tokens

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`; nothing is put before or after them.

        special: whether the text of an added token ("<|im_end|>") becomes that token, as in Hugging
        Face; by default it is text like any other. ValueError if `text` holds a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds a lone surrogate at position {error.start}") from None
        ids = (self._full if special else self._plain).encode(text, add_special_tokens=False).ids
        if not special and not self._added.keys().isdisjoint(ids):
            # only in a vocabulary that lists a control token among the ordinary ones too
            raise ValueError("text becomes a control token in this vocabulary")
        return ids

    @property
    def opening(self) -> list[int]:
        """What the vocabulary puts before a text of its own, such as Llama's begin-of-text; mostly nothing."""
        return self._around()[0]

    @property
    def closing(self) -> list[int]:
        """What the vocabulary puts after a text of its own, such as Qwen3-Embedding's end token; mostly nothing."""
        return self._around()[1]

    def _around(self) -> tuple[list[int], list[int]]:
        inner = self._full.encode("a", add_special_tokens=False).ids
        ids = self._full.encode("a", add_special_tokens=True).ids
        starts = (i for i in range(len(ids)) if ids[i : i + len(inner)] == inner)
        start = next(starts, 0)
        return ids[:start], ids[start + len(inner) :]

    def escape(self, text: str, keep: Collection[str] = ()) -> str:
        """`text` with the text of every added token broken by ESCAPE, except of those in `keep`."""

        def broken(match: re.Match[str]) -> str:
            content = match[match.lastindex or 0]
            return (
                match[0] if content in keep else match[0].replace(content, content[0] + ESCAPE + content[1:])
            )

        return self._control.sub(broken, text.replace(ESCAPE, 2 * ESCAPE))

    def encode_escaped(self, text: str) -> list[int]:
        """Token ids of text put together from escaped parts and control tokens.

        The text of an added token stands for the token; what was escaped is text again. Without
        escapes in it this is encode(text, special=True).
        """
        ids: list[int] = []
        end = 0
        for match in self._control.finditer(text):
            ids += self.encode(_unescape(text[end : match.start()]))
            ids.append(self._control_ids[(match.lastindex or 0) - 1])
            end = match.end()
        return ids + self.encode(_unescape(text[end:]))

    # ------------------------------------------------------------------------
    # Tokens -> text

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of one token (a character may be spread over several); b"" if undefined.

        Exact for byte-level vocabularies. For others it is what the token reads as on its own.
        """
        if id not in self._bytes:
            self._bytes[id] = self._look_up(id)
        return self._bytes[id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens included; bytes that are not UTF-8 become U+FFFD."""
        if self._byte_level:
            return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return self._full.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> TextStream:
        """A new incremental decoder, whose pieces together equal decode()."""
        return _ByteStream(self) if self._byte_level else _WindowStream(self)

    def _look_up(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        try:
            token = self._full.id_to_token(id)
        except OverflowError:
            raise ValueError(f"token id {id} is not a 32-bit unsigned number") from None
        if token is None:
            return b""
        if not self._byte_level:
            return self._full.decode([id], skip_special_tokens=False).encode()
        try:
            return bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError:  # not written in stand-ins
            return token.encode()


class BackgroundTokenizer:
    """The tokenizer of a model.bin, loaded while other things go on: 0.3 s for a large vocabulary.

    `tokenizers` keeps the GIL meanwhile, so those are the engine's, the disk's and other processes'.
    """

    def __init__(self, file: ModelFile) -> None:
        self.file = file
        self._loaded: Tokenizer | BaseException | None = None
        self._thread = threading.Thread(target=self._load)
        self._thread.start()

    def result(self) -> Tokenizer:
        """Wait for it. ModelFileError if the tokenizer.json in the file cannot be read."""
        self._thread.join()
        if isinstance(self._loaded, ValueError):
            raise ModelFileError(f"{self.file.path}: {self._loaded}")
        if isinstance(self._loaded, BaseException):
            raise self._loaded
        assert self._loaded is not None
        return self._loaded

    def _load(self) -> None:
        try:
            self._loaded = Tokenizer(self.file.tokenizer)
        except BaseException as error:  # whoever waits must hear of it
            self._loaded = error


class TextStream(Protocol):
    """Tokens in, whole characters out. flush() gives what is left at the end, U+FFFD for half a character."""

    def push(self, id: int) -> str: ...
    def flush(self) -> str: ...


class _ByteStream:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        return self._utf8.decode(self._token_bytes(id))

    def flush(self) -> str:
        text = self._utf8.decode(b"", True)
        self._utf8.reset()
        return text


class _WindowStream:
    """For vocabularies whose tokens read differently in company (SentencePiece: spaces, byte fallback).

    A token's text is what it adds to the decoding of the tokens since the last one that ended
    on a whole character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._before: list[int] = []  # context whose text is out already
        self._window: list[int] = []  # before + what may still change

    def push(self, id: int) -> str:
        self._window.append(id)
        text = self._new_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._new_text())

    def _new_text(self) -> str:
        return self._decode(self._window)[len(self._decode(self._before)) :]

    def _advance(self, text: str) -> str:
        self._window = self._window[len(self._before) :]
        self._before = list(self._window)
        return text


def _control_pattern(added: dict[int, Any]) -> tuple[re.Pattern[str], list[int]]:
    """A pattern with one group per added token, longest first, and the ids in the order of the groups.

    The flags of an added token say what whitespace it swallows and whether it must stand alone.
    A token of one character cannot be told from text and is left out.
    """
    tokens = sorted(added.items(), key=lambda item: len(item[1].content), reverse=True)
    tokens = [(id, token) for id, token in tokens if len(token.content) > 1]
    alternatives = []
    for _, token in tokens:
        before = r"\s*" * token.lstrip + r"(?<!\w)" * token.single_word
        after = r"(?!\w)" * token.single_word + r"\s*" * token.rstrip
        alternatives.append(f"{before}({re.escape(token.content)}){after}")
    return re.compile("|".join(alternatives) or "(?!)"), [id for id, _ in tokens]


def without_added_tokens(full: Any) -> Any:
    """The vocabulary of a tokenizers.Tokenizer and the steps before it: no text becomes an added token."""
    import tokenizers

    plain = tokenizers.Tokenizer(full.model)  # shares the vocabulary, copies nothing
    if full.normalizer is not None:
        plain.normalizer = full.normalizer
    if full.pre_tokenizer is not None:
        plain.pre_tokenizer = full.pre_tokenizer
    return plain


def _unescape(text: str) -> str:
    return re.sub(f"{ESCAPE}({ESCAPE}?)", r"\1", text)


def _byte_stand_ins() -> dict[str, int]:
    """Byte-level BPE writes each byte as a character: itself where printable, else from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_stand_ins()
