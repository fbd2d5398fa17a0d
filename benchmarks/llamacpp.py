"""llama.cpp as the peer, with the surface of our Session.

It calls the C API directly, so that no Python wrapper of the peer is measured with it. Nothing of qwen3c is
imported here: both engines run on the same OpenMP library, and whoever loads it first decides how its threads
wait. Needs the package llama-cpp-python.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    import llama_cpp
except ImportError as error:
    raise SystemExit(f"error: {error}; `pip install '.[bench]'` installs the peer") from None

UBATCH = 512  # rows of one pass, llama.cpp's default


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
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
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
        shape = (n if every else int(last), self.vocab_size)
        if not shape[0]:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape)
