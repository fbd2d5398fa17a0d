"""Damaged and hostile tokenizer.json files, each a function of its seed: keys, values and bytes changed.

    python tests/text/tokenizer_mutants.py 0 3000    # use each: one JSON line per seed, then counts by kind

It ends with a signal, or with status 1, at a file that gets past the checks and harms the process.

The files to start from are of the families that are supported, and of kinds that the library knows and no
supported family has.
"""

from __future__ import annotations

import collections
import copy
import functools
import json
import random
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = map(str, Path(__file__).parents[1:3])

from small_models import tokenizer_json

from qwen3c.convert.directory import Directory
from qwen3c.convert.huggingface import _read_tokenizer
from qwen3c.convert.source import SourceError
from qwen3c.format import ModelFileError
from qwen3c.text.tokenizer import BackgroundTokenizer

Place = list[Any]  # of keys and indices

STRAY = [
    {"type": "Precompiled", "precompiled_charsmap": "AAAAgA=="},
    {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b" * 40},
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Prepend", "prepend": ""},
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True},
    {"type": "Lowercase"},
    {"type": "Nmt"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "MergedWithNext", "invert": True},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True},
    {"type": "Split", "pattern": {"Regex": r"(?<=(a*)*)\b|\G"}, "behavior": "Contiguous", "invert": False},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "FixedLength", "length": 0},
    {"type": "UnicodeScripts"},
    {"type": "CharDelimiterSplit", "delimiter": "a"},
    {"type": "Punctuation", "behavior": "Isolated"},
    {"type": "Strip", "content": " ", "start": 2**63, "stop": 2**64 - 1},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "BPEDecoder", "suffix": ""},
    {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2**32 - 1], "trim_offsets": True,
     "add_prefix_space": True},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "missing", "type_id": 0}}],
     "pair": [], "special_tokens": {}},
    {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 2**32 - 1}}],
     "pair": [], "special_tokens": {"x": {"id": "y", "ids": [1, 2], "tokens": []}}},
    {"type": "Sequence", "normalizers": [], "pretokenizers": [], "processors": [], "decoders": []},
    {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0], ["b", -1e308]], "byte_fallback": True},
    {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "##",
     "max_input_chars_per_word": 2**63, "vocab": {"a": 0}},
    {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "missing"},
    {"type": "BPE", "vocab": {"a": 0, "b": 4294967295}, "merges": [["a", "b"]]},
    {"type": "BPE", "dropout": -1.0, "vocab": {}, "merges": []},
    {"direction": "Left", "max_length": 2**63, "strategy": "OnlySecond", "stride": 2**64 - 1},
    {"strategy": {"Fixed": 2**60}, "direction": "Right", "pad_to_multiple_of": 2**62, "pad_id": 0,
     "pad_type_id": 0, "pad_token": "p"},
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**400, 0.5, 1e308, float("nan"),
    "", "a", "\x00", "\ud800", "\U0010ffff", "é" * 3, "x" * 5000, "BPE", "ByteLevel", "Regex", "(", "(?<a>",
    "[",
    [], {}, [[]], [{}], {"type": None}, {"type": "Sequence"}, [1, 2], ["a", "b"], {"a": 1},
]  # fmt: skip


@functools.cache
def originals() -> list[Any]:
    """Parsed tokenizer.json files, small enough to be changed thousands of times."""
    qwen = json.loads(tokenizer_json())
    bos = {"id": "<|endoftext|>", "ids": [384], "tokens": ["<|endoftext|>"]}
    first, text = {"SpecialToken": {"id": bos["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos["id"]: bos},
    }
    byte_level = qwen["decoder"]
    llama = qwen | {
        "normalizer": None,
        "post_processor": {"type": "Sequence", "processors": [byte_level, template]},
    }
    characters = qwen | {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, " ": 2}, "unk_token": "<unk>"},
        "added_tokens": [],
    }
    return [qwen, llama, characters]


def mutant(seed: int) -> bytes:
    """The seed-th damaged file: one to three changes to its structure or to its bytes."""
    r = random.Random(seed)
    value = copy.deepcopy(r.choice(originals()))
    if r.random() < 0.8:
        for _ in range(r.choice([1, 1, 1, 1, 2])):
            r.choice(CHANGES)(r, value)
        try:
            return json.dumps(value, ensure_ascii=r.random() < 0.5).encode("utf-8", "surrogatepass")
        except RecursionError:
            return b"[" * 100_000
    data = bytearray(json.dumps(value, ensure_ascii=False).encode())
    for _ in range(r.choice([1, 1, 4])):
        r.choice(BYTE_CHANGES)(r, data)
    return bytes(data)


def _places(value: Any, path: Place | None = None) -> list[Place]:
    """Every place in `value`, of the vocabulary and the merges a few alone."""
    path = path or []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    few = path[-1:] in (["vocab"], ["merges"])
    found = [path] if path else []
    for key, item in list(items)[: 3 if few else None]:
        found += _places(item, [*path, key])
    return found


def _at(value: Any, path: Place) -> Any:
    for key in path:
        value = value[key]
    return value


def _replace(r: random.Random, value: Any) -> None:
    path = r.choice(_places(value))
    _at(value, path[:-1])[path[-1]] = copy.deepcopy(r.choice(VALUES))


def _plant(r: random.Random, value: Any) -> None:
    """Put another component of the library in place of a step, a step of a sequence, or the model."""
    tops: list[Place] = [["normalizer"], ["pre_tokenizer"], ["post_processor"], ["decoder"], ["model"],
                        ["truncation"], ["padding"]]  # fmt: skip
    steps = [path for path in _places(value) if isinstance(_at(value, path), dict)]
    path = r.choice([*tops, *tops, r.choice(steps)])
    planted = copy.deepcopy(r.choice(STRAY))
    if r.random() < 0.2:
        steps_of = {
            "normalizers": [planted],
            "pretokenizers": [planted],
            "processors": [planted],
            "decoders": [planted],
        }
        planted = {"type": "Sequence", **steps_of}
    _at(value, path[:-1])[path[-1]] = planted


def _remove(r: random.Random, value: Any) -> None:
    path = r.choice(_places(value))
    del _at(value, path[:-1])[path[-1]]


def _rename(r: random.Random, value: Any) -> None:
    path = r.choice([p for p in _places(value) if isinstance(p[-1], str)])
    _at(value, path[:-1])[r.choice(["type", "x", "", path[-1] + "s", "\ud800"])] = _at(value, path)
    del _at(value, path[:-1])[path[-1]]


def _wrap(r: random.Random, value: Any) -> None:
    """Nested deeper: a few levels, or more than any reader takes."""
    path = r.choice(_places(value))
    inner = _at(value, path)
    for _ in range(r.choice([1, 2, 100, 130, 900])):
        inner = (
            {"type": "Sequence", "normalizers": [inner], "decoders": [inner]}
            if r.random() < 0.002
            else [inner]
        )
    _at(value, path[:-1])[path[-1]] = inner


def _copy(r: random.Random, value: Any) -> None:
    """Copy a value to another place."""
    source, target = r.choices(_places(value), k=2)
    if source != target[: len(source)]:
        _at(value, target[:-1])[target[-1]] = copy.deepcopy(_at(value, source))


def _add_token(r: random.Random, value: Any) -> None:
    token = {"id": r.choice([0, 5, 390, 2**32 - 1]), "content": r.choice(["", " ", "a", "<x>", "a" * 3000]),
             "single_word": r.random() < 0.5, "lstrip": r.random() < 0.5, "rstrip": r.random() < 0.5,
             "normalized": r.random() < 0.5, "special": r.random() < 0.5}  # fmt: skip
    if isinstance(value.get("added_tokens"), list):
        value["added_tokens"].append(token)


CHANGES: list[Callable[[random.Random, Any], None]] = [_replace, _plant, _plant, _plant, _remove, _rename,
                                                       _wrap,
                                                       _copy, _add_token]  # fmt: skip


def _flip(r: random.Random, data: bytearray) -> None:
    data[r.randrange(len(data))] = r.randrange(256)


def _cut(r: random.Random, data: bytearray) -> None:
    del data[r.randrange(len(data)) :]
    data += b" "


def _drop(r: random.Random, data: bytearray) -> None:
    start = r.randrange(len(data))
    del data[start : start + r.randrange(1, 40)]
    data += b" "


def _double(r: random.Random, data: bytearray) -> None:
    start = r.randrange(len(data))
    data[start:start] = data[start : start + r.randrange(1, 40)]


BYTE_CHANGES: list[Callable[[random.Random, bytearray], None]] = [_flip, _flip, _cut, _drop, _double]


# ----------------------------------------------------------------------------
# Read and used, as a model file's and as a directory's

TEXT = "héllo wörld 123 \n\n  <|endoftext|> aaaa"


def use(data: bytes) -> str:
    """ "used", or the one line with which the file was refused, by the reader and by the exporter."""
    try:
        _as_source(data)
        _as_model_file(data)
    except (ModelFileError, SourceError) as error:
        line = str(error)
        assert "\n" not in line and len(line) < 600, line
        return f"{type(error).__name__}: {line}"
    return "used"


def _as_source(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "tokenizer.json").write_bytes(data)
        with Directory(directory) as files:
            _read_tokenizer(files, 1 << 22)


def _as_model_file(data: bytes) -> None:
    tokenizer = BackgroundTokenizer(SimpleNamespace(path="model.bin", tokenizer=data)).result()  # type: ignore[arg-type]
    try:
        ids = tokenizer.encode(TEXT)
        tokenizer.encode_escaped(TEXT)
        tokenizer.encode_escaped(tokenizer.escape(TEXT))
        tokenizer.decode(ids)
        stream = tokenizer.stream()
        for id in ids:
            stream.push(id)
        stream.flush()
        _ = tokenizer.opening, tokenizer.closing, tokenizer.undefined(400), tokenizer.token_bytes(3)
    except ValueError as error:
        raise ModelFileError(f"model.bin: {error}") from None


def main(first: int, last: int) -> None:
    resource.setrlimit(
        resource.RLIMIT_AS, (4 << 30, 4 << 30)
    )  # a file that makes the process use more ends it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kinds: collections.Counter[str] = collections.Counter()
    for seed in range(first, last):
        result = use(mutant(seed))
        kinds[result.partition(":")[0]] += 1
        print(json.dumps([seed, result]), flush=True)
    print(json.dumps(kinds))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
