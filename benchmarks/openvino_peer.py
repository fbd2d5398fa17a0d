"""OpenVINO GenAI as an engine of worker.py: int8 weights, paged attention, no prefix cache, whole prompts.

Needs openvino-genai; to convert, optimum-intel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import openvino_genai
from openvino import Tensor
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

KV_TYPES = {"f16": "f16", "f32": "f32", "int8": "u8"}  # ours -> theirs


def convert(source: Path, target: Path) -> None:
    """Convert as `optimum-cli export openvino --weight-format int8` does."""
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig, OVWeightQuantizationConfig

    main_export(
        str(source), target, task="text-generation-with-past",
        ov_config=OVConfig(quantization_config=OVWeightQuantizationConfig(bits=8, sym=False)),
    )  # fmt: skip


class Engine:
    def __init__(self, path: str, threads: int, kv: str, context: int, batch: int) -> None:
        scheduler = SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = batch * max(context, 256)
        properties = {"INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": KV_TYPES[kv]}
        self._pipeline = ContinuousBatchingPipeline(path, scheduler, "CPU", properties)
        self._vocab_size = json.loads(Path(path, "config.json").read_text())["vocab_size"]
        self._requests = 0
        self.kv_bytes = 0  # OpenVINO does not tell
        self.settings = (
            f"GenAI {openvino_genai.__version__}, int8 weights, KV {KV_TYPES[kv]}, no prefix cache"
        )

    def seconds(self, kind: str, n: int, depth: int, batch: int, seed: int) -> float:
        if kind == "pp" and depth:
            raise ValueError("keeps no session to continue")
        random = np.random.default_rng(seed)
        prompts = random.integers(0, self._vocab_size, (batch, n if kind == "pp" else max(depth, 1)))
        requests = self._add(prompts, 1 if kind == "pp" else n + 1)
        if kind != "pp":
            self._pipeline.step()  # the prompts, and the first token of each
        seconds, replies = self._finish(requests)
        assert all(len(reply) == (1 if kind == "pp" else n + 1) for reply in replies)
        return seconds

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        _, (reply,) = self._finish(self._add(np.array([ids]), n))
        return reply

    def _add(self, prompts: Any, n: int) -> list[Any]:
        """Start a request for n tokens after each prompt (batch, tokens). Dropping its handle cancels it."""
        config = GenerationConfig(max_new_tokens=n, ignore_eos=True, do_sample=False)
        requests = []
        for prompt in prompts:
            tensor = Tensor(np.ascontiguousarray(prompt[None], np.int64))
            requests.append(self._pipeline.add_request(self._requests, tensor, config))
            self._requests += 1
        return requests

    def _finish(self, requests: Sequence[Any]) -> tuple[float, list[list[int]]]:
        """Seconds until all requests are done, and the tokens of each."""
        begin = perf_counter()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        seconds = perf_counter() - begin
        return seconds, [list(request.read_all()[0].generated_ids) for request in requests]
