"""The types of the compiled engine. engine.pyx documents them."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..format import Config, ModelFile

Logits = Literal["last", "all", "hidden"]
Activations = Literal["int8", "float32"]
KV = Literal["int8", "f16", "f32"]

def run_state_bytes(config: Config, rows: int = 256, threads: int = 1) -> int: ...

class Engine:
    path: str
    file: ModelFile
    config: Config
    metadata: dict[str, Any]
    threads: int
    kv: KV
    activations: Activations
    closed: bool
    kv_bytes: int
    kv_block_bytes: int

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        kv: KV = "f16",
        activations: Activations = "int8",
        huge_pages: bool = False,
    ) -> None: ...
    def _check_open(self) -> None: ...
    def close(self) -> None: ...
    def session(self, context: int | None = None) -> Session: ...
    def kv_bytes_of(self, sessions: Iterable[Session]) -> int: ...
    def forward(
        self, batch: Sequence[tuple[Session, ArrayLike]], logits: Logits | Sequence[int] = "last"
    ) -> list[NDArray[np.float32]]: ...
    def trace(self, ids: ArrayLike, names: str | Sequence[str] = "*") -> dict[str, NDArray[np.float32]]: ...
    def logit_lens(self, x: ArrayLike) -> NDArray[np.float32]: ...
    def weight(self, name: str) -> NDArray[np.float32]: ...

class Session:
    model: Engine
    position: int
    context: int

    @property
    def kv_bytes(self) -> int: ...
    def growth(self, n: int) -> int: ...
    def forward(self, ids: ArrayLike, logits: Logits = "last") -> NDArray[np.float32]: ...
    def rewind(self, position: int) -> None: ...
    def fork(self) -> Session: ...
