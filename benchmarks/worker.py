"""One engine in a process of its own, for bench.py.

    worker.py serve ENGINE MODEL SETTING     requests on stdin, answers on stdout, a line of JSON each
    worker.py first ENGINE MODEL SETTING     one token, printed as soon as it is known
    worker.py convert ENGINE SOURCE TARGET   the engine's form of a Hugging Face directory

Only the named engine is imported, so that no other engine's threads or settings are in its process. An
engine is a class: opened with (path, threads, kv, context, batch), it has `settings`,
`seconds(kind, n, depth, batch, seed)`, `greedy(ids, n)` and `kv_bytes`; ValueError where it cannot do what is
asked.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

PROMPT = [1, 2, 3, 4]


MODULES = {
    "llama.cpp": "llamacpp",
    "openvino": "openvino_peer",
    "ctranslate2": "ctranslate2_peer",
    "qwen3c": "ours",
}


def open_engine(name: str, path: str, setting: dict[str, Any]) -> Any:
    huge_pages = setting.pop("huge_pages")
    if name == "qwen3c":
        setting["huge_pages"] = huge_pages
    return importlib.import_module(MODULES[name]).Engine(path, **setting)


def convert(name: str, source: Path, target: Path) -> None:
    """Make `target`, whole or not at all."""
    if name == "llama.cpp":
        write = importlib.import_module("gguf_model").write_gguf
    else:
        write = importlib.import_module(MODULES[name]).convert
    partial = target.with_name(f"partial-{os.getpid()}-{target.name}")
    write(source, partial)
    partial.rename(target)


def resident_bytes() -> int:
    found = re.search(r"^VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def answer(engine: Any, what: str, arguments: dict[str, Any]) -> Any:
    if what == "memory":
        return resident_bytes(), engine.kv_bytes
    return getattr(engine, what)(**arguments)


def serve(engine: Any) -> None:
    send({"answer": engine.settings})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            send({"answer": answer(engine, request.pop("what"), request)})
        except ValueError as error:
            send({"error": " ".join(str(error).split())})


def send(value: dict[str, Any]) -> None:
    print(json.dumps(value), file=CHANNEL, flush=True)


def main() -> None:
    mode, name, path, last = sys.argv[1:]
    if mode == "convert":
        convert(name, Path(path), Path(last))
        return
    try:
        engine = open_engine(name, path, json.loads(last))
    except ValueError as error:
        send({"error": " ".join(str(error).split())})
        return
    if mode == "first":
        send({"answer": engine.greedy(PROMPT, 1)})
    else:
        serve(engine)


if __name__ == "__main__":
    # what an engine prints of its own goes to stderr: stdout carries answers alone
    CHANNEL = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main()
