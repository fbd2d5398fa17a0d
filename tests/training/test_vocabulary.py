from __future__ import annotations

from pathlib import Path

import pytest

from qwen3c.text.tokenizer import Tokenizer
from qwen3c.training import TrainingError
from qwen3c.training.vocabulary import CHARACTERS, characters, load, train_bpe

CODE = "def add(a, b):\n    return a + b  # 12 is 1 and 2\n"


def test_every_printable_character_is_one_token_and_comes_back() -> None:
    tokenizer = characters()
    assert len(CHARACTERS) == 97 and len(tokenizer) == 100
    ids = tokenizer.encode(CHARACTERS)
    assert len(set(ids)) == len(CHARACTERS) and tokenizer.decode(ids) == CHARACTERS


def test_a_character_outside_the_set_is_unknown_and_nothing_is_lost_around_it() -> None:
    tokenizer = characters()
    assert tokenizer.decode(tokenizer.encode("a é\r b")) == "a <unk><unk> b"


def test_bpe_takes_any_text_and_gives_it_back() -> None:
    tokenizer = train_bpe([CODE] * 3, 300)
    for text in (CODE, "naïve ∑ 🙂 \x00\r\n", "<|im_end|> as text"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_has_the_size_asked_for_and_splits_digits() -> None:
    tokenizer = train_bpe([CODE + " 1234 1234"] * 50, 280)
    assert len(tokenizer) == 280
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_bpe_reserves_chat_and_think_tokens() -> None:
    tokenizer = train_bpe([CODE], 280)
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert len(tokenizer.encode(token)) == 1
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(TrainingError, match="vocabulary of 100 tokens: bytes and chat tokens alone take 263"):
        train_bpe([CODE], 100)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_the_engine_cuts_text_into_the_same_tokens(kind: str) -> None:
    tokenizer = characters() if kind == "char" else train_bpe([CODE], 300)
    ours = Tokenizer(tokenizer.backend_tokenizer.to_str().encode())
    ids = tokenizer.encode(CODE)
    assert ours.encode(CODE) == ids and ours.decode(ids) == CODE
    stream = ours.stream()
    assert "".join([stream.push(id) for id in ids] + [stream.flush()]) == CODE


def test_a_saved_tokenizer_loads_again(tmp_path: Path) -> None:
    tokenizer = train_bpe([CODE], 300)
    tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.encode(CODE) == tokenizer.encode(CODE) and again.chat_template == tokenizer.chat_template


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"has no tokenizer\.json"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TrainingError, match="tokenizer: "):
        load(tmp_path)
