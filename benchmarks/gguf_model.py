"""A Hugging Face Qwen3 directory as a GGUF file, for llama.cpp as the peer.

The same weights, quantised by gguf's own Q8_0 (bit for bit what llama.cpp's converter writes), and the whole
vocabulary. Needs the package gguf.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qwen3c.huggingface import Checkpoint, Files, StoredTensor

try:
    import gguf
except ImportError as error:
    raise SystemExit(f"error: {error}; `pip install '.[bench]'` installs the peer") from None

QWEN3 = 1  # Config.architecture
SLICE = 8 << 20  # bytes of the source quantised at a time


def write_gguf(source: Path, target: Path, kind: Literal["Q8_0", "F32"] = "Q8_0") -> None:
    """Write `target`; matrices as `kind`, vectors as F32. SourceError if `source` is not a Qwen3 we can read."""
    with Files(source) as files:
        checkpoint = Checkpoint(files, group_size=32)
        if checkpoint.config.architecture != QWEN3:
            raise ValueError(
                f"{source}: only the dense Qwen3 is written as GGUF, this is another architecture"
            )
        writer = gguf.GGUFWriter(target, "qwen3")
        _add_config(writer, checkpoint)
        _add_vocabulary(writer, checkpoint)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, checkpoint.config.n_layers)
        kinds = {t.name: _kind(t, kind) for t in checkpoint.tensors.values()}
        for name, tensor in checkpoint.tensors.items():
            stored = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name])
            peer_name = names.get_name(name, try_suffixes=(".weight",))
            assert peer_name, name
            size = int(np.prod(stored))
            writer.add_tensor_info(peer_name, stored, np.dtype(np.uint8), size, raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in checkpoint.tensors.items():
            writer.write_tensor_data(_convert(tensor, kinds[name]))
        writer.close()


def _kind(tensor: StoredTensor, kind: str) -> Any:
    return gguf.GGMLQuantizationType[kind if len(tensor.shape) == 2 else "F32"]


def _convert(tensor: StoredTensor, kind: Any) -> NDArray[np.uint8]:
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
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_eps)
    writer.add_vocab_size(c.vocab_size)


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
