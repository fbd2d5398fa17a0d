"""tokenizer.json: files of supported families are read, others refused in one line before the library sees
them.

python -m pytest tests/text/test_tokenizer_json.py
"""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizer_mutants import STRAY, originals

from qwen3c.text import tokenizer_json
from qwen3c.text.tokenizer import Tokenizer

N_MUTANTS = 400


def qwen() -> Any:
    return copy.deepcopy(originals()[0])


def refusal(value: Any) -> str:
    with pytest.raises(ValueError) as caught:
        tokenizer_json.check(json.dumps(value).encode())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


# ----------------------------------------------------------------------------
# What families have


def sentence_piece() -> Any:
    """Llama 2's kind: spaces as a visible character, unknown characters as bytes."""
    data = qwen()
    data["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    data["pre_tokenizer"] = None
    data["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    data["model"] |= {"byte_fallback": True, "unk_token": "a", "fuse_unk": True}
    return data


FAMILIES: dict[str, Any] = {
    "qwen": qwen,
    "llama 3": lambda: copy.deepcopy(originals()[1]),
    "characters": lambda: copy.deepcopy(originals()[2]),
    "llama 2": sentence_piece,
    "deepseek": lambda: qwen() | {"normalizer": {"type": "Sequence", "normalizers": []},
                                  "post_processor": None},
    "smollm": lambda: qwen() | {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, originals()[0]["decoder"]],
        }
    },
    "merges as text": lambda: qwen() | {
        "model": originals()[0]["model"]
        | {"merges": [" ".join(pair) for pair in originals()[0]["model"]["merges"]]}
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_families_have_is_read_as_the_library_reads_it(family: str) -> None:
    data = json.dumps(FAMILIES[family]()).encode()
    expected = tokenizers.Tokenizer.from_buffer(data).to_str()
    assert tokenizer_json.load(data).to_str() == expected


# ----------------------------------------------------------------------------
# What none has


@pytest.mark.parametrize("stray", STRAY, ids=lambda stray: f"{stray.get('type', 'lengths')}")
@pytest.mark.parametrize("place", ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model"])
def test_a_step_that_no_family_has_there_is_refused_or_harmless(place: str, stray: dict[str, Any]) -> None:
    """Values that none of the families has are refused; a test below uses accepted files."""
    data = json.dumps(qwen() | {place: stray}).encode()
    try:
        tokenizer_json.check(data)
    except ValueError as error:
        assert str(error).startswith(place) and "\n" not in str(error)
        return
    assert stray["type"] in ("ByteLevel", "Sequence", "Split", "Metaspace", "Replace", "BPE", "WordLevel")


def test_refusals_name_the_place_the_value_and_what_is_supported() -> None:
    charmap = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    assert refusal(qwen() | {"normalizer": charmap}) == (
        "normalizer.type is 'Precompiled', supported: "
        '"NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Sequence"'
    )
    assert refusal(qwen() | {"normalizer": {"type": "Sequence", "normalizers": [charmap]}}).startswith(
        "normalizer.normalizers[0].type is 'Precompiled', supported: "
    )
    assert refusal(qwen() | {"extra": 1}).startswith("extra is not known; known: version, truncation, ")
    assert refusal(qwen() | {"\ud800\n": 1}).startswith(r"['\ud800\n'] is not known; known: version")
    assert refusal([]) == "it is [], expected an object"
    assert refusal(qwen() | {"added_tokens": [{"id": -1}]}) == (
        "added_tokens[0].id is -1, expected an integer of 0 to 4294967295"
    )


def test_a_template_whose_token_is_missing_is_refused() -> None:
    """Files that would make the library panic later, in use."""
    llama = copy.deepcopy(originals()[1])
    template = llama["post_processor"]["processors"][1]
    del template["special_tokens"]["<|endoftext|>"]
    assert "processors" in refusal(llama) or "special_tokens lacks" in refusal(llama)
    for single in (  # type: ignore[var-annotated]
        [{}],
        [{"Sequence": {"id": "A", "type_id": 0}, "SpecialToken": {"id": "x", "type_id": 0}}],
    ):
        assert "expected one of SpecialToken, Sequence" in refusal(
            qwen()
            | {"post_processor": {"type": "TemplateProcessing", "single": single, "special_tokens": {}}}
        )


def test_replacements_that_multiply_a_text_are_refused() -> None:
    doubling = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    for key, steps in (("normalizer", "normalizers"), ("decoder", "decoders")):
        assert refusal(qwen() | {key: {"type": "Sequence", steps: [doubling] * 10}}) == (
            f"{key} makes a text 1024 times as long, at most 64 are accepted"
        )
        nested = {"type": "Sequence", steps: [{"type": "Sequence", steps: [doubling] * 4}] * 10}
        assert refusal(qwen() | {key: nested}) == f"{key} has 40 steps, at most 16 are accepted"


@pytest.mark.parametrize("deep", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000])
def test_a_deep_file_is_refused(deep: bytes) -> None:
    with pytest.raises(ValueError, match="is not valid JSON|expected an object"):
        tokenizer_json.check(deep)


def test_what_is_cut_out_is_left_to_the_library_which_refuses_what_is_wrong_in_it() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    for key in ("vocab", "merges"):
        data = (
            json.dumps(qwen() | {"model": qwen()["model"] | {key: "here"}}).encode().replace(b'"here"', deep)
        )
        with pytest.raises(ValueError) as caught:
            Tokenizer(data)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_key_given_twice_is_refused() -> None:
    data = json.dumps(qwen()).encode()
    charmap = b'{"type": "Precompiled", "precompiled_charsmap": "/////w=="}'
    with pytest.raises(ValueError, match="given twice"):
        tokenizer_json.check(b'{"normalizer": ' + charmap + b", " + data[1:])


# ----------------------------------------------------------------------------
# The vocabulary, cut out

AWKWARD = [
    '"',
    "\\",
    '\\"',
    "{",
    "}",
    "[",
    "]",
    "]]",
    "},",
    '"}',
    "é",
    "\\\\",
    "\u2028",
    "\\u0022",
    ":",
    " ",
    '{"vocab": {',
]


def large(seed: int) -> Any:
    """A file whose vocabulary and merges are cut out, full of what a careless cut would stumble over."""
    r = random.Random(seed)
    data = qwen()
    data["model"]["vocab"] = {"".join(r.choices(AWKWARD, k=6)) + str(i): i for i in range(9000)}
    data["model"]["merges"] = [r.choices(AWKWARD, k=2) for _ in range(9000)]
    return data


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_all_but_the_vocabulary_is_read(seed: int, layout: dict[str, Any]) -> None:
    data = large(seed)
    rest = tokenizer_json._without_vocabulary(json.dumps(data, **layout).encode())
    assert len(rest) < 20_000
    data["model"] |= {"vocab": "<a large object>", "merges": "<a large list>"}
    assert json.loads(rest) == data


def test_a_step_beside_a_large_vocabulary_is_still_seen() -> None:
    data = large(0)
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert refusal(data | {key: {"type": "Precompiled"}}).startswith(f"{key}.type is 'Precompiled'")


def test_only_the_vocabulary_may_be_large() -> None:
    many = {str(i): {"id": "x", "ids": [1], "tokens": ["x"]} for i in range(3000)}
    template = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": many}
    assert refusal(qwen() | {"post_processor": template}).startswith(
        "post_processor.special_tokens is '<a large object>', expected"
    )
    steps = {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 9000}
    assert refusal(qwen() | {"normalizer": steps}).startswith("normalizer.normalizers is '<a large list>'")
    token = qwen()["added_tokens"][0] | {"content": "x" * 100_000}
    assert refusal(qwen() | {"added_tokens": [token]}).startswith("added_tokens[0] is '<a large object>'")
    assert "at most 4194304 are accepted" in refusal(qwen() | {"version": "x" * (5 << 20)})
    swapped = large(0)["model"] | {"vocab": large(0)["model"]["merges"]}
    assert refusal(qwen() | {"model": swapped}) == "model.vocab is '<a large list>', expected an object"


# ----------------------------------------------------------------------------
# Damaged and hostile files, used


def test_every_mutant_is_used_or_refused_in_one_line() -> None:
    """Used in a process of bounded memory, because an abort would end the tests."""
    script = Path(__file__).with_name("tokenizer_mutants.py")
    done = subprocess.run(
        [sys.executable, str(script), "0", str(N_MUTANTS)], capture_output=True, text=True, timeout=300
    )
    *lines, kinds = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"after seed {len(lines) - 1}: {done.stderr[-2000:]}"
    assert json.loads(kinds).keys() == {"used", "SourceError"} or "ModelFileError" in kinds
    assert json.loads(kinds)["used"] > N_MUTANTS / 20, "too few files get as far as being used"


def test_a_pattern_that_the_library_gives_up_on_is_one_line() -> None:
    data = qwen()
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+)+$"
    tokenizer = Tokenizer(json.dumps(data).encode())
    with pytest.raises(ValueError, match="^Onig: ") as caught:
        tokenizer.encode("a" * 60 + "b")
    assert "\n" not in str(caught.value)


def test_what_is_no_fault_of_the_file_passes() -> None:
    for error in (KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit):
        with pytest.raises(error), tokenizer_json.library_errors():
            raise error
