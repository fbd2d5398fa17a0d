"""Checks a tokenizer.json before the library `tokenizers` reads it, and turns the library's errors into
ValueError.

The library trusts its input: some files make it panic, and eight characters of a character map make it ask
for 8.6 GB and end the process. So a file is checked before the library reads it. It may hold the steps and
models that the supported families have (Qwen, Llama, DeepSeek, those that train.py makes), with values of the
right types; anything else is refused by name.

The vocabulary and the merges, nearly all of a file, are not checked here: the library refuses wrong ones
itself, and parsing Qwen's 11 MB in Python would take half as long as loading them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

Check = Callable[[Any, str], None]
"""Raises ValueError, naming the place, if a value is not what may stand there."""
Keys = dict[str, Check]
"""The keys that an object may have."""

MAX_REST = 4 << 20  # bytes of a file without vocabulary and merges; a few hundred added tokens take 60,000
MAX_ADDED_TOKENS = 1 << 14
MAX_STEPS = 16  # in one sequence, such as the normalisers
MAX_GROWTH = 64  # how many times longer all replacements together may make a text
MAX_TEXT = 4096  # characters of one pattern or other text


def load(data: bytes) -> tokenizers.Tokenizer:
    """The library's tokenizer for the bytes of a tokenizer.json. ValueError, one line, if refused."""
    import tokenizers

    check(data)
    with library_errors():
        return tokenizers.Tokenizer.from_buffer(data)


@contextmanager
def library_errors() -> Iterator[None]:
    """Within, errors of the library, also Rust panics (BaseException), become a ValueError of one line."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(" ".join(str(error).split())) from None


def check(data: bytes) -> None:
    """Raise ValueError, one line, unless `data` is a tokenizer.json that the library can read safely."""
    rest = _without_vocabulary(data)
    if len(rest) > MAX_REST:
        size = f"{len(rest)} bytes without vocabulary and merges"
        raise ValueError(f"{size}, at most {MAX_REST} are accepted")
    try:
        value = json.loads(rest, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {' '.join(str(error).split())}") from None
    _object(_FILE)(value, "")


# ----------------------------------------------------------------------------
# The vocabulary and the merges, cut out

_LARGE = 1 << 16  # bytes; a larger object or list is cut out
_CUT = {ord("{"): "<a large object>", ord("["): "<a large list>"}  # first byte -> the text in its place
_OPENING, _CLOSING, _QUOTE = 1, 2, 3
_KIND_OF = {**dict.fromkeys(b"{[", _OPENING), **dict.fromkeys(b"}]", _CLOSING), ord('"'): _QUOTE}
_KINDS = bytes(_KIND_OF.get(byte, 0) for byte in range(256))


def _without_vocabulary(data: bytes) -> bytes:
    """`data` with a short text in place of each large object or list that lies as deep as model.vocab and
    model.merges.

    The checks accept such a text in those two places alone. Invalid JSON stays invalid, or the library finds
    the fault in the part cut out.
    """
    import numpy as np

    text = re.sub(rb'\\["\\]', b"..", data)  # without escapes every quote begins or ends a string
    marks = np.frombuffer(text.translate(_KINDS), np.uint8)
    places = np.flatnonzero(marks)
    marks = marks[places]
    quotes = marks == _QUOTE
    structural = ~(quotes | np.logical_xor.accumulate(quotes))  # brackets that are not part of a string
    places, opens = places[structural], marks[structural] == _OPENING
    depth = np.cumsum(np.where(opens, 1, -1))
    starts, ends = places[opens & (depth == 3)], places[~opens & (depth == 2)] + 1
    if len(starts) != len(ends):
        raise ValueError("is not valid JSON: brackets do not match")
    large = ends - starts > _LARGE
    pieces, end = [], 0
    for start, next_end in zip(starts[large].tolist(), ends[large].tolist(), strict=True):
        pieces += [data[end:start], json.dumps(_CUT[data[start]]).encode()]
        end = next_end
    return b"".join([*pieces, data[end:]])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice in one object")
    return result


# ----------------------------------------------------------------------------
# Checks of single values


def _fault(where: str, value: Any, expected: str) -> ValueError:
    shown = repr(value)
    return ValueError(
        f"{where.lstrip('.') or 'it'} is {shown if len(shown) <= 80 else shown[:77] + '...'}, {expected}"
    )


def _flag(value: Any, where: str) -> None:
    if type(value) is not bool:
        raise _fault(where, value, "expected true or false")


def _text(value: Any, where: str, shortest: int = 0, longest: int = MAX_TEXT) -> None:
    if not isinstance(value, str) or not shortest <= len(value) <= longest:
        raise _fault(where, value, f"expected a text of {shortest} to {longest} characters")


def _some_text(value: Any, where: str) -> None:
    _text(value, where, shortest=1)


def _character(value: Any, where: str) -> None:
    _text(value, where, shortest=1, longest=1)


def _integer(highest: int) -> Check:
    def check(value: Any, where: str) -> None:
        if type(value) is not int or not 0 <= value <= highest:
            raise _fault(where, value, f"expected an integer of 0 to {highest}")

    return check


def _one_of(*choices: Any) -> Check:
    def check(value: Any, where: str) -> None:
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            raise _fault(where, value, f"supported: {', '.join(map(json.dumps, choices))}")

    return check


def _or_null(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _list(check: Check, most: int) -> Check:
    def check_all(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) > most:
            raise _fault(where, value, f"expected a list of at most {most}")
        for i, item in enumerate(value):
            check(item, f"{where}[{i}]")

    return check_all


def _object(keys: Keys) -> Check:
    """A check of an object's keys. Missing keys are left to the library, which has defaults for some."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _fault(where, value, "expected an object")
        for key, item in value.items():
            if key not in keys:
                raise ValueError(f"{_place(where, key)} is not known; known: {', '.join(keys) or 'none'}")
            keys[key](item, f"{where}.{key}")

    return check


def _place(where: str, key: str) -> str:
    return (
        f"{where}.{key}".lstrip(".")
        if key.isidentifier() and len(key) < 40
        else f"{where.lstrip('.')}[{key[:40]!r}]"
    )


def _of_type(kinds: dict[str, Keys]) -> Check:
    """A check of an object whose "type" is one of `kinds`, which say what other keys it has."""
    names = _one_of(*kinds)

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _fault(where, value, "expected an object")
        names(value.get("type"), f"{where}.type")
        _object({"type": names, **kinds[value["type"]]})(value, where)

    return check


# ----------------------------------------------------------------------------
# Steps


def _pattern(value: Any, where: str) -> None:
    if not isinstance(value, dict) or len(value) != 1:
        raise _fault(where, value, "expected one of String, Regex")
    _object({"String": _some_text, "Regex": _text})(value, where)


def _steps(name: str, kinds: dict[str, Keys]) -> Check:
    """A check of null, a step of one of `kinds`, or a sequence of such steps under the key `name`."""

    def step(value: Any, where: str) -> None:
        sequence = {name: _list(step, MAX_STEPS)}
        _of_type({**kinds, "Sequence": sequence})(value, where)

    def check(value: Any, where: str) -> None:
        if value is None:
            return
        step(value, where)
        steps = list(_flat(value, name))
        if len(steps) > MAX_STEPS:
            raise ValueError(f"{where.lstrip('.')} has {len(steps)} steps, at most {MAX_STEPS} are accepted")
        growth = math.prod(max(len(s.get("content", "")), 1) for s in steps if s["type"] == "Replace")
        if growth > MAX_GROWTH:
            name_of = where.lstrip(".")
            raise ValueError(
                f"{name_of} makes a text {growth} times as long, at most {MAX_GROWTH} are accepted"
            )

    return check


def _flat(step: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    if step["type"] == "Sequence":
        for inner in step.get(name, []):
            yield from _flat(inner, name)
    else:
        yield step


def _template_processing(value: Any, where: str) -> None:
    """Check that `special_tokens` has every token of the template: the library panics at a missing one."""
    known = value.get("special_tokens", {})
    for key in ("single", "pair"):
        for i, piece in enumerate(value.get(key, [])):
            name = piece.get("SpecialToken", {}).get("id")
            if len(piece) != 1:
                raise _fault(f"{where}.{key}[{i}]", piece, "expected one of SpecialToken, Sequence")
            if name is not None and name not in known:
                raise _fault(f"{where}.{key}[{i}].SpecialToken.id", name, "which special_tokens lacks")
    for name, token in known.items():
        if len(token.get("ids", [])) != len(token.get("tokens", [])):
            raise ValueError(f"{_place(where + '.special_tokens', name)} has not as many ids as tokens")


def _special_tokens(value: Any, where: str) -> None:
    if not isinstance(value, dict) or len(value) > MAX_STEPS:
        raise _fault(where, value, f"expected an object of at most {MAX_STEPS} tokens")
    for name, token in value.items():
        _object({"id": _text, "ids": _list(_ID, MAX_STEPS), "tokens": _list(_text, MAX_STEPS)})(
            token, _place(where, name)
        )


_ID = _integer(2**32 - 1)
_BYTE_LEVEL: Keys = {"add_prefix_space": _flag, "trim_offsets": _flag, "use_regex": _flag}
_METASPACE: Keys = {
    "replacement": _character,
    "str_rep": _character,
    "add_prefix_space": _flag,
    "prepend_scheme": _one_of("first", "always", "never"),
    "split": _flag,
}
_REPLACE: Keys = {"pattern": _pattern, "content": _text}
_SPLIT: Keys = {
    "pattern": _pattern,
    "behavior": _one_of("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"),
    "invert": _flag,
}
_TYPE_ID = _integer(1)
_PIECES = _list(
    _object({
        "SpecialToken": _object({"id": _text, "type_id": _TYPE_ID}),
        "Sequence": _object({"id": _one_of("A", "B"), "type_id": _TYPE_ID}),
    }),
    MAX_STEPS,
)  # fmt: skip
_TEMPLATE_PROCESSING: Keys = {"single": _PIECES, "pair": _PIECES, "special_tokens": _special_tokens}

_UNICODE_FORMS: dict[str, Keys] = {"NFC": {}, "NFD": {}, "NFKC": {}, "NFKD": {}}
_NORMALIZERS: dict[str, Keys] = {**_UNICODE_FORMS, "Prepend": {"prepend": _some_text}, "Replace": _REPLACE}
_PRE_TOKENIZERS: dict[str, Keys] = {
    "ByteLevel": _BYTE_LEVEL,
    "Split": _SPLIT,
    "Digits": {"individual_digits": _flag},
    "Metaspace": _METASPACE,
    "Whitespace": {},
    "WhitespaceSplit": {},
}
_POST_PROCESSORS: dict[str, Keys] = {"ByteLevel": _BYTE_LEVEL, "TemplateProcessing": _TEMPLATE_PROCESSING}
_DECODERS: dict[str, Keys] = {
    "ByteLevel": _BYTE_LEVEL,
    "Metaspace": _METASPACE,
    "Replace": _REPLACE,
    "ByteFallback": {},
    "Fuse": {},
    "Strip": {"content": _character, "start": _integer(16), "stop": _integer(16)},
}


# ----------------------------------------------------------------------------
# The file


def _post_processor(value: Any, where: str) -> None:
    _steps("processors", _POST_PROCESSORS)(value, where)
    for step in _flat(value, "processors") if value is not None else ():
        if step["type"] == "TemplateProcessing":
            _template_processing(step, where)


def _vocabulary(value: Any, where: str) -> None:
    if not isinstance(value, dict) and value != _CUT[ord("{")]:
        raise _fault(where, value, "expected an object")


def _merges(value: Any, where: str) -> None:
    if not isinstance(value, list) and value != _CUT[ord("[")]:
        raise _fault(where, value, "expected a list")


def _no_dropout(value: Any, where: str) -> None:
    if value is not None and (isinstance(value, bool) or value != 0):
        raise _fault(where, value, "expected null: one text would have tokens by chance")


_AFFIX = _one_of(None, "")
_MODELS: dict[str, Keys] = {
    "BPE": {
        "vocab": _vocabulary,
        "merges": _merges,
        "dropout": _no_dropout,
        "unk_token": _or_null(_text),
        "continuing_subword_prefix": _AFFIX,
        "end_of_word_suffix": _AFFIX,
        "fuse_unk": _flag,
        "byte_fallback": _flag,
        "ignore_merges": _flag,
    },
    "WordLevel": {"vocab": _vocabulary, "unk_token": _text},
}
_ADDED_TOKEN: Keys = {"id": _ID, "content": _text} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized", "special"), _flag
)
_LENGTH = _integer(2**31)
_TRUNCATION: Keys = {
    "max_length": _LENGTH,
    "stride": _LENGTH,
    "strategy": _one_of("LongestFirst", "OnlyFirst", "OnlySecond"),
    "direction": _one_of("Left", "Right"),
}


def _padding_strategy(value: Any, where: str) -> None:
    if isinstance(value, dict):
        return _object({"Fixed": _LENGTH})(value, where)
    _one_of("BatchLongest")(value, where)


_PADDING: Keys = {
    "strategy": _padding_strategy,
    "direction": _one_of("Left", "Right"),
    "pad_to_multiple_of": _or_null(_LENGTH),
    "pad_id": _ID,
    "pad_type_id": _ID,
    "pad_token": _text,
}
_FILE: Keys = {
    "version": _one_of("1.0"),
    "truncation": _or_null(_object(_TRUNCATION)),
    "padding": _or_null(_object(_PADDING)),
    "added_tokens": _list(_object(_ADDED_TOKEN), MAX_ADDED_TOKENS),
    "normalizer": _steps("normalizers", _NORMALIZERS),
    "pre_tokenizer": _steps("pretokenizers", _PRE_TOKENIZERS),
    "post_processor": _post_processor,
    "decoder": _steps("decoders", _DECODERS),
    "model": _of_type(_MODELS),
}
