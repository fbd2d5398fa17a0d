from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nano import write_text

from qwen3c.training import TrainingError
from qwen3c.training.text import Document, Windows, read_documents, split
from qwen3c.training.vocabulary import characters, end_of_text, train_bpe

DOCUMENTS = [Document(str(i), f"text number {i} " * 20) for i in range(40)]


def test_a_folder_is_read_in_order_and_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("first")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text("\n")
    assert [d.text for d in read_documents([tmp_path])] == ["first", "second"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"text \xff\xfe", "byte 5 is not UTF-8"),
        (b"\x00\x01\x02\x03 text", "4 of 9 characters are control characters"),
        (b"", "no text in there"),
        (b" \n ", "no text in there"),
    ],
)
def test_what_is_not_text_is_refused_by_name(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(data)
    with pytest.raises(TrainingError, match=message) as error:
        read_documents([path])
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nowhere: no such file"):
        read_documents([tmp_path / "nowhere"])


def test_the_split_is_by_document_and_a_function_of_the_seed() -> None:
    train, validation = split(DOCUMENTS, 0.1, seed=1)
    assert len(validation) == 4
    assert sorted(d.name for d in train + validation) == sorted(d.name for d in DOCUMENTS)
    assert {d.name for d in split(DOCUMENTS[::-1], 0.1, seed=1)[1]} == {d.name for d in validation}
    assert {d.name for d in split(DOCUMENTS, 0.1, seed=2)[1]} != {d.name for d in validation}


def test_one_document_is_cut_and_its_end_held_out() -> None:
    (train,), (validation,) = split([Document("one", "abcdefghij")], 0.2, seed=1)
    assert (train.text, validation.text) == ("abcdefgh", "ij")


def test_every_epoch_has_an_order_of_its_own() -> None:
    windows = Windows(DOCUMENTS, characters(), context=32, seed=3)
    n = windows.n_windows
    first, second = ([windows[epoch * n + i].tobytes() for i in range(n)] for epoch in (0, 1))
    assert first != second and first == [windows[i].tobytes() for i in range(n)]
    assert [Windows(DOCUMENTS, characters(), 32, seed=4)[i].tobytes() for i in range(n)] != first


def test_an_epoch_covers_every_token_but_the_edges() -> None:
    text = "".join(chr(33 + i % 90) for i in range(1000))
    windows = Windows([Document("d", text)], characters(), context=50, seed=1)
    inputs = np.sort(np.concatenate([windows[i][:-1] for i in range(windows.n_windows)]))
    assert len(inputs) == windows.n_windows * 50
    # 19 windows of 50 from some first token on: each token of that stretch exactly once
    stretches = (np.sort(windows.stream[first : first + len(inputs)]) for first in range(50))
    assert any(np.array_equal(inputs, stretch) for stretch in stretches)


def test_documents_end_with_the_end_of_text() -> None:
    tokenizer = characters()
    windows = Windows([Document("a", "ab"), Document("b", "cd")], tokenizer, context=2, seed=1)
    assert tokenizer.decode(windows.stream.tolist()) == "ab<pad>cd<pad>"


def test_a_context_longer_than_the_text_is_refused_with_both_numbers() -> None:
    with pytest.raises(TrainingError, match=r"3 tokens in all, too few for a window of 8.*at most 2"):
        Windows([Document("d", "ab")], characters(), context=8, seed=1)


def test_validation_windows_are_the_same_each_time_and_spread_over_the_text(tmp_path: Path) -> None:
    windows = Windows(read_documents([write_text(tmp_path)]), characters(), context=16, seed=1)
    first, again = list(windows.in_order(5)), list(windows.in_order(5))
    assert len(first) == 5 and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_documents([tmp_path / "a.txt"])[0].text == "hello"


def test_files_of_a_folder_that_are_not_text_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "c.bin").write_bytes(bytes(range(32)))
    said: list[str] = []
    assert [d.text for d in read_documents([tmp_path], said.append)] == ["hello"]
    assert said == [f"2 files are not text and left out, such as {tmp_path / 'b.png'}"]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(TrainingError, match="no text in there: 2 files are not text"):
        read_documents([tmp_path], said.append)


def test_what_looks_like_a_control_token_is_text() -> None:
    tokenizer = train_bpe(["a b"], 280)
    text = "see <|im_end|> and <|endoftext|> and <think>"
    stream = Windows([Document("d", text)], tokenizer, 4, seed=1).stream.tolist()
    assert not {stream[i] for i in range(len(stream) - 1)} & set(tokenizer.added_tokens_decoder)
    assert stream[-1] == end_of_text(tokenizer) and tokenizer.decode(stream[:-1]) == text


def test_characters_without_a_token_are_refused_and_named() -> None:
    documents = [Document("a.txt", "plain"), Document("b.txt", "naïve café – é")]
    with pytest.raises(TrainingError) as error:
        Windows(documents, characters(), context=4, seed=1)
    assert str(error.value) == (
        "b.txt: the tokenizer has no token for 4 of 14 characters ('ï', 'é', '–'); --tokenizer bpe takes any "
        "text"
    )


def test_pieces_for_samples_are_spread_over_the_text() -> None:
    windows = Windows([Document("d", "".join(chr(33 + i) for i in range(90)))], characters(), 8, seed=1)
    pieces = windows.starts(4, 8)
    assert len({tuple(piece) for piece in pieces}) == 4 and all(len(piece) == 8 for piece in pieces)
    assert pieces[0] == windows.stream[:8].tolist() and pieces[-1] == windows.stream[-8:].tolist()
    assert len(windows.starts(4, 91)) == 1  # all of it
