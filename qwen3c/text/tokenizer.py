"""Text <-> tokens: Hugging Face `tokenizers` on the tokenizer.json inside model.bin.

The library that trained the vocabulary also runs it, so no token differs. Added here:

    text stays text   nothing a user types becomes a control token (<|im_start|>, <think>, ...)
    escapes           tell a message's text from the tags of the chat template around it
    streams           tokens become text in whole characters, never half of one
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Collection, Iterable
from functools import cached_property, lru_cache
from typing import Any, Protocol

from ..format import ModelFile, ModelFileError
from . import pieces, tokenizer_json
from .tokenizer_json import library_errors

ESCAPE = "\ufdd0"
"""Marks escaped text. A Unicode noncharacter: text has no use for it and no normaliser changes it."""


SHRINKS = 3  # times at most that NFC makes a text shorter: three letters of Hangul become one


class TooLongError(ValueError):
    """A text has more tokens than it may have. n: it has at least so many."""

    def __init__(self, n: int, most: int) -> None:
        super().__init__(f"text is at least {n} tokens, {most} are allowed")
        self.n = n


class Tokenizer:
    """Encodes and decodes by a tokenizer.json, given as bytes; ValueError if tokenizer_json refuses it."""

    def __init__(self, data: bytes) -> None:
        import tokenizers

        try:
            self._full = tokenizer_json.load(data)
        except ValueError as error:
            raise ValueError(f"tokenizer.json: {error}") from None
        self._full.no_truncation()  # some files ask for it, but text is never cut silently
        self._full.no_padding()
        self._tokens = self._full.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in self._tokens.items()}
        self._plain = without_added_tokens(self._full)
        self._can_be_cut = pieces.can_be_cut(self._plain)
        self.byte_level = isinstance(self._full.decoder, tokenizers.decoders.ByteLevel)
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
            return []  # the usual case; listing a large vocabulary takes 80 ms
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

    def encode(self, text: str, special: bool = False, most: int | None = None) -> list[int]:
        """Token ids of `text`; nothing is put before or after them.

        special: whether the text of an added token ("<|im_end|>") becomes that token, as in Hugging
        Face; by default it is text like any other. most: TooLongError as soon as it is known that there
        are more, if much of the text is still to be read then. ValueError if `text` holds a lone surrogate.
        """
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds a lone surrogate at position {error.start}") from None
        if special and size > pieces.SHORT and self._are_apart and ESCAPE not in text:
            return self.encode_escaped(text, most)
        if most is not None and (least := self._least(size, text.isascii())) > most:
            raise TooLongError(least, most)
        whole = special or not self._can_be_cut
        ids: list[int] = []
        for piece in (text,) if whole else pieces.pieces(text):
            if most is not None and len(ids) > most:
                raise TooLongError(len(ids), most)
            with library_errors():
                ids += (self._full if special else self._plain).encode(piece, add_special_tokens=False).ids
        if not special and not self._added.keys().isdisjoint(ids):
            # a vocabulary may list a control token among the ordinary ones too
            raise ValueError("text becomes a control token in this vocabulary")
        return ids

    def _least(self, size: int, ascii: bool) -> int:
        """How many tokens a text of `size` bytes of UTF-8 is at least; 0 where nothing is known."""
        if size <= pieces.SHORT or not self._longest:
            return 0
        return -(-size // (self._longest if ascii else SHRINKS * self._longest))

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token; 0 where bytes of a text may be in none."""
        added = self._tokens.values()
        if not self._can_be_cut or any(token.lstrip or token.rstrip for token in added):
            return 0
        tokens = self._full.get_vocab(with_added_tokens=False)  # a character stands for a byte
        if not all(character in tokens for character in _BYTE_OF):
            return 0
        return max(*map(len, tokens), *(len(token.content.encode()) for token in added))

    @cached_property
    def _are_apart(self) -> bool:
        """Whether encode_escaped() finds every added token in a text: it looks at the text as it is."""
        return self._can_be_cut and not any(
            token.normalized or len(token.content) == 1 for token in self._tokens.values()
        )

    @property
    def opening(self) -> list[int]:
        """Ids that the tokenizer itself puts before a text, such as Llama's begin-of-text; mostly none."""
        return self._around()[0]

    @property
    def closing(self) -> list[int]:
        """Ids that the tokenizer itself puts after a text, such as Qwen3-Embedding's end; mostly none."""
        return self._around()[1]

    def _around(self) -> tuple[list[int], list[int]]:
        with library_errors():
            inner = self._full.encode("a", add_special_tokens=False).ids
            ids = self._full.encode("a", add_special_tokens=True).ids
        starts = (i for i in range(len(ids)) if ids[i : i + len(inner)] == inner)
        start = next(starts, 0)
        return ids[:start], ids[start + len(inner) :]

    def escape(self, text: str, keep: Collection[str] = ()) -> str:
        """`text` with the text of every added token broken by ESCAPE, except of those in `keep`."""
        pattern = _breaking_pattern(tuple(self._ids), frozenset(keep))
        return pattern.sub(
            lambda match: match[0] if match[0] in keep else match[0] + ESCAPE,
            text.replace(ESCAPE, 2 * ESCAPE),
        )

    def encode_escaped(self, text: str, most: int | None = None) -> list[int]:
        """Token ids of text put together from escaped parts and control tokens.

        An added token's text becomes the token, escaped text becomes plain text. Without escapes this is
        encode(text, special=True). most: see encode.
        """
        ids: list[int] = []
        end = 0  # everything before it has become tokens

        def add(part: str) -> None:
            nonlocal ids
            if most is not None and len(ids) > most and len(text) - end > pieces.SHORT:
                raise TooLongError(len(ids), most)
            try:
                ids += self.encode(_unescape(part), most=None if most is None else max(most - len(ids), 0))
            except TooLongError as error:
                raise TooLongError(len(ids) + error.n, most or 0) from None

        for match in self._control.finditer(text):
            id, (start, stop) = self._ids[match[0]], match.span()
            token = self._tokens[id]
            if token.single_word and _touches_word(text, start, stop):
                continue
            # whitespace that the token swallows (lstrip, rstrip). It is searched from the token outwards: a
            # pattern that begins with whitespace would be tried from every space of a long run
            before = text[end:start].rstrip() if token.lstrip else text[end:start]
            add(before)
            ids.append(id)
            end = _WHITESPACE.match(text, stop).end() if token.rstrip else stop  # type: ignore[union-attr]
        add(text[end:])
        return ids

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Added tokens by text, the longest first; those of one character are left out, as ESCAPE cannot
        break them.
        """
        tokens = sorted(self._added.items(), key=lambda item: len(item[1]), reverse=True)
        return {content: id for id, content in tokens if len(content) > 1}

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._ids)) or "(?!)")

    # ------------------------------------------------------------------------
    # Tokens -> text

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of one token (a character may be spread over several); b"" if undefined.

        Exact for byte-level vocabularies. For others it is the decoding of the token alone.
        """
        if id not in self._bytes:
            self._bytes[id] = self._look_up(id)
        return self._bytes[id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens included; bytes that are not UTF-8 become U+FFFD."""
        if self.byte_level:
            return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return self._decode(list(ids))

    def stream(self) -> TextStream:
        """A new incremental decoder, whose pieces together equal decode()."""
        return _ByteStream(self) if self.byte_level else _WindowStream(self)

    def _look_up(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        try:
            token = self._full.id_to_token(id)
        except OverflowError:
            raise ValueError(f"token id {id} is not a 32-bit unsigned number") from None
        if token is None:
            return b""
        if not self.byte_level:
            return self._decode([id]).encode()
        try:
            return bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError:  # a token that is not written in stand-in characters
            return token.encode()

    def _decode(self, ids: list[int]) -> str:
        with library_errors():
            return self._full.decode(ids, skip_special_tokens=False)


class BackgroundTokenizer:
    """The tokenizer of a model.bin, loaded while other things go on: 0.3 s for a large vocabulary.

    `tokenizers` holds the GIL while it loads, so only work outside of Python goes on: C code, the disk,
    processes.
    """

    def __init__(self, file: ModelFile) -> None:
        self.file = file
        self._loaded: Tokenizer | BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._load)
        try:
            self._thread.start()
        except RuntimeError:  # no thread can be started: load here
            self._thread = None
            self._load()

    def result(self) -> Tokenizer:
        """Wait for the tokenizer. ModelFileError if the tokenizer.json in the file cannot be read."""
        if self._thread is not None:
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
        except BaseException as error:  # result() raises it
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
    """For vocabularies whose tokens decode differently beside others (SentencePiece: spaces, byte fallback).

    A token's text is what it adds to the decoding of the tokens since the last one that ended
    on a whole character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._before: list[int] = []  # tokens whose text is out already, needed as context
        self._window: list[int] = []  # _before and the tokens whose text may still change

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


_WHITESPACE, _WORD = re.compile(r"\s*"), re.compile(r"\w")


def _touches_word(text: str, start: int, stop: int) -> bool:
    """Whether the character before `start` or the one at `stop` is part of a word."""
    return bool(_WORD.match(text, stop) or (start and _WORD.match(text, start - 1)))


@lru_cache(maxsize=8)
def _breaking_pattern(contents: tuple[str, ...], keep: frozenset[str]) -> re.Pattern[str]:
    """A pattern for the first character of every token text, overlapping ones too; texts in `keep` match
    whole.
    """
    alternatives = (
        re.escape(c) if c in keep else f"{re.escape(c[0])}(?={re.escape(c[1:])})" for c in contents
    )
    return re.compile("|".join(alternatives) or "(?!)")


def without_added_tokens(full: Any) -> Any:
    """A copy of a tokenizers.Tokenizer without its added tokens, so that no text becomes one."""
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
    """Character -> byte of byte-level BPE (GPT-2): a printable byte is itself, others count from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_stand_ins()
