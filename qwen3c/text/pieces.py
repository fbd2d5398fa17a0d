"""Long texts in pieces whose tokens, one after the other, are those of the whole.

The library keeps about a hundred bytes for each token until it is done with a text, and cannot stop in the
middle. In pieces a text of megabytes takes little memory, and one that is too long is known to be so early.

A piece ends between a letter and a space, a newline or a mark: no match of the patterns here goes over that
place or looks beyond it, no normalisation joins the two, and what a token is follows from its match alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

SHORT = 1 << 15  # characters; a text up to there is one piece


def pattern_of(numbers: str) -> str:
    """The pattern that cuts a text into words, which cl100k had first. numbers: how it cuts digits."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


QWEN2, LLAMA3 = pattern_of(r"\p{N}"), pattern_of(r"\p{N}{1,3}")
_END = re.compile(r"(?<=[A-Za-z\u4e00-\u9fff])[ \n,.\u3001\u3002\uff0c]")


def can_be_cut(tokenizer: Any) -> bool:
    """Whether a tokenizers.Tokenizer cuts texts by one of the patterns, and changes nothing across words."""
    normalizer, pre = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)
    if normalizer is not None and normalizer["type"] != "NFC":
        return False
    split, *others = (pre or {}).get("pretokenizers", [{}])
    return (
        split.get("type") == "Split"
        and split["pattern"].get("Regex") in (QWEN2, LLAMA3)
        and (split["behavior"], split["invert"]) == ("Isolated", False)
        and [other["type"] for other in others] == ["ByteLevel"]
        and not others[0]["add_prefix_space"]
    )


def _state(step: Any) -> dict[str, Any] | None:
    """A step of a tokenizer, as its file has it."""
    found: dict[str, Any] | None = None if step is None else json.loads(step.__getstate__())
    return found


def pieces(text: str) -> Iterator[str]:
    """A text that can be cut, in pieces of about SHORT characters; longer where there is no place to cut."""
    start = 0
    while len(text) - start > 2 * SHORT and (end := _END.search(text, start + SHORT)):
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]
