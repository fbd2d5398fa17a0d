"""Long texts: the tokens of the pieces are those of the whole, and what is too long is known early."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from small_models import tokenizer_json
from test_tokenizer import WORDS, strings

from qwen3c.text import pieces
from qwen3c.text.tokenizer import SHRINKS, Tokenizer, TooLongError

REAL = os.environ.get("QWEN3C_TOKENIZER")
DATA = (Path(REAL) / "tokenizer.json").read_bytes() if REAL else tokenizer_json().encode()
N = 30_000 if REAL else 3_000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DATA)


@pytest.fixture(scope="module")
def source() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(DATA)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text is long: it is cut wherever it may be."""
    monkeypatch.setattr(pieces, "SHORT", 1)


def texts(seed: int) -> list[str]:
    """Random strings of many kinds, each beside words that it may be cut between."""
    r = iter(strings(seed, 3 * N))
    return [f"{a}{WORDS[i % len(WORDS)]}{b}, x {c}" for i, (a, b, c) in enumerate(zip(r, r, r, strict=True))]


def test_the_tokens_of_the_pieces_are_those_of_the_whole(
    tokenizer: Tokenizer, source: tokenizers.Tokenizer, short: None
) -> None:
    cut = 0
    unaware = tokenizers.Tokenizer.from_str(json.dumps(json.loads(DATA) | {"added_tokens": []}))
    for text in texts(1):
        assert tokenizer.encode(text) == unaware.encode(text, add_special_tokens=False).ids, repr(text)
        expected = source.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, special=True) == expected, repr(text)
        assert "".join(pieces.pieces(text)) == text
        cut += len(list(pieces.pieces(text))) > 1
    assert cut > 0.9 * N


def test_pieces_are_about_as_long_as_they_should_be() -> None:
    found = list(pieces.pieces("some words, " * 50_000))
    assert all(pieces.SHORT <= len(piece) < pieces.SHORT + 16 for piece in found[:-1])
    assert len(found[-1]) <= 2 * pieces.SHORT


@pytest.mark.parametrize("special", [False, True])
def test_what_is_too_long_says_how_long_it_is_at_least(
    tokenizer: Tokenizer, short: None, special: bool
) -> None:
    refused = 0
    for text in texts(2)[:500]:
        n = len(tokenizer.encode(text, special))
        assert len(tokenizer.encode(text, special, most=n)) == n
        for most in (0, n // 2, n - 1):
            try:
                assert len(tokenizer.encode(text, special, most)) == n
            except TooLongError as error:
                assert most < error.n <= n
                refused += 1
    assert refused > 900


def test_no_text_has_fewer_tokens_than_its_bytes_say(tokenizer: Tokenizer, short: None) -> None:
    longest = max((tokenizer.token_bytes(id) for id in range(tokenizer.n_defined)), key=len).decode()
    for text in [longest * 20, "\u1112\u1161\u11ab" * 50, *texts(3)[:500]]:
        n = len(tokenizer.encode(text))
        assert 0 < tokenizer._least(len(text.encode()), text.isascii()) <= n, repr(text)
    assert SHRINKS * len("\ud55c".encode()) == len("\u1112\u1161\u11ab".encode())


def test_a_text_of_megabytes_is_refused_before_it_is_read(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    class Noting:
        def encode(self, text: str, **options: Any) -> Any:
            read.append(len(text))
            return tokenizer._full.encode(text, **options)

    monkeypatch.setattr(tokenizer, "_plain", Noting())
    text = "some words, " * 200_000
    least = tokenizer._least(len(text), ascii=True)
    for most in (least - 1, least):
        read.clear()
        with pytest.raises(TooLongError):
            tokenizer.encode(text, most=most)
        assert bool(read) == (most == least) and sum(read) < 0.7 * len(text)


@pytest.mark.parametrize(
    ("step", "other"),
    [
        ("normalizer", {"type": "NFKC"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}),
    ],
)
def test_other_ways_of_cutting_words_are_left_whole(step: str, other: Any) -> None:
    made = json.loads(tokenizer_json()) | {step: other}
    tokenizer = Tokenizer(json.dumps(made).encode())
    assert not tokenizer._can_be_cut
    text = "some words, " * 10_000
    assert tokenizer.encode(text) == tokenizer._plain.encode(text, add_special_tokens=False).ids
