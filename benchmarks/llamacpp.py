"""llama.cpp as the peer: a GGUF file from a Hugging Face directory, and a session with the surface of ours.

Needs `pip install llama-cpp-python gguf`. The GGUF holds the same weights, quantised by gguf's own Q8_0 (bit for
bit what llama.cpp's converter writes), and the whole vocabulary. The session calls the C API directly, so
that no Python wrapper of the peer is measured with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen3c.huggingface import Checkpoint, Files, StoredTensor

try:
    import gguf
    import llama_cpp
except ImportError as error:
    raise SystemExit(f"error: {error}; `pip install llama-cpp-python gguf` installs the peer") from None

UBATCH = 512  # rows of one pass, llama.cpp's default
SLICE = 8 << 20  # bytes of the source quantised at a time

# ----------------------------------------------------------------------------
# Hugging Face directory -> GGUF


def write_gguf(source: Path, target: Path, kind: Literal["Q8_0", "F32"] = "Q8_0") -> None:
    """Write `target`; matrices as `kind`, vectors as F32. SourceError if `source` is not a Qwen3 we can read."""
    with Files(source) as files:
        checkpoint = Checkpoint(files, group_size=32)
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


# ----------------------------------------------------------------------------
# A session


class Session:
    """One sequence in llama.cpp: flash attention, f16 KV cache, the file mapped; a process holds one model."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # kept alive: llama.cpp keeps calling it
        llama_cpp.llama_log_set(self._log, None)
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"{path}: llama.cpp cannot load it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, UBATCH, UBATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"{path}: llama.cpp has no memory for a context of {context}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.position = 0

    def forward(self, ids: ArrayLike, logits: Literal["last", "all"] = "last") -> NDArray[np.float32]:
        """As our Session.forward, but the last logits are llama.cpp's own buffer, valid until the next call."""
        tokens = np.ascontiguousarray(ids, np.int32)
        results = []
        for start in range(0, len(tokens), UBATCH):
            piece = tokens[start : start + UBATCH]
            found = self._decode(piece, logits == "all", start + len(piece) == len(tokens))
            results.append(found.copy() if logits == "all" else found)
        return np.concatenate(results) if logits == "all" else results[-1][0]

    def rewind(self, position: int) -> None:
        memory = llama_cpp.llama_get_memory(self._context)
        if not llama_cpp.llama_memory_seq_rm(memory, 0, position, -1):
            raise RuntimeError(f"llama.cpp cannot rewind to {position}")
        self.position = position

    def _decode(self, tokens: NDArray[np.int32], every: bool, last: bool) -> NDArray[np.float32]:
        """One pass; (n, vocab_size) logits of all tokens, or of the last where `last`, else of none."""
        n = len(tokens)
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = int(token), self.position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every or (last and i == n - 1)
            status = llama_cpp.llama_decode(self._context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode: status {status}")
        self.position += n
        llama_cpp.llama_synchronize(self._context)
        shape = (n if every else int(last), self._vocab_size)
        if not shape[0]:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape)
