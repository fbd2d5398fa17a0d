"""The container of a GGUF file: its keys and where its tensors are, read with every count checked first.

    "GGUF", version, number of tensors, number of keys
    keys         name, kind, value; a value may be an array
    tensors      name, dimensions (fastest first), kind, offset
    data         each tensor at a multiple of the alignment, without holes

Every count, offset and size is checked against the bytes there are before it is used; nothing is mapped.
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

from __future__ import annotations

import collections
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from .. import format
from ..system import mistakes
from .source import BLOCKS, Keys, SourceError, shown

VERSIONS = (2, 3)
MAX_HEADER = 64 << 20  # bytes before the data, most of them the vocabulary
MAX_ENTRIES = 1 << 16  # keys, and tensors
MAX_ITEMS = (
    1 << 21
)  # items of all arrays that are read, together; twice those of a vocabulary of 262,144 tokens
SHORT = 64  # an array of at most so many items is read whatever its name is
MAX_DIMENSIONS = 4

# kind of a value -> struct code; kind 8 is text, kind 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY, _FLOAT32 = 8, 9, 6
# Arrays that are read even if they are long
_READ = {f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")}

# kind of a tensor -> its name in ggml
TENSOR_KINDS = dict(enumerate(
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS "
    "IQ1_S "
    "IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 "
    "IQ4_NL_4_4 "
    "IQ4_NL_4_8 IQ4_NL_8_8 MXFP4 NVFP4".split()
))  # fmt: skip


@dataclass(frozen=True)
class Info:
    """What the header says about one tensor."""

    name: str
    shape: tuple[int, ...]  # slowest dimension first (the file has the fastest first)
    kind: str
    offset: int  # of its first byte in the file

    @property
    def size(self) -> int:
        weights, size = BLOCKS[self.kind]
        return math.prod(self.shape) // weights * size


class Skipped:
    """Stands for an array that nothing here needs. In a message it reads "an array of n items"."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __repr__(self) -> str:
        return f"an array of {self.n} items"


class Header:
    """The header of an open file, read from the start, never past the file's end or MAX_HEADER."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self.file = open(file.fileno(), "rb", closefd=False)
        self.file_size = os.fstat(file.fileno()).st_size
        self.position = 0
        self.items = 0  # array items read so far

    def read(self) -> tuple[Keys, dict[str, Info]]:
        """The keys, and the tensors in file order."""
        magic = self.take(min(4, self.file_size), "magic")
        if magic != mistakes.GGUF:
            hint = mistakes.in_place_of_source(self.path, magic + self.file.read(mistakes.START))
            expected = f"starts with {magic!r}; expected a directory or a GGUF file, {mistakes.GGUF!r}"
            raise self.fault(hint or expected)
        version = self.number("I", "version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
            hint = " (big-endian)" if swapped else ""
            raise self.fault(f"GGUF version is {version}{hint}, supported: 2, 3")
        n_tensors, n_keys = self.number("Q", "tensor count"), self.number("Q", "key count")
        for name, n in (("tensors", n_tensors), ("keys", n_keys)):
            if n > MAX_ENTRIES:
                raise self.fault(f"{n} {name}, at most {MAX_ENTRIES} are accepted")
        values: dict[str, Any] = {}
        for i in range(n_keys):
            key = self.text(f"name of key {i}")
            if key in values:
                raise self.fault(f"key {shown(key)} is given twice")
            values[key] = self.value(self.number("I", f"kind of {shown(key)}"), key)
        infos: dict[str, Info] = {}
        for i in range(n_tensors):
            info = self.info(i)
            if info.name in infos:
                raise self.fault(f"tensor {shown(info.name)} is given twice")
            infos[info.name] = info
        return Keys(self.path, values), self.placed(infos, values.get("general.alignment", 32))

    def take(self, n: int, what: str) -> bytes:
        self.check(n, what)
        data = self.file.read(n)
        if len(data) != n:
            raise self.fault(f"ended inside {what}; did the file change?")
        self.position += n
        return data

    def check(self, n: int, what: str) -> None:
        """SourceError unless the next n bytes are in the file and before MAX_HEADER."""
        if n > min(self.file_size, MAX_HEADER) - self.position:
            of_file = f"the file has {self.file_size}"
            limit = of_file if self.file_size < MAX_HEADER else f"at most {MAX_HEADER}"
            raise self.fault(f"{what}: {n} bytes at {self.position}, but {limit} (cut short?)")

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.fault(f"{what} is not UTF-8: byte {error.start}") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _TEXT:
            return self.text(shown(key))
        if kind == _ARRAY:
            kind, n = self.number("I", f"kind of {shown(key)}"), self.number("Q", f"length of {shown(key)}")
            return self.array(kind, key, n)
        return self.scalars(kind, key, 1)[0]

    def array(self, kind: int, key: str, n: int) -> list[Any] | Skipped:
        """The items of an array if it is needed or short, else Skipped, which has only their number."""
        name, is_read = shown(key), key in _READ or n <= SHORT
        if is_read or kind == _TEXT:
            self.items += n
            if self.items > MAX_ITEMS:
                raise self.fault(f"{name}: {n} items, at most {MAX_ITEMS} in all arrays are accepted")
        if kind == _TEXT and is_read:
            return [*self.texts(name, n)]
        if is_read:
            return self.scalars(kind, key, n)
        if kind == _TEXT:
            collections.deque(self.texts(name, n), maxlen=0)
        else:
            self.check(n * self.scalar_size(kind, key), name)
            self.position = self.file.seek(n * self.scalar_size(kind, key), os.SEEK_CUR)
        return Skipped(n)

    def texts(self, name: str, n: int) -> Iterator[str]:
        """The next n texts. There may be a million, so the loop avoids calls."""
        read, end = self.file.read, min(self.file_size, MAX_HEADER)
        for i in range(n):
            size = int.from_bytes(read(8), "little")
            self.position += 8
            if self.position + size > end:
                self.check(size, f"{name}[{i}]")
            self.position += size
            try:
                yield read(size).decode()
            except UnicodeDecodeError as error:
                raise self.fault(f"{name}[{i}] is not UTF-8: byte {error.start}") from None

    def scalars(self, kind: int, key: str, n: int) -> list[Any]:
        data = self.take(n * self.scalar_size(kind, key), shown(key))
        if kind != _FLOAT32:
            return list(struct.unpack(f"<{n}{_SCALARS[kind]}", data))
        import numpy as np

        # the shortest decimal that gives this float32: 1e-06, as in config.json, not 9.999999974752427e-07
        return [float(str(x)) for x in np.frombuffer(data, "<f4")]

    def scalar_size(self, kind: int, key: str) -> int:
        if kind not in _SCALARS:
            raise self.fault(f"kind of {shown(key)} is {kind}, which GGUF does not have here")
        return struct.calcsize("<" + _SCALARS[kind])

    def info(self, i: int) -> Info:
        name = self.text(f"name of tensor {i}")
        n = self.number("I", f"dimensions of {shown(name)}")
        if not 1 <= n <= MAX_DIMENSIONS:
            raise self.fault(f"tensor {shown(name)} has {n} dimensions, expected 1 to {MAX_DIMENSIONS}")
        shape = tuple(reversed([self.number("Q", f"shape of {shown(name)}") for _ in range(n)]))
        if not all(shape) or math.prod(shape) >= 2**48:
            raise self.fault(f"tensor {shown(name)} has shape {list(shape)}")
        kind = self.number("I", f"kind of {shown(name)}")
        kind = TENSOR_KINDS.get(kind, f"kind {kind}")
        if shape[-1] % BLOCKS.get(kind, (1, 0))[0]:
            raise self.fault(f"tensor {shown(name)} is {kind}, but its rows have {shape[-1]} weights")
        return Info(name, shape, kind, self.number("Q", f"offset of {shown(name)}"))

    def placed(self, infos: dict[str, Info], alignment: Any) -> dict[str, Info]:
        """The tensors, their offsets counted from the start of the file."""
        if type(alignment) is not int or not 8 <= alignment <= 65536 or alignment & (alignment - 1):
            raise self.fault(
                f"general.alignment is {shown(alignment)}, expected a power of two from 8 to 65536"
            )
        self.alignment = alignment
        self.start = format.align(self.position, alignment)
        return {
            name: Info(name, info.shape, info.kind, self.start + info.offset) for name, info in infos.items()
        }

    def check_layout(self, infos: dict[str, Info]) -> None:
        """Tensors follow each other without holes or overlap and end where the file ends."""
        end = padded = self.start
        for info in infos.values():
            if info.offset != padded:
                raise self.fault(f"tensor {shown(info.name)} is at byte {info.offset}, expected {padded}")
            end = info.offset + info.size
            padded = format.align(end, self.alignment)
        if not end <= self.file_size <= padded:
            raise self.fault(f"{self.file_size} bytes, its header describes {end} (cut short?)")

    def fault(self, message: str) -> SourceError:
        return SourceError(f"{self.path}: {message}")
