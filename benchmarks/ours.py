"""qwen3c as an engine of worker.py."""

from __future__ import annotations

from typing import Any

from qwen3c import Model, __version__, engine
from qwen3c.inspect.bench import Player, Test, greedy


class Engine:
    def __init__(self, path: str, threads: int, kv: str, context: int, batch: int, huge_pages: bool) -> None:
        self._model = Model(path, threads, kv, huge_pages=huge_pages)  # type: ignore[arg-type]
        self._player: Player | None = None
        self.settings = (
            f"{__version__}, {engine.isa()}, int8 weights and activations, KV {kv}"
            + ", huge pages" * huge_pages
        )

    @property
    def kv_bytes(self) -> int:
        return self._player.kv_bytes if self._player else 0

    def seconds(self, seed: int, **test: Any) -> float:
        if self._player is None:  # Player waits for the tokenizer, which a first token does not need
            self._player = Player(self._model)
        return self._player.seconds(Test(**test), seed)

    def greedy(self, ids: list[int], n: int) -> list[int]:
        return greedy(self._model, ids, n)
