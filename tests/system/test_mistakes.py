"""All programs give a wrong input the same name, and the advice they give can be typed.

python -m pytest tests/system/test_mistakes.py
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from qwen3c.convert.gguf import GGUF
from qwen3c.convert.source import SourceError
from qwen3c.format import MAGIC, ModelFile, ModelFileError
from qwen3c.system import mistakes

# the first bytes of a file -> its name, in the words of both readers
KINDS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n": "a git-lfs pointer",
    b"PK\x03\x04" + bytes(60): "a PyTorch",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9": "a PyTorch",
    b"  <!DOCTYPE html><p>404": "a web page",
    b"<html>": "a web page",
    b'\x10\0\0\0\0\0\0\0{"a": 1}': "a safetensors file",
    b'{"architectures": ["Qwen3ForCausalLM"]}': "a JSON file",
}


@pytest.mark.parametrize("content", KINDS, ids=lambda content: KINDS[content])
def test_both_readers_know_every_kind_of_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a file"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=f"not a model.bin but {KINDS[content]}"):
        ModelFile(path)
    with pytest.raises(SourceError, match=f"{path}: is {KINDS[content]}"):
        GGUF(path)


def test_a_header_that_is_too_long_for_safetensors_is_none() -> None:
    length = mistakes.MAX_SAFETENSORS_HEADER
    assert mistakes.kind_of(length.to_bytes(8, "little") + b"{") == "safetensors"
    assert mistakes.kind_of((length + 1).to_bytes(8, "little") + b"{") == ""


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-0.6B/", "Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("hf.co/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("here/Qwen3-0.6B", ""),  # here is a folder
        ("Qwen3-0.6B", ""),
        ("a/b/c", ""),
        ("no/model.gguf", ""),
        ("../Qwen3-0.6B", ""),
        ("-x/y", ""),
    ],
)
def test_a_name_on_the_hub_is_fetched_by_a_command_and_a_path_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    command = f"hf download {name} --local-dir {name.partition('/')[2]}" if name else ""
    assert mistakes.download(given) == command
    for advice in (mistakes.missing_model_bin(given), mistakes.missing_source(given)):
        fetches = f".py {name}" if name else "from the Hugging Face Hub"
        assert (fetches in advice) == bool(name)


def test_a_folder_names_what_in_it_can_be_run_or_converted(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    os.mkfifo(folder / "a.bin")  # opening it would block
    said = []
    for name, content in (
        ("m.gguf", b"GGUF"),
        ("config.json", b"{}"),
        ("pytorch_model.bin", b"PK"),
        ("x.bin", MAGIC),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(ModelFileError) as caught:
            ModelFile(folder)
        said.append(str(caught.value).partition("; ")[2])
    convert = f"`python export.py {shlex.quote(str(folder))} model.bin` converts it"
    assert said[0] == f"`python export.py {shlex.quote(str(folder / 'm.gguf'))} model.bin` converts it"
    assert said[1:] == [convert, convert, f"did you mean {folder / 'x.bin'}?"]


def test_commands_quote_the_paths_they_name() -> None:
    for path, start in (("a b/c.safetensors", b"\x10\0\0\0\0\0\0\0{"), ("a b.gguf", b"GGUF")):
        command = mistakes.in_place_of_model_bin(path, start).split("`")[1]
        assert shlex.split(command)[2] in ("a b", "a b.gguf")


def test_a_file_that_cannot_be_read_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.bin").symlink_to("gone")
    assert not mistakes.is_model_file(tmp_path / "x.bin") and not mistakes.is_model_file(tmp_path)
