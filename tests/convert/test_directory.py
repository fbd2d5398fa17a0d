"""A directory's files are opened with care: wrong or damaged files are named, shards stay within the
directory.

python -m pytest tests/convert/test_directory.py
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from small_models import encode_tensor, small_weights, write_json, write_safetensors, write_small_model
from test_huggingface import INDEX, read, refusal

from qwen3c import format
from qwen3c.convert.directory import Directory
from qwen3c.convert.huggingface import Checkpoint
from qwen3c.convert.source import SourceError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sound source."""
    return write_small_model(tmp_path / "source")


@pytest.mark.parametrize("path", ["missing", "config.json", "source/config.json"])
def test_source_must_be_a_directory(source: Path, path: str) -> None:
    with pytest.raises(
        SourceError, match=r"(no such directory|is not a directory); expected one with config\.json"
    ):
        read(source.parent / path)


# ----------------------------------------------------------------------------
# What is given in place of a model

LFS = (
    "version https://git-lfs.github.com/spec/v1\noid "
    "sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daa\nsize 9\n"
)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Qwen/Qwen3-0.6B", "`python export.py Qwen/Qwen3-0.6B model.bin` fetches it"),
        ("Qwen/Qwen3-0.6B/", "`python export.py Qwen/Qwen3-0.6B model.bin` fetches it"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "`python export.py Qwen/Qwen3-0.6B model.bin` fetches it"),
        ("here/Qwen3-0.6B", "expected one with config.json and *.safetensors"),  # here is a folder
        ("nowhere", "expected one with config.json and *.safetensors"),
        ("a/b/c", "expected one with config.json and *.safetensors"),
    ],
)
def test_the_name_of_a_model_is_no_directory_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(
        SourceError, match=re.escape(f"{given}: no such directory; ") + ".*" + re.escape(said)
    ):
        Directory(given)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_a_git_lfs_pointer_is_called_one(source: Path, name: str) -> None:
    (source / name).write_text(LFS)
    assert refusal(source).startswith(
        f"{source / name}: is a git-lfs pointer in place of the file: `git lfs pull`"
    )


def test_a_git_lfs_pointer_in_place_of_a_shard_is_called_one(tmp_path: Path) -> None:
    source = write_small_model(tmp_path / "source", shards=2)
    path = source / "model-00002-of-00002.safetensors"
    path.write_text(LFS)
    assert refusal(source).startswith(f"{path}: is a git-lfs pointer")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model.gguf": b"GGUF"}, "is a directory with a GGUF file in it: give the file, {}/model.gguf"),
        ({"q.bin": format.MAGIC}, "is a directory with a model.bin in it: run.py {}/q.bin runs it"),
        ({"pytorch_model.bin": b"PK"}, "config.json: No such file or directory"),
        ({"adapter_config.json": b"{}"}, "is a LoRA adapter: give the directory of its base model"),
        ({"snapshots/3fa/config.json": b"{}"}, "download cache: the model is in {}/snapshots/3fa"),
        ({"Qwen3-0.6B/config.json": b"{}"}, "has no config.json, but {}/Qwen3-0.6B has"),
        ({}, "config.json: No such file or directory"),
    ],
)
def test_a_directory_that_is_no_model_is_called_what_it_is(
    tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    os.mkfifo(source / "a.bin")  # opening it would block
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    assert said.format(source) in refusal(source)


def test_a_directory_whose_weights_are_of_another_kind_says_which(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").touch()
    assert "never opened: only safetensors are read); transformers saves a model as safetensors" in refusal(
        source
    )
    (source / "model.gguf").touch()
    assert refusal(source).endswith(f", but a GGUF file: give the file, {source}/model.gguf")


# ----------------------------------------------------------------------------
# Damaged shards


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_small_model(tmp_path / "source", shards=3)


def shard(source: Path, i: int) -> Path:
    return source / f"model-{i:05d}-of-00003.safetensors"


def test_missing_shard_is_refused(sharded: Path) -> None:
    shard(sharded, 2).unlink()
    assert "model-00002-of-00003.safetensors: No such file" in refusal(sharded)


def test_short_shard_is_refused_with_both_sizes(sharded: Path) -> None:
    path = shard(sharded, 3)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert f"{path.name}: {len(data) - 1} bytes, its header describes {len(data)}" in refusal(sharded)


def test_exchanged_shards_are_refused(sharded: Path) -> None:
    one, two = shard(sharded, 1).read_bytes(), shard(sharded, 2).read_bytes()
    shard(sharded, 1).write_bytes(two)
    shard(sharded, 2).write_bytes(one)
    assert "model-00001-of-00003.safetensors: " in refusal(sharded)


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    weights = small_weights()
    names = [
        name
        for name, file in json.loads((sharded / INDEX).read_text())["weight_map"].items()
        if "00002" in file
    ]
    stored = {name: encode_tensor(weights[name], "BF16") for name in [*names, "model.embed_tokens.weight"]}
    write_safetensors(shard(sharded, 2), stored)
    message = refusal(sharded)
    assert "model-00002-of-00003.safetensors: model.embed_tokens.weight is" in message


def test_tensor_missing_from_its_shard_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard(sharded, 1).name
    write_json(sharded / INDEX, index)
    assert "model.norm.weight is missing, though" in refusal(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x.bin",
        ".safetensors\0",
        "",
        5,
        None,
    ],
)
def test_index_may_only_name_files_beside_it(sharded: Path, name: Any) -> None:
    """A sound file outside of the directory is not opened."""
    (sharded.parent / "outside.safetensors").write_bytes(shard(sharded, 3).read_bytes())
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = {k: name if "00003" in v else v for k, v in index["weight_map"].items()}
    write_json(sharded / INDEX, index)
    assert f"{name!r} is not the name of a safetensors file" in refusal(sharded)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is a JSON list"),
        ("{}", "required key 'weight_map' is missing"),
        ('{"weight_map": {}}', "weight_map is not an object that names tensors"),
        ('{"weight_map": ["model.norm.weight"]}', "weight_map is not an object that names tensors"),
    ],
)
def test_damaged_index_is_refused(sharded: Path, content: str, reason: str) -> None:
    (sharded / INDEX).write_text(content)
    assert reason in refusal(sharded)


def test_file_that_shrinks_while_it_is_read_is_noticed(source: Path) -> None:
    with Directory(source) as files:
        tensor = Checkpoint(files).tensors["model.norm.weight"]
        os.truncate(source / "model.safetensors", tensor.offset + 3)
        with pytest.raises(SourceError, match=r"ended inside model\.norm\.weight"):
            tensor.read(0, memoryview(bytearray(tensor.size)))
