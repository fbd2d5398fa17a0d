"""What is in a model.bin: the header, the metadata, every tensor, and the memory it takes to run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .. import memory
from ..format import ModelFile
from ..system.terminal import escaped


def describe(file: ModelFile) -> dict[str, Any]:
    """Everything, as plain data. Offsets and sizes are in bytes, offsets from the start of the file."""
    return {
        "path": file.path,
        "header": file.fields(),
        "metadata": file.metadata,
        "tensors": [
            {
                "name": tensor.name,
                "offset": file.tensors_offset + tensor.offset,
                "shape": list(tensor.shape),
                "bytes": tensor.size,
                "type": f"int8 g{file.config.group_size}" if tensor.quantized else "float32",
                "parts": {part.name: part.rows for part in tensor.parts},
            }
            for tensor in file.tensors
        ],
        "memory": memory.table(file.config, file.file_size, len(file.tokenizer), file.file_size),
    }


def lines(file: ModelFile) -> Iterator[str]:
    """The same for people."""
    info = describe(file)
    name = f"{file.path}: {file.metadata['name']}"
    yield f"{escaped(name)}, {file.config.n_parameters / 1e6:,.1f} M parameters"
    yield from _section("header", info["header"])
    metadata = {key: value for key, value in info["metadata"].items() if key != "source"}
    yield from _section("metadata", metadata | info["metadata"].get("source", {}))
    yield ""
    yield f"{'offset':>14} {'bytes':>13}  {'type':<9} {'shape':<15} tensor"
    for tensor in _folded(info["tensors"]):
        shape = " x ".join(map(str, tensor["shape"]))
        place = f"{tensor['offset']:>14} {tensor['bytes']:>13}"
        yield f"{place}  {tensor['type']:<9} {shape:<15} {tensor['name']}"
    yield ""
    yield from memory.lines(file.config, file.file_size, len(file.tokenizer), file.file_size)


def _folded(tensors: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The experts of a layer as one line: the place of the first, the bytes and the shape of all."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for tensor in tensors:
        groups.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.*.", tensor["name"]), []).append(tensor)
    for name, group in groups.items():
        shape = [len(group), *group[0]["shape"]] if ".experts.*." in name else group[0]["shape"]
        yield group[0] | {"name": name, "shape": shape, "bytes": sum(tensor["bytes"] for tensor in group)}


def _section(title: str, values: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield title
    width = max(map(len, values), default=0)
    for name, value in values.items():
        yield f"  {escaped(name):<{width}}  {escaped(str(value))}"
