"""A journal holds whole lines alone, wherever a kill or a power cut has ended it.

python -m pytest tests/system/test_journal.py
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from qwen3c.system.journal import Journal

HEAD = {"of": "these things"}
LINES = {key: json.dumps({"key": key, "what": "é" * n}).encode() + b"\n" for n, key in enumerate("abcd")}


def key_of(value: Any) -> str | None:
    return value.get("key") if isinstance(value, dict) else None


def written(path: Path) -> bytes:
    with open(path, "a+b") as file:
        journal = Journal(file, key_of)
        assert journal.head is None and len(journal) == 0
        journal.begin(HEAD)
        for key, line in LINES.items():
            journal.add(key, line)
    return path.read_bytes()


def test_lines_come_back_in_any_order(tmp_path: Path) -> None:
    written(tmp_path / "journal")
    with open(tmp_path / "journal", "a+b") as file:
        journal, out = Journal(file, key_of), io.BytesIO()
        assert journal.head == HEAD and len(journal) == 4 and "a" in journal and "e" not in journal
        journal.write("dxa", out)
        assert out.getvalue() == LINES["d"] + LINES["a"]
        journal.add("e", b'{"key": "e"}\n')
        journal.write("eb", out)
        assert out.getvalue() == LINES["d"] + LINES["a"] + b'{"key": "e"}\n' + LINES["b"]


def test_a_journal_cut_anywhere_goes_on_to_the_same_lines(tmp_path: Path) -> None:
    whole, path = written(tmp_path / "whole"), tmp_path / "cut"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with open(path, "a+b") as file:
            journal = Journal(file, key_of)
            assert path.read_bytes() == whole[: whole.rfind(b"\n", 0, end) + 1], "what is left is whole lines"
            if journal.head is None:
                journal.begin(HEAD)
            for key, line in LINES.items():
                if key not in journal:
                    journal.add(key, line)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("end", [b"\0" * 4096, b"\xff\xfe\n", b'{"key": "a"}\n', b"[]\n", b'{"head": 1}\n'])
def test_what_is_no_new_line_of_it_is_cut_off_with_all_behind_it(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "journal"
    whole = written(path)
    path.write_bytes(whole + end + b'{"key": "z"}\n')
    with open(path, "a+b") as file:
        assert len(Journal(file, key_of)) == 4
    assert path.read_bytes() == whole


@pytest.mark.parametrize("text", [b"mine\n", b"{}\n", b'{"head": {}, "more": 1}\n', b"[1]\n\n"])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(text)
    with open(path, "a+b") as file, pytest.raises(ValueError, match="not left by"):
        Journal(file, key_of)
    assert path.read_bytes() == text
