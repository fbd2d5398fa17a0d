"""llama.cpp as the peer, with the surface of our Session.

It calls the C API directly, so that no Python wrapper of the peer is measured with it. Nothing of qwen3c is
imported here: both engines run on the same OpenMP library, and whoever loads it first decides how its threads
wait. Needs the package llama-cpp-python.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    import llama_cpp
except ImportError as error:
    raise SystemExit(f"error: {error}; `pip install '.[bench]'` installs the peer") from None

UBATCH = 512  # rows of one pass, llama.cpp's default
KV_TYPES = {"f16": "F16", "f32": "F32", "int8": "Q8_0"}  # ours -> the nearest of ggml


class Session:
    """One sequence in llama.cpp: flash attention, the file mapped; a process holds one model.

    kv: type of the cache. sequences: so many may be decoded together (`decode_together`), each of `context`.
    """

    def __init__(self, path: Path, threads: int, context: int, kv: str = "f16", sequences: int = 1) -> None:
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # kept alive: llama.cpp keeps calling it
        llama_cpp.llama_log_set(self._log, None)
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"{path}: llama.cpp cannot load it")
        self._path, self._threads, self._kv = path, threads, kv
        self._context = None
        self.reopen(context, sequences)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def reopen(self, context: int, sequences: int) -> None:
        """Replace the cache by an empty one for `sequences` sequences of `context` positions."""
        if self._context:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context * sequences, UBATCH, UBATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = getattr(llama_cpp, f"GGML_TYPE_{KV_TYPES[self._kv]}")
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"{self._path}: llama.cpp has no memory for {sequences} x {context} positions")
        self.position: int = 0
        self.sequences: int = sequences

    def forward(self, ids: ArrayLike, logits: Literal["last", "all"] = "last") -> NDArray[np.float32]:
        """As our Session.forward, but the logits are llama.cpp's own buffer, valid until the next call."""
        tokens = np.ascontiguousarray(ids, np.int32)
        results = []
        for start in range(0, len(tokens), UBATCH):
            piece = tokens[start : start + UBATCH]
            found = self._extend(piece, logits == "all", start + len(piece) == len(tokens))
            results.append(found.copy() if logits == "all" else found)
        return np.concatenate(results) if logits == "all" else results[-1][0]

    def decode_together(self, ids: ArrayLike) -> NDArray[np.float32]:
        """One more token for each sequence, (sequences,); logits (sequences, vocab_size)."""
        tokens = np.ascontiguousarray(ids, np.int32)
        n = len(tokens)
        logits = self._decode(tokens, [self.position] * n, range(n), [True] * n)
        self.position += 1
        return logits

    def rewind(self, position: int) -> None:
        memory = llama_cpp.llama_get_memory(self._context)
        for sequence in range(self.sequences):
            if not llama_cpp.llama_memory_seq_rm(memory, sequence, position, -1):
                raise RuntimeError(f"llama.cpp cannot rewind to {position}")
        self.position = position

    def _extend(self, tokens: NDArray[np.int32], every: bool, last: bool) -> NDArray[np.float32]:
        """Append tokens to the first sequence; logits of all of them, or of the last, or of none."""
        n = len(tokens)
        wanted = [every or (last and i == n - 1) for i in range(n)]
        logits = self._decode(tokens, range(self.position, self.position + n), [0] * n, wanted)
        self.position += n
        return logits

    def _decode(
        self,
        tokens: NDArray[np.int32],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[bool],
    ) -> NDArray[np.float32]:
        """One pass over rows (token, position, sequence); logits (rows wanted, vocab_size)."""
        n = len(tokens)
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = int(token), positions[i]
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequences[i]
                batch.logits[i] = wanted[i]
            status = llama_cpp.llama_decode(self._context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode: status {status}")
        llama_cpp.llama_synchronize(self._context)
        shape = (sum(wanted), self.vocab_size)
        if not shape[0]:
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape)


class Engine:
    """llama.cpp as an engine of worker.py."""

    def __init__(self, path: str, threads: int, kv: str, context: int, batch: int) -> None:
        self._context, self._depth = context, 0
        self._session = Session(Path(path), threads, context, kv)
        self.kv_bytes = 0  # llama.cpp does not tell
        version = f"llama-cpp-python {llama_cpp.__version__}"
        self.settings = f"{version}, Q8_0, KV {KV_TYPES[kv]}, flash attention, ubatch {UBATCH}"

    def seconds(self, kind: str, n: int, depth: int, batch: int, seed: int) -> float:
        ids = np.random.default_rng(seed).integers(0, self._session.vocab_size, (n, batch), np.int32)
        if batch > 1:
            return self._decode_together(ids)
        self._go_to(depth)
        begin = perf_counter()
        if kind == "pp":
            self._session.forward(ids[:, 0])
        else:
            for row in ids:
                self._session.forward(row)
        return perf_counter() - begin

    def greedy(self, ids: list[int], n: int) -> list[int]:
        self._session.rewind(0)
        self._depth = 0
        logits, tokens = self._session.forward(ids), []
        for _ in range(n):
            tokens.append(int(logits.argmax()))
            logits = self._session.forward(tokens[-1:])
        return tokens

    def _decode_together(self, ids: NDArray[np.int32]) -> float:
        n, batch = ids.shape
        if self._session.sequences != batch:
            self._session.reopen(-(-n // 256) * 256, batch)
        self._session.rewind(0)
        begin = perf_counter()
        for row in ids:
            self._session.decode_together(row)
        return perf_counter() - begin

    def _go_to(self, depth: int) -> None:
        """Bring the first sequence to position `depth`; tokens already there are not computed again."""
        if self._session.sequences > 1:
            self._session.reopen(self._context, 1)
            self._depth = 0
        if self._depth != depth:
            self._session.rewind(0)
            if depth:
                past = np.random.default_rng(0).integers(0, self._session.vocab_size, depth, np.int32)
                self._session.forward(past)
            self._depth = depth
        self._session.rewind(depth)
