"""What is the name of a model on the Hub and what is a path.

python -m pytest tests/system/test_names.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3c.system.names import Name, is_commit, parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Qwen/Qwen3-0.6B", Name("Qwen/Qwen3-0.6B")),
        ("Qwen/Qwen3-0.6B/", Name("Qwen/Qwen3-0.6B")),
        ("hf.co/Qwen/Qwen3-0.6B", Name("Qwen/Qwen3-0.6B")),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", Name("Qwen/Qwen3-0.6B")),
        ("Qwen/Qwen3-0.6B@main", Name("Qwen/Qwen3-0.6B")),
        ("Qwen/Qwen3-0.6B@refs/pr/1", Name("Qwen/Qwen3-0.6B", "refs/pr/1")),
        (f"Qwen/Qwen3-0.6B@{COMMIT}", Name("Qwen/Qwen3-0.6B", COMMIT)),
        ("Qwen/Q-GGUF:Q-Q8_0.gguf", Name("Qwen/Q-GGUF", "main", "Q-Q8_0.gguf")),
        ("Qwen/Q-GGUF@v1:sub/Q-Q8_0.gguf", Name("Qwen/Q-GGUF", "v1", "sub/Q-Q8_0.gguf")),
        ("hf.co/here/Q", Name("here/Q")),
    ],
)
def test_a_name_is_read_and_written(
    given: str, name: Name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert parse(given) == name
    assert parse(f"hf.co/{name}") == name


@pytest.mark.parametrize(
    "given",
    [
        "", "model.bin", "here/Q", "a/b/c", "no/model.bin", "no/model.gguf", "../Q", "./Q", "/no/Q", "-x/y",
        "a/-b",
        "a--b/c", "a/b..c", "a/b c", "C:\\models\\q", "a/ü", "http://example.com/a/b", "Qwen", "a/b\n",
    ],
)  # fmt: skip
def test_a_path_is_no_name(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert parse(given) is None


@pytest.mark.parametrize(
    "given",
    ["a/b:Q8_0", "a/b:../x.gguf", "a/b:/x.gguf", "a/b:x\\y.gguf", "a/b@..", "a/b@x/../y", "a/b:x.bin"],
)
def test_what_begins_as_a_name_and_leads_elsewhere_is_an_error(given: str) -> None:
    with pytest.raises(ValueError, match="^a/b") as caught:
        parse(given)
    assert "\n" not in str(caught.value)


def test_a_commit_is_a_whole_hash() -> None:
    assert is_commit(COMMIT) and not is_commit(COMMIT[:7]) and not is_commit(COMMIT.upper())
