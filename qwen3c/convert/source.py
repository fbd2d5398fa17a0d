"""What a model is converted from: the interface and the types that all kinds of source share.

    Source        the interface: a Hugging Face directory (directory.py) or a GGUF file (gguf.py)
    Keys          the names and values that describe a model, read with errors that name file and key
    StoredTensor  a tensor in an open file, read a few rows at a time
    SourceError   what is wrong with a source, in one line

Nothing from a source is executed: no pickle, no Python.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
import sys
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..system import mistakes
from ..system.files import reason
from ..system.terminal import escaped
from . import gguf_blocks as blocks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_DEPTH = 100  # of lists and objects in JSON
MAX_INTEGER = 1 << 127  # a larger number is no sensible count

# dtype -> weights and bytes of its smallest unit; GGUF alone has blocks of more than one
BLOCKS = {"BF16": (1, 2), "F16": (1, 2), "F32": (1, 4)}
BLOCKS |= {name: (kind.weights, kind.size) for name, kind in blocks.KINDS.items()}
TAKE_UNQUANTIZED = "already quantised; take the model's original BF16, F16 or F32 repository instead"
_QUANTIZED_DTYPE = re.compile(r"[IU]\d+$|F[468](_|$)|BOOL$")


class SourceError(ValueError):
    """A source cannot be exported; the message is one line naming the file and the key or tensor.

    Control characters, such as those of an escape sequence in a tensor's name, are spelled out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong, _SHORT.maxlevel = 60, 60, 40, 2


def shown(value: Any) -> str:
    """A value of a file for an error message: its repr, a long one cut in the middle."""
    return cut(_SHORT.repr(value))


def cut(text: object, length: int = 120) -> str:
    """`text` in one line of at most `length` characters, cut in the middle."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[: length - 33]}...{line[-30:]}"


class Source(Protocol):
    """A model to convert, its files open until the `with` block ends.

    Keys and tensors have the names that transformers gives them. Methods raise SourceError for damaged data.
    """

    @property
    def location(self) -> Path:
        """The directory or file that messages name."""

    @property
    def group_size(self) -> int:
        """The group size for its weights, unless the caller chooses another."""

    @property
    def opened(self) -> list[FileIO]:
        """The files that are open; an export must not write over any of them."""

    @property
    def template_places(self) -> str:
        """Where a chat template is looked for, in words for people."""

    def config(self) -> Keys:
        """The keys of config.json: the numbers of the forward pass."""

    def generation(self) -> Keys:
        """The keys of generation_config.json, such as sampling defaults and end tokens; may be empty."""

    def tokenizer(self) -> tuple[Path, bytes]:
        """The file that messages about the tokenizer name, and the bytes of tokenizer.json."""

    def template(self) -> str:
        """The chat template, "" if there is none."""

    def special_tokens(self) -> dict[str, str]:
        """Those of bos_token, eos_token, pad_token and unk_token that exist; templates may print them."""

    def licence(self) -> str | None:
        """The licence as the source names it; None if it names none."""

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor there is, by its Hugging Face name."""

    def __enter__(self) -> Source: ...

    def __exit__(self, *_: object) -> None: ...


# ----------------------------------------------------------------------------
# Keys and values


class Keys:
    """Names and values, such as a JSON object, read one at a time; errors name the file and the key."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def require(self, key: str) -> Any:
        if key not in self.values:
            raise SourceError(f"{self.path}: required key {key!r} is missing")
        return self.values[key]

    def integer(self, key: str) -> int:
        value = self.require(key)
        if type(value) is not int:
            raise SourceError(f"{self.path}: {key} is {shown(value)}, expected an integer")
        if abs(value) > MAX_INTEGER:
            raise SourceError(f"{self.path}: {key} is {shown(value)}, expected a smaller integer")
        return value

    def number(self, key: str) -> float:
        value = self.require(key)
        # integers can exceed every float
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise SourceError(f"{self.path}: {key} is {shown(value)}, expected a finite number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.require(key)
        if type(value) is not bool:
            raise SourceError(f"{self.path}: {key} is {shown(value)}, expected true or false")
        return value

    def numbers(self, keys: tuple[str, ...]) -> dict[str, int | float]:
        """Those of `keys` that are present and not null, each a finite number."""
        present = [key for key in keys if self.values.get(key) is not None]
        for key in present:
            self.number(key)
        return {key: self.values[key] for key in present}


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """The object in `data`. A key given twice, NaN and Infinity are errors: readers differ on them.

    So are numbers beyond a float, lone surrogates (UTF-8 has none), and nesting deeper than MAX_DEPTH.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"key {shown(key)} is given twice")
            result[key] = value
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is not valid JSON: {cut(error)}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path}: is a JSON {type(value).__name__}, expected an object")
    _check_values(path, value)
    return value


def _check_values(path: Path, values: dict[str, Any]) -> None:
    """Raise SourceError unless everything in the JSON object can be written as JSON again."""
    # a stack of (keys that lead to a value, the value)
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), values)]
    while waiting:
        place, value = waiting.pop()
        if len(place) > MAX_DEPTH:
            raise SourceError(f"{path}: {_dotted(place)} is nested deeper than {MAX_DEPTH}")
        if isinstance(value, float) and not math.isfinite(value):
            raise SourceError(f"{path}: {_dotted(place)} is not a finite number")
        if any(_has_surrogate(text) for text in (value, *place[-1:])):
            raise SourceError(f"{path}: {_dotted(place)} is not Unicode: surrogates not allowed")
        if isinstance(value, dict):
            waiting.extend(((*place, key), inner) for key, inner in value.items())
        elif isinstance(value, list):
            waiting.extend(((*place, i), inner) for i, inner in enumerate(value))


def _dotted(place: tuple[Any, ...]) -> str:
    return cut(".".join(map(str, place)))


def _has_surrogate(text: Any) -> bool:
    return isinstance(text, str) and not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


# ----------------------------------------------------------------------------
# Files and tensors


def open_regular(path: Path, opened: list[FileIO]) -> FileIO:
    """Open a file, unbuffered, and add it to `opened`. SourceError if it is a pointer or no regular file."""
    try:
        # a FIFO would block and a device has no end: only regular files are opened
        if not stat.S_ISREG(path.stat().st_mode):
            raise SourceError(f"{path}: is not a regular file")
        file = open(path, "rb", buffering=0)
    except OSError as error:
        raise SourceError(f"{path}: {reason(error)}") from None
    opened.append(file)
    hint = mistakes.in_place_of_part(os.pread(file.fileno(), mistakes.START, 0))
    if hint:
        raise SourceError(f"{path}: {hint}")
    return file


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file: row-major, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    file: FileIO
    offset: int  # of its first byte in the file

    @property
    def size(self) -> int:
        weights, size = BLOCKS[self.dtype]
        return math.prod(self.shape) // weights * size

    def read(self, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of the tensor from byte `start` on; threads may share the file."""
        position = self.offset + start
        while len(out):
            n = os.preadv(self.file.fileno(), [out], position)
            if not n:
                raise SourceError(f"{self.path}: ended inside {self.name}; did the file change?")
            out, position = out[n:], position + n


def to_float32(data: memoryview, dtype: str) -> NDArray[np.float32]:
    """The weights in `data`, which holds whole units (BLOCKS) of a tensor, as float32, shape (n,); exact."""
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in blocks.KINDS:
        return blocks.dequantize(data, dtype)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def check_dtype(tensor: StoredTensor) -> None:
    """Raise SourceError unless the tensor's numbers can be read."""
    if tensor.dtype not in BLOCKS:
        fault = TAKE_UNQUANTIZED if _QUANTIZED_DTYPE.match(tensor.dtype) else "expected BF16, F16 or F32"
        raise SourceError(f"{tensor.path}: {cut(tensor.name)} is {cut(tensor.dtype)}: {fault}")
