"""OpenVINO's ContinuousBatchingPipeline behind POST /v1/completions, as a peer of serving.py.

    python benchmarks/openvino_server.py path/to/openvino-model --port 8082 --threads 2

Its model server is no wheel, but this engine of it is. Prompts are token ids, replies greedy and of full
length. Needs openvino-genai, starlette and uvicorn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import numpy as np
import openvino_genai
import uvicorn
from openvino import Tensor
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route


class Engine:
    """The pipeline and the one thread that steps it."""

    def __init__(self, path: str, threads: int, kv: str) -> None:
        scheduler = SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = 4  # GB
        scheduler.max_num_batched_tokens = 256  # as OpenVINO Model Server has it
        properties = {"INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": kv}
        self._pipeline = ContinuousBatchingPipeline(path, scheduler, "CPU", properties)
        self._asked: queue.Queue[tuple[list[int], int, Any, Any]] = queue.Queue()
        self._number = 0
        threading.Thread(target=self._run, daemon=True).start()

    async def ask(self, ids: list[int], n: int) -> AsyncIterator[int]:
        """How many tokens came, each time some have."""
        loop, came = asyncio.get_running_loop(), asyncio.Queue[int]()
        self._asked.put((ids, n, loop, came))
        left = n
        while left > 0:
            new = await came.get()
            if new < 0:
                return
            left -= new
            yield new

    def _run(self) -> None:
        running: list[tuple[Any, Any, Any]] = []
        while True:
            with suppress(queue.Empty):
                while True:
                    ids, n, loop, came = self._asked.get(block=not running)
                    config = GenerationConfig(max_new_tokens=n, ignore_eos=True, do_sample=False)
                    tensor = Tensor(np.array([ids], np.int64))
                    running.append((self._pipeline.add_request(self._number, tensor, config), loop, came))
                    self._number += 1
                    if self._asked.empty():
                        break
            self._pipeline.step()
            for handle, loop, came in list(running):
                while handle.can_read():
                    tokens = sum(len(output.generated_ids) for output in handle.read().values())
                    loop.call_soon_threadsafe(came.put_nowait, tokens)
                if str(handle.get_status()).endswith("FINISHED"):
                    loop.call_soon_threadsafe(came.put_nowait, -1)
                    running.remove((handle, loop, came))


def create_app(engine: Engine) -> Starlette:
    async def complete(request: Request) -> StreamingResponse:
        body = await request.json()
        prompt, n = body["prompt"], body["max_tokens"]

        async def events() -> AsyncIterator[str]:
            total = 0
            async for tokens in engine.ask(prompt, n):
                total += tokens
                yield "data: " + json.dumps({"choices": [{"index": 0, "text": "x"}]}) + "\n\n"
            usage = {"prompt_tokens": len(prompt), "completion_tokens": total}
            yield "data: " + json.dumps({"choices": [], "usage": usage}) + "\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path")
    parser.add_argument("--port", type=int, default=8082)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv", default="f16")
    args = parser.parse_args()
    print(f"openvino-genai {openvino_genai.__version__}", flush=True)
    uvicorn.run(create_app(Engine(args.path, args.threads, args.kv)), port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
