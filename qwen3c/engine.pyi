"""The compiled engine: tokens in, logits out. It knows nothing of text (see qwen3c/model.py)."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .format import Config, ModelFile

Logits = Literal["last", "all", "hidden"]
Activations = Literal["int8", "float32"]
KV = Literal["int8", "f16", "f32"]

ISA_NAMES: tuple[str, ...]
"""Every instruction set compiled in, narrowest first."""

OPENMP: bool
"""Whether the module was built with OpenMP; without it everything runs on one thread."""

def isa() -> str:
    """The instruction set in use: the widest this CPU runs, or QWEN3C_ISA."""

def set_isa(name: str) -> None:
    """Switch the kernels of the whole process. ValueError if unknown or not runnable here."""

def runnable_isas() -> tuple[str, ...]:
    """The instruction sets this CPU can run, narrowest first."""

def default_threads() -> int:
    """min(affinity, floor of the cgroup CPU quota, physical cores), at least 1."""

def softmax(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float32]:
    """softmax(logits / temperature), shape (n,), with the engine's own exp: the same bits on every machine."""

def log_sum_exp(logits: NDArray[np.float32]) -> float:
    """log(sum(exp(logits))); logits[i] - log_sum_exp(logits) is the log-probability of i, in nats."""

def top_k(logits: NDArray[np.float32], k: int) -> NDArray[np.int32]:
    """Ids of the k largest logits, largest first, ties by lower id. ValueError on NaN."""

def quantize_tiles(
    parts: Sequence[tuple[Any, str]],
    columns: int,
    group_size: int,
    n_tiles: int,
    out: Any,
) -> tuple[float, float, float, int]:
    """Quantise tiles of 16 rows into `out`, the stored form of a matrix (docs/FORMAT.md).

    parts: (buffer of row-major bytes, "BF16" | "F16" | "F32") stacked by rows; rows past the end are zero.
    n_tiles: rows in units of 16; out: writable buffer of n_tiles stored tile rows.
    Returns (largest |w - stored|, sum (w - stored)^2, sum w^2, bad), where bad is the flat index
    row * columns + column of the first NaN, Inf or value too large for an fp16 scale, or -1.
    """

def read_bandwidth(data: Any, threads: int = 1) -> float:
    """Bytes per second at which so many threads read a buffer, once from end to end."""

def int8_peak(threads: int = 1, seconds: float = 0.05) -> float:
    """Multiply-adds per second of the int8 dot products of the instruction set in use, on registers alone."""

class Model:
    """A mapped model.bin and the buffers of its forward pass; threads may share it (calls take turns)."""

    path: str
    file: ModelFile
    config: Config
    metadata: dict[str, Any]
    threads: int
    kv: KV
    activations: Activations
    closed: bool

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        kv: KV = "f16",
        activations: Activations = "int8",
        huge_pages: bool = False,
    ) -> None: ...
    def close(self) -> None:
        """Release the weights and the buffers, once no call uses them; calls that need them are a ValueError from then on."""
    def _check_open(self) -> None: ...
    def session(self, context: int | None = None) -> Session:
        """An empty sequence of at most `context` positions (default: the model's). Memory grows with use."""
    def forward(
        self, batch: Sequence[tuple[Session, ArrayLike]], logits: Logits = "last"
    ) -> list[NDArray[np.float32]]:
        """ONE ragged batch over any sessions of this model; a list of what Session.forward returns, in order."""
    def trace(self, ids: ArrayLike, names: str | Sequence[str] = "*") -> dict[str, NDArray[np.float32]]:
        """What a forward pass of `ids` (n) computed on its way, by name, in order: float32, copied in that pass.

        A name is that of the module in transformers, and the array is what the module returns, (n, width):
        model.embed_tokens, model.layers.0.self_attn.q_proj, ..., model.norm, lm_head. Heads keep their axis:
        q_norm and k_norm are (n, heads, head_dim). model.layers.0 is the residual stream after the layer. Some
        are not modules: self_attn.attn_weights, the attention probabilities, (n_heads, n, n), zero where a row
        does not see; self_attn.o_proj.input, (n, q_dim); mlp.down_proj.input, (n, hidden_dim); and beside the
        router's logits mlp.gate, mlp.gate.shares, (n, n_experts): of the chosen experts, zero of the others.
        names: a pattern such as "model.layers.*.attn_weights", or several, to keep less. ValueError if nothing
        is called that, ids are not as in Session.forward, or the arrays pass the memory available.
        """
    def logit_lens(self, x: ArrayLike) -> NDArray[np.float32]:
        """Logits (n, vocab_size) of rows (n, dim) of the residual stream, as if no layer came after them."""
    def weight(self, name: str) -> NDArray[np.float32]:
        """Dequantised weights by Hugging Face name and shape. KeyError if there is no such tensor."""

class Session:
    """One sequence: its position and its KV cache."""

    model: Model
    position: int
    context: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache allocated so far (blocks shared after fork() count in each session)."""
    def forward(self, ids: ArrayLike, logits: Logits = "last") -> NDArray[np.float32]:
        """Append ids; return (vocab_size,) logits of the last one, or (len(ids), vocab_size) of all.

        logits "hidden": (dim,) of the last one after the final norm, which the logits would be made of.

        ValueError, with both numbers and the session unchanged, if ids is empty, an id is outside the
        vocabulary or the positions would pass the context. KeyboardInterrupt leaves the session as it was.
        """
    def rewind(self, position: int) -> None:
        """Forget everything from `position` on."""
    def fork(self) -> Session:
        """A second sequence with the same past; full cache blocks are shared until one side writes."""
