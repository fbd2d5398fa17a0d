"""One engine in a process of its own, for compare.py: requests come on stdin, answers go to stdout as JSON.

python benchmarks/worker.py qwen3c|llama.cpp MODEL THREADS CONTEXT

prefill N SEED   seconds for N random tokens into an empty cache
decode N SEED    seconds for N random tokens one by one, from position 8
memory           bytes resident, and of those the KV cache (0 if the engine does not tell)
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

START = 8  # position from which decoding is timed


def open_session(name: str, path: Path, threads: int, context: int) -> tuple[Any, int]:
    """A session and the size of its vocabulary; the other engine is not imported."""
    if name == "llama.cpp":
        import llamacpp

        session = llamacpp.Session(path, threads, context)
        return session, session.vocab_size
    from qwen3c import Model

    model = Model(str(path), threads=threads)
    _ = model.tokenizer  # loads in the background: wait, so that it is neither timed nor missing from memory
    return model.session(context), model.config.vocab_size


def prefill(session: Any, ids: Any) -> float:
    session.rewind(0)
    start = time.perf_counter()
    session.forward(ids)
    return time.perf_counter() - start


def decode(session: Any, ids: Any) -> float:
    session.rewind(0)
    session.forward(ids[:START])
    start = time.perf_counter()
    for i in range(len(ids)):
        session.forward(ids[i : i + 1])
    return time.perf_counter() - start


def resident_bytes() -> int:
    found = re.search(r"^VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    name, path, threads, context = sys.argv[1:]
    session, vocab_size = open_session(name, Path(path), int(threads), int(context))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        match line.split():
            case [("prefill" | "decode") as what, n, seed]:
                ids = np.random.default_rng(int(seed)).integers(0, vocab_size, int(n), np.int32)
                answer: Any = prefill(session, ids) if what == "prefill" else decode(session, ids)
            case ["memory"]:
                answer = resident_bytes(), getattr(session, "kv_bytes", 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
