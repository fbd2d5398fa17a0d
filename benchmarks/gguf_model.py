"""A Hugging Face directory as a GGUF file, for llama.cpp as the peer.

    python benchmarks/gguf_model.py path/to/Qwen3-0.6B model.gguf --type Q8_0

The same weights, quantised by gguf's own Q8_0 (bit for bit what llama.cpp's converter writes), and the whole
vocabulary. Needs the package gguf.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3c.convert.directory import Directory
from qwen3c.convert.gguf import ARCHITECTURES as CLASSES, GGUF
from qwen3c.convert.huggingface import Checkpoint
from qwen3c.convert.rope import Rope, inverse_frequencies
from qwen3c.convert.source import StoredTensor

try:
    import gguf
except ImportError as error:
    raise SystemExit(f"error: {error}; `pip install '.[bench]'` installs the peer") from None

ARCHITECTURES = {name: architecture for architecture, name in CLASSES.items()}
KINDS = ("F32", "F16", "BF16", "Q8_0")
SLICE = 8 << 20  # bytes of the source quantised at a time


def write_gguf(source: Path, target: Path, kind: str = "Q8_0") -> None:
    """Write `target`; matrices as `kind`, vectors and routers as F32. SourceError if we cannot read `source`.

    `source` may be a GGUF file too, whose weights are dequantised first.
    """
    with GGUF(source) if source.is_file() else Directory(source) as opened:
        checkpoint = Checkpoint(opened, group_size=32)
        architecture = ARCHITECTURES[checkpoint.metadata["source"]["architecture"]]
        writer = gguf.GGUFWriter(target, architecture)
        _add_config(writer, checkpoint)
        _add_rope(writer, checkpoint.rope)
        _add_vocabulary(writer, checkpoint)
        number = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        names = gguf.get_tensor_name_map(number, checkpoint.config.n_layers)
        tensors = _stacked(checkpoint)
        for name, parts in tensors.items():
            shape = (len(parts), *parts[0].shape) if ".experts." in name else parts[0].shape
            stored_as = _kind(name, parts[0], kind)
            stored = gguf.quant_shape_to_byte_shape(shape, stored_as)
            peer_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert peer_name, name
            size = int(np.prod(stored))
            writer.add_tensor_info(peer_name, stored, np.dtype(np.uint8), size, raw_dtype=stored_as)
        factors = _rope_factors(checkpoint.rope)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, parts in tensors.items():
            rows = np.concatenate([_convert(part, _kind(name, part, kind)) for part in parts])
            pairs = architecture == "llama" and ("q_proj" in name or "k_proj" in name)
            writer.write_tensor_data(_paired(rows, checkpoint.config.head_dim) if pairs else rows)
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.close()


def _stacked(checkpoint: Checkpoint) -> dict[str, list[StoredTensor]]:
    """The tensors by name; the matrices of a layer's experts together, under a name without the number."""
    result: dict[str, list[StoredTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        result.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(tensor)
    return result


def _kind(name: str, tensor: StoredTensor, kind: str) -> Any:
    vector = len(tensor.shape) == 1 or name.endswith("mlp.gate.weight")
    return gguf.GGMLQuantizationType["F32" if vector else kind]


def _convert(tensor: StoredTensor, kind: Any) -> NDArray[np.uint8]:
    """(rows, bytes of a row)"""
    source = gguf.GGMLQuantizationType[tensor.dtype]
    rows, row_size = tensor.shape[0], tensor.size // tensor.shape[0]
    step = max(1, SLICE // row_size)
    pieces = []
    for row in range(0, rows, step):
        data = np.empty((min(step, rows - row), row_size), np.uint8)
        tensor.read(row * row_size, data.data.cast("B"))
        weights = gguf.quants.dequantize(data, source).reshape(-1, *tensor.shape[1:])
        pieces.append(gguf.quants.quantize(weights, kind).view(np.uint8))
    return np.concatenate(pieces)


def _paired(rows: NDArray[np.uint8], head_dim: int) -> NDArray[np.uint8]:
    """Rows in the order of llama.cpp's Llama: i and i + head_dim / 2 of a head become neighbours."""
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _add_config(writer: Any, checkpoint: Checkpoint) -> None:
    c = checkpoint.config
    writer.add_name(checkpoint.metadata["name"])
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.dim)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_eps)
    writer.add_vocab_size(c.vocab_size)
    if c.n_experts:
        writer.add_expert_count(c.n_experts)
        writer.add_expert_used_count(c.n_experts_per_token)
        writer.add_expert_feed_forward_length(c.expert_hidden_dim)


def _add_rope(writer: Any, rope: Rope) -> None:
    writer.add_rope_freq_base(rope.theta)
    writer.add_rope_dimension_count(rope.head_dim)
    if rope.type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope.type.upper()])
        writer.add_rope_scaling_factor(rope.factor)
    if rope.type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.original_context)


def _rope_factors(rope: Rope) -> NDArray[np.float32] | None:
    """The divisors (head_dim / 2,) of the rotary frequencies of a Llama 3."""
    if rope.type != "llama3":
        return None
    return inverse_frequencies(replace(rope, type="default")) / inverse_frequencies(rope)


def _add_vocabulary(writer: Any, checkpoint: Checkpoint) -> None:
    tokenizer = json.loads(checkpoint.tokenizer)
    tokens = [f"[PAD{i}]" for i in range(checkpoint.config.vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * len(tokens)
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
    for token in tokenizer["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(checkpoint.metadata["eos_token_ids"][0])
    writer.add_add_bos_token(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", metavar="SRC", type=Path, help="Hugging Face directory, or GGUF")
    parser.add_argument("target", metavar="OUT", type=Path, help="file to write")
    parser.add_argument("--type", choices=KINDS, default="Q8_0", help="of the matrices (default: Q8_0)")
    args = parser.parse_args()
    try:
        write_gguf(args.source, args.target, args.type)
    except (OSError, ValueError) as error:
        print(f"gguf_model.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
