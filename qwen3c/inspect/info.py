"""The contents of a model.bin: a summary, the memory it takes to run, metadata, every tensor, the header."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from .. import format, memory
from ..format import ModelFile
from ..memory import gib
from ..system.terminal import escaped, wrapped

LAYER = re.compile(r"model\.layers\.\d+")
THINKING = {
    "hybrid": "on, unless it is switched off (--no-think)", "always": "always on", "none": "none",
}  # fmt: skip


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
                "type": tensor.encoding.value + (f" g{file.config.group_size}" if tensor.quantized else ""),
                "parts": {part.name: part.rows for part in tensor.parts},
            }
            for tensor in file.tensors
        ],
        "memory": memory.table(file.config, file.file_size, len(file.tokenizer), file.file_size),
    }


def lines(file: ModelFile) -> Iterator[str]:
    """describe() for people: 80 columns, the most wanted first, without offsets."""
    info = describe(file)
    source = file.metadata.get("source", {})
    yield from _section("", _summary(file))
    yield ""
    for line in memory.lines(file.config, file.file_size, len(file.tokenizer), file.file_size):
        yield from wrapped(line)
    yield from _section("metadata", {key: value for key, value in file.metadata.items() if key != "source"})
    yield ""
    yield from _tensor_lines(info["tensors"])
    yield from _section("header", info["header"])
    yield from _section("source", {key: value for key, value in source.items() if key != "config"})
    # qwen3c's exporter stores config.json there; another writer may store anything
    config = source.get("config")
    if config is not None:
        yield from _section(
            "config of the source", _flat(config) if isinstance(config, dict) else {"": config}
        )


def _summary(file: ModelFile) -> dict[str, Any]:
    """The values that a person asks for first."""
    c = file.config
    experts = f", {c.n_experts_per_token} of {c.n_experts} experts a token" if c.n_experts else ""
    return {
        "name": file.metadata["name"],
        "file": file.path,
        "size": f"{gib(file.file_size)}, {format.described(c, file.encodings)}",
        "parameters": f"{c.n_parameters / 1e6:,.1f} M",
        "context": f"{c.context:,} tokens",
        "thinking": THINKING[file.metadata["thinking"]],
        "chat": "yes" if file.template else "no: without a chat template it completes text",
        "vocabulary": f"{c.n_tokens:,} tokens",
        "layers": f"{c.n_layers} of width {c.dim}; {c.n_heads} heads of {c.head_dim}, "
        f"{c.n_kv_heads} for keys and values{experts}",
    }


def _tensor_lines(tensors: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each tensor; layers equal to the layer before them share one line."""
    yield f"{'tensors':<37} {'type':<9} {'shape':<17} {'bytes':>13}"
    like: list[Any] = []
    same: list[str] = []
    for layer, members in itertools.groupby(_folded(tensors), lambda tensor: layer_of(tensor["name"])):
        told = [_tensor_line(tensor, layer) for tensor in members]
        if layer and told == like:
            same.append(layer)
            continue
        yield from (f"  {line}" for line in likewise(same))
        like, same = told if layer else [], []
        yield from [f"  {layer}"] if layer else []
        yield from told
    yield from (f"  {line}" for line in likewise(same))


def _tensor_line(tensor: dict[str, Any], layer: str) -> str:
    shape = " x ".join(map(str, tensor["shape"]))
    name = "  " * bool(layer) + tensor["name"].removeprefix(f"{layer}.")
    return f"  {name:<35} {tensor['type']:<9} {shape:<17} {tensor['bytes']:>13,}"


def likewise(layers: list[str]) -> Iterator[str]:
    """One line for `layers`, which equal the layer shown before them; none if there are no such layers."""
    if layers:
        yield f"{layers[0]}{f' to {layers[-1]}' if len(layers) > 1 else ''}: likewise"


def layer_of(name: str) -> str:
    """The layer that a tensor or an activation belongs to, such as model.layers.0; "" for none."""
    match = LAYER.match(name)
    return match[0] if match else ""


def _folded(tensors: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The tensors with the experts of a layer folded into one: their bytes are summed."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for tensor in tensors:
        groups.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.*.", tensor["name"]), []).append(tensor)
    for name, group in groups.items():
        shape = [len(group), *group[0]["shape"]] if ".experts.*." in name else group[0]["shape"]
        yield group[0] | {"name": name, "shape": shape, "bytes": sum(tensor["bytes"] for tensor in group)}


def _section(title: str, values: dict[str, Any]) -> Iterator[str]:
    if title:
        yield ""
        yield title
    width = max(map(len, values), default=0)
    for name, value in values.items():
        line = f"  {escaped(name):<{width}}  {escaped(_shown(value))}"
        # a value without blanks, such as a long path, stays on the line of its name
        yield from wrapped(line, indent=width + 4) if " " in line[width + 4 :] else [line.rstrip()]


def _shown(value: Any) -> str:
    """A value on one line; a list of equal items as the item and their number."""
    if isinstance(value, list) and len(value) > 3 and all(item == value[0] for item in value):
        return f"{len(value)} x {value[0]}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return (
        ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their path, such as rope_parameters.rope_theta."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
        )
    return flat
