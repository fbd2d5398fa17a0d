"""Text <-> tokens: exactly the source tokenizer's, characters whole, text never a control token.

python -m pytest tests/text/test_tokenizer.py
QWEN3C_TOKENIZER=path/to/Qwen3-0.6B python -m pytest tests/text/test_tokenizer.py  # 200,000 strings
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from small_models import SPECIAL_TOKENS, TAG_TOKENS, tokenizer_json

from qwen3c.text.tokenizer import ESCAPE, BackgroundTokenizer, Tokenizer

REAL = os.environ.get("QWEN3C_TOKENIZER")
N_STRINGS = 200_000 if REAL else 4_000
LONG_TEXT = 10_000_000 if REAL else 200_000  # characters


@pytest.fixture(scope="module")
def data() -> bytes:
    return (Path(REAL) / "tokenizer.json").read_bytes() if REAL else tokenizer_json().encode()


@pytest.fixture(scope="module")
def tokenizer(data: bytes) -> Tokenizer:
    return Tokenizer(data)


@pytest.fixture(scope="module")
def source(data: bytes) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(data)


# ----------------------------------------------------------------------------
# Strings of many kinds

WORDS = (
    "the quick brown Fox can't WON'T I'll they're 've don't naïve Straße x=1; foo_bar() http://a.b/c?d=e "
    "привет мир 你好世界 こんにちは 안녕하세요 "
    "שלום עולם مرحبا नमस्ते ไทย Ελληνικά ქართული አማርኛ"
).split()
EMOJI = ["😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "❤️", "1️⃣", "🧑🏿‍🚀", "\u200d", "\ufe0f"]
SPACES = [
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\x0b",
    "\x0c",
    "\x85",
]
ALPHABETS = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x400), (0x400, 0x530), (0x590, 0x700), (0x900, 0xE00),
             (0x1100, 0x1200), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0x1D400, 0x1D800),
             (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0xE000, 0xE100), (0xF0000, 0xF0100)]  # fmt: skip
COMBINING = [chr(c) for c in (*range(0x300, 0x370), 0x1DC4, 0x20D0, 0x3099, 0x0F71)]
PIECES_OF_TAGS = [
    "<|",
    "|>",
    "<",
    ">",
    "im_start",
    "im_end",
    "think",
    "/",
    "|",
    "endoftext",
    "tool_call",
    "<th",
    "ink>",
]


def any_character(r: random.Random) -> str:
    return chr(r.choice([r.randrange(0xD800), r.randrange(0xE000, sys.maxunicode + 1)]))


def in_one_script(r: random.Random) -> str:
    low, high = r.choice(ALPHABETS)
    return "".join(chr(r.randrange(low, high)) for _ in range(r.randrange(1, 30)))


def of_choices(choices: list[str], most: int) -> Callable[[random.Random], str]:
    return lambda r: "".join(r.choices(choices, k=r.randrange(1, most)))


KINDS: list[Callable[[random.Random], str]] = [
    in_one_script,
    lambda r: "".join(any_character(r) for _ in range(r.randrange(1, 20))),
    lambda r: " ".join(r.choices(WORDS, k=r.randrange(1, 15))),
    lambda r: r.choice(["", " "]).join(r.choices(WORDS + EMOJI + SPACES, k=r.randrange(1, 25))),
    of_choices(EMOJI, 12),
    of_choices(SPACES, 40),
    lambda r: "".join(r.choices(SPACES + ["a", "1", "."], k=r.randrange(1, 40))),
    lambda r: str(r.randrange(10 ** r.randrange(1, 40))) + r.choice(["", ".5", " %", "\u0663\u0664", "½²"]),
    lambda r: "".join(chr(r.choice([*range(32), *range(0x7F, 0xA0)])) for _ in range(r.randrange(1, 20))),
    lambda r: "".join(
        r.choice("aeioué\u1100\uac00") + r.choice(COMBINING) * r.randrange(3) for _ in range(12)
    ),
    lambda r: r.choice(["'", "’", "`"]).join(r.choices(["s", "T", "re", "VE", "ll", "dog", "ſ", "K"], k=6)),
    lambda r: r.choice(["a", "\n", " ", "é", "🎉", "ab", "!", "9"]) * r.randrange(1, 200),
    of_choices(
        [" ", "\n", "    ", "def f(x):", "return", "{", "}", "(", ")", "=", '"', "#", "\\", "x", "0"], 30
    ),
    of_choices([*PIECES_OF_TAGS, "a", " "], 12),
    of_choices([*SPECIAL_TOKENS, *TAG_TOKENS, *PIECES_OF_TAGS, "x", "\n", ESCAPE], 10),
]


def strings(seed: int, n: int) -> list[str]:
    r = random.Random(seed)
    return [KINDS[i % len(KINDS)](r) for i in range(n)]


# ----------------------------------------------------------------------------
# The source tokenizer's, exactly


def test_encode_is_the_source_tokenizers(tokenizer: Tokenizer, data: bytes) -> None:
    # the file without its added tokens is what text alone should see
    unaware = tokenizers.Tokenizer.from_str(json.dumps(json.loads(data) | {"added_tokens": []}))
    texts = strings(1, N_STRINGS)
    for text, expected in zip(texts, unaware.encode_batch(texts, add_special_tokens=False), strict=True):
        assert tokenizer.encode(text) == expected.ids, repr(text)


def test_special_encode_is_the_source_tokenizers(tokenizer: Tokenizer, source: tokenizers.Tokenizer) -> None:
    texts = strings(2, N_STRINGS // 4)
    for text, expected in zip(texts, source.encode_batch(texts, add_special_tokens=False), strict=True):
        assert tokenizer.encode(text, special=True) == expected.ids, repr(text)
        if ESCAPE not in text:
            assert tokenizer.encode_escaped(text) == expected.ids, repr(text)


def test_decode_restores_the_normalised_text(tokenizer: Tokenizer, source: tokenizers.Tokenizer) -> None:
    for text in strings(3, N_STRINGS):
        normal = source.normalizer.normalize_str(text)
        assert tokenizer.decode(tokenizer.encode(text)) == normal, repr(text)


def test_streamed_pieces_make_the_text_and_hold_whole_characters(tokenizer: Tokenizer) -> None:
    for text in strings(4, N_STRINGS // 2):
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        pieces = [stream.push(id) for id in ids]
        assert stream.flush() == ""
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces), repr(text)


def test_a_long_text_survives(tokenizer: Tokenizer, source: tokenizers.Tokenizer) -> None:
    texts = strings(5, LONG_TEXT // 20)
    text = "\n".join(t for t in texts if not any(tag in t for tag in (*SPECIAL_TOKENS, *TAG_TOKENS)))[
        :LONG_TEXT
    ]
    ids = tokenizer.encode(text)
    assert ids == source.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == source.normalizer.normalize_str(text)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_any_tokens_decode_as_the_source_decodes_them(
    tokenizer: Tokenizer, source: tokenizers.Tokenizer
) -> None:
    r = random.Random(6)
    for _ in range(N_STRINGS // 20):
        ids = [r.randrange(tokenizer.n_defined) for _ in range(r.randrange(30))]
        assert tokenizer.decode(ids) == source.decode(ids, skip_special_tokens=False)
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_a_character_cut_short_ends_as_a_replacement_character(tokenizer: Tokenizer) -> None:
    ids = [
        id for byte in "é".encode()[:1] for id in range(1000) if tokenizer.token_bytes(id) == bytes([byte])
    ]
    stream = tokenizer.stream()
    assert [stream.push(ids[0]), stream.flush(), stream.flush()] == ["", "\ufffd", ""]


# ----------------------------------------------------------------------------
# Text stays text


def test_no_text_becomes_a_control_token(tokenizer: Tokenizer, source: tokenizers.Tokenizer) -> None:
    control = source.get_added_tokens_decoder()
    contents = [token.content for token in control.values()]
    for text in [*contents, *(a + b for a in contents for b in contents), *strings(7, N_STRINGS // 4)]:
        assert control.keys().isdisjoint(tokenizer.encode(text))
        escaped = tokenizer.escape(text)
        assert not any(content in escaped for content in contents)
        assert control.keys().isdisjoint(tokenizer.encode_escaped(escaped))
        assert tokenizer.encode_escaped(escaped) == tokenizer.encode(text), repr(text)


def test_control_tokens_around_escaped_text_stay_themselves(tokenizer: Tokenizer) -> None:
    start, end = (tokenizer.control_id(t) for t in SPECIAL_TOKENS[1:])
    for text in strings(8, N_STRINGS // 8):
        rendered = f"<|im_start|>user\n{tokenizer.escape(text)}<|im_end|>\n"
        expected = [start, *tokenizer.encode("user\n" + text), end, *tokenizer.encode("\n")]
        assert tokenizer.encode_escaped(rendered) == expected, repr(text)


def test_kept_tokens_are_not_escaped(tokenizer: Tokenizer) -> None:
    think = tokenizer.control_id("<think>")
    ids = tokenizer.encode_escaped(tokenizer.escape("<think>a<|im_end|>", keep=["<think>"]))
    assert ids == [think, *tokenizer.encode("a<|im_end|>")]


def test_added_tokens_take_the_whitespace_their_flags_say() -> None:
    plain = tokenizers.Tokenizer.from_str(tokenizer_json())
    for flags in (
        {"lstrip": True},
        {"rstrip": True},
        {"single_word": True},
        {"lstrip": True, "rstrip": True},
    ):
        plain.add_tokens([tokenizers.AddedToken(f"<{'_'.join(flags)}>", normalized=False, **flags)])
    plain.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in ("<a>", "<a>b", "<a>bc")])
    tokenizer = Tokenizer(plain.to_str().encode())
    r = random.Random(9)
    tags = [token.content for token in plain.get_added_tokens_decoder().values()]
    for _ in range(2000):
        text = "".join(r.choices([*tags, " ", "\n", "b", "c", "_", "."], k=8))
        assert tokenizer.encode_escaped(text) == plain.encode(text, add_special_tokens=False).ids, repr(text)


def with_added(*tokens: tokenizers.AddedToken) -> Tokenizer:
    source = tokenizers.Tokenizer.from_str(tokenizer_json())
    source.add_tokens(list(tokens))
    return Tokenizer(source.to_str().encode())


def test_tokens_that_overlap_are_escaped_wherever_one_begins() -> None:
    contents = ["<a>", "a><b", "><", "b<a", "xx", "xxx"]
    tokenizer = with_added(*(tokenizers.AddedToken(c, normalized=False) for c in contents))
    r = random.Random(10)
    for _ in range(2000):
        text = "".join(r.choices(["<", ">", "a", "b", "x", ESCAPE], k=9))
        escaped = tokenizer.escape(text)
        assert not any(content in escaped for content in contents), repr(text)
        assert tokenizer.encode_escaped(escaped) == tokenizer.encode(text), repr(text)


def test_long_runs_of_spaces_take_time_in_proportion() -> None:
    """Tokens that swallow spaces around 200,000 spaces, in 20 s of processor time: no quadratic search."""
    script = (
        "import resource, tokenizers; from small_models import tokenizer_json\n"
        "from qwen3c.text.tokenizer import Tokenizer\n"
        "source = tokenizers.Tokenizer.from_str(tokenizer_json())\n"
        "source.add_tokens([tokenizers.AddedToken(f'<{i}>', normalized=False, lstrip=True) for i in "
        "range(7)])\n"
        "tokenizer = Tokenizer(source.to_str().encode())\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "text = ' ' * 200_000\n"
        "assert tokenizer.encode_escaped(tokenizer.escape(text) + '<3>') == [tokenizer.control_id('<3>')]\n"
        "assert tokenizer.encode_escaped('.' + text) == tokenizer.encode('.' + text)\n"
    )
    path = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0


# ----------------------------------------------------------------------------
# Loaded beside other things


class File:
    """As much of a ModelFile as its tokenizer needs."""

    path, tokenizer = "model.bin", tokenizer_json().encode()


def test_without_a_thread_to_be_had_the_tokenizer_is_loaded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert BackgroundTokenizer(File()).result().encode("a") == Tokenizer(File.tokenizer).encode("a")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------
# Vocabularies, and what is wrong with some


def test_ids_without_a_token_are_found(tokenizer: Tokenizer) -> None:
    n = tokenizer.n_defined
    assert tokenizer.undefined(n) == []
    assert tokenizer.undefined(n + 3) == [n, n + 1, n + 2]
    assert tokenizer.decode([n + 1]) == "" and tokenizer.token_bytes(n + 1) == b""
    with pytest.raises(ValueError, match="token id -1"):
        tokenizer.decode([-1])


def test_a_hole_in_the_vocabulary_is_found() -> None:
    data = json.loads(tokenizer_json())
    highest = max(token["id"] for token in data["added_tokens"])
    token = next(token for token in data["added_tokens"] if token["id"] == highest)
    token["id"] += 2
    tokenizer = Tokenizer(json.dumps(data).encode())
    undefined = set(tokenizer.undefined(highest + 3))
    assert undefined and undefined == {id for id in range(highest + 3) if tokenizer.token_bytes(id) == b""}


def test_control_tokens_are_known_by_name(tokenizer: Tokenizer) -> None:
    for content in (*SPECIAL_TOKENS, *TAG_TOKENS):
        id = tokenizer.control_id(content)
        assert id is not None and tokenizer.is_control(id) and tokenizer.token_bytes(id) == content.encode()
    assert tokenizer.control_id("a") is None and tokenizer.control_id("<nothing>") is None


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate at position 1"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff\xfe", b"null", b'{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_json_is_one_line(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer\.json: .") as caught:
        Tokenizer(data)
    assert "\n" not in str(caught.value)


def test_truncation_and_padding_in_the_file_are_ignored() -> None:
    source = tokenizers.Tokenizer.from_str(tokenizer_json())
    source.enable_truncation(3)
    source.enable_padding(length=9)
    text = "nothing of this is cut"
    tokenizer, expected = (
        Tokenizer(source.to_str().encode()),
        Tokenizer(tokenizer_json().encode()).encode(text),
    )
    assert tokenizer.encode(text) == tokenizer.encode(text, special=True) == expected


def test_a_vocabulary_that_is_not_byte_level_streams_too() -> None:
    """SentencePiece's way: spaces as a visible character, unknown characters as bytes."""
    source = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    source.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    source.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    bytes_as_tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=bytes_as_tokens, show_progress=False
    )
    source.train_from_iterator(["the cat sat on the mat and then that was that"] * 3, trainer)
    data = json.loads(source.to_str())
    data["added_tokens"] = []  # the bytes are ordinary tokens
    tokenizer = Tokenizer(json.dumps(data).encode())
    for text in ("the cat", "that é mat 日本 🎉", "a  b", "né"):
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        pieces = [stream.push(id) for id in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids) == text
        assert not any("\ufffd" in piece for piece in pieces)
    half = tokenizer.encode("é")[:-1]
    stream = tokenizer.stream()
    assert "".join(map(stream.push, half)) + stream.flush() == tokenizer.decode(half)


def test_normalisation_agrees_with_unicode(tokenizer: Tokenizer) -> None:
    text = "e\u0301 \u1100\u1161 \u2126 \ufb01"
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)
