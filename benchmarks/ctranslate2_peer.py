"""CTranslate2 as an engine of worker.py: int8 weights and activations, float32 KV cache."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

import ctranslate2
import numpy as np


def convert(source: Path, target: Path) -> None:
    """Convert with CTranslate2's own converter, which loads the model with transformers."""
    ctranslate2.converters.TransformersConverter(str(source)).convert(str(target), quantization="int8")


class Engine:
    def __init__(self, path: str, threads: int, kv: str, context: int, batch: int) -> None:
        self._generator = ctranslate2.Generator(
            path, device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )
        self._tokens: list[str] = json.loads(Path(path, "vocabulary.json").read_text())
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        self.kv_bytes = 0  # CTranslate2 does not tell
        self.settings = f"{ctranslate2.__version__}, compute type {self._generator.compute_type}, KV float32"

    def seconds(self, kind: str, n: int, depth: int, batch: int, seed: int) -> float:
        if kind == "pp" and depth:
            raise ValueError("keeps no session to continue")
        random = np.random.default_rng(seed)
        prompts = random.integers(0, len(self._tokens), (batch, n if kind == "pp" else max(depth, 1)))
        if kind == "pp":
            begin = perf_counter()
            self._generate(prompts.tolist(), 1)
            return perf_counter() - begin
        times = self._generate(prompts.tolist(), n + 1)
        return times[-1] - times[batch - 1]  # from when every prompt had its first token to the last token

    def greedy(self, ids: list[int], n: int) -> list[int]:
        chosen: list[int] = []
        self._generate([ids], n, chosen)
        return chosen

    def _generate(self, prompts: list[list[int]], n: int, chosen: list[int] | None = None) -> list[float]:
        """The times at which each of n more tokens of all prompts was known; the tokens go to `chosen`."""
        times: list[float] = []

        def step(result: ctranslate2.GenerationStepResult) -> bool:
            times.append(perf_counter())
            if chosen is not None:
                chosen.append(result.token_id)
            return False

        self._generator.generate_batch(
            [[self._tokens[i] for i in ids] for ids in prompts],
            max_length=n, min_length=n, sampling_topk=1, include_prompt_in_result=False,
            cache_static_prompt=False, callback=step,
        )  # fmt: skip
        return times
