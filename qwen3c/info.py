"""What is in a model.bin: the header, the metadata, every tensor, and the memory it takes to run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .format import ModelFile

CONTEXTS = (1024, 4096, 8192, 16384, 32768, 65536, 131072)


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
        "memory": [
            {"context": n}
            | {f"kv_{kv}_bytes": n * file.config.kv_bytes_per_token(kv) for kv in ("f16", "f32")}
            for n in sorted({*(n for n in CONTEXTS if n < file.config.context), file.config.context})
        ],
    }


def lines(file: ModelFile) -> Iterator[str]:
    """The same for people."""
    info = describe(file)
    yield f"{file.path}: {file.metadata['name']}, {file.config.n_parameters / 1e6:,.1f} M parameters"
    yield from _section("header", info["header"])
    metadata = {key: value for key, value in info["metadata"].items() if key != "source"}
    yield from _section("metadata", metadata | info["metadata"].get("source", {}))
    yield ""
    yield f"{'offset':>14} {'bytes':>13}  {'type':<9} {'shape':<15} tensor"
    for tensor in info["tensors"]:
        shape = " x ".join(map(str, tensor["shape"]))
        place = f"{tensor['offset']:>14} {tensor['bytes']:>13}"
        yield f"{place}  {tensor['type']:<9} {shape:<15} {tensor['name']}"
    yield ""
    yield f"{'context':>9} {'KV f16':>10} {'KV f32':>10} {'all in, f16':>12}"
    for row in info["memory"]:
        f16, f32 = row["kv_f16_bytes"], row["kv_f32_bytes"]
        all_in = gib(file.file_size + f16)
        yield f"{row['context']:>9} {gib(f16):>10} {gib(f32):>10} {all_in:>12}"


def gib(n_bytes: float) -> str:
    """A size for people: GiB, or MiB below a tenth of one."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 / 10 else f"{n_bytes / 2**20:.1f} MiB"


def _section(title: str, values: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield title
    width = max(map(len, values), default=0)
    for name, value in values.items():
        yield f"  {name:<{width}}  {value}"
