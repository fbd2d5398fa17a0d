#!/usr/bin/env python3
"""llama-server's command line over ours, so that llama.cpp's own tests of its server run against this one.

LLAMA_SERVER_BIN_PATH=tests/serve/llama_server_shim.py python -m pytest unit/test_compat_anthropic.py

Its flags become ours where there are such, the model that it would fetch becomes one of ours, and the rest is
ignored. QWEN3C_SHIM_TALKER: a model.bin that knows tools (talker.py). QWEN3C_SHIM_RANKER: one that can rank.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from qwen3c.format import ModelFile  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", default="8080")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--alias", default="box")
    parser.add_argument("--threads")
    parser.add_argument("--ctx-size", type=int)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--api-key")
    parser.add_argument("--cors-origins")
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--hf-repo", default="")
    parser.add_argument("--jinja", action="store_true")
    parser.add_argument("--reranking", action="store_true")
    args, _ = parser.parse_known_args()

    model = _model(args)
    aliases = args.alias.split(",")
    command = [
        sys.executable, str(ROOT / "run.py"), "-m", "serve", "--port", args.port, "--host", args.host.split(",")[0],
        "--running", str(max(args.parallel, 2)), "--metrics" if args.metrics else "--no-metrics",
    ]  # fmt: skip
    for alias in aliases:
        command += ["--model-alias", f"{alias}={model}"]
    if args.ctx_size:  # llama-server's is for all places together
        own = int(ModelFile(model).config.context)
        command += ["--context", str(min(args.ctx_size // args.parallel, own))]
    if args.threads:
        command += ["--threads", args.threads]
    if args.cors_origins:
        command += ["--cors-origin", args.cors_origins]
    if args.api_key:
        keys = Path(tempfile.mkdtemp()) / "keys"
        keys.write_text("".join(f"key{i} {key}\n" for i, key in enumerate(args.api_key.split(","))))
        keys.chmod(0o600)
        command += ["--api-keys", str(keys)]
    os.execv(command[0], command)


def _model(args: argparse.Namespace) -> str:
    """The one that fits: it ranks, it thinks, it knows tools; else the one in the box."""
    if args.reranking:
        return os.environ["QWEN3C_SHIM_RANKER"]
    if "DeepSeek-R1" in args.hf_repo:
        return str(ROOT / "tests" / "tiny-qwen3.bin")
    if args.jinja:
        return os.environ["QWEN3C_SHIM_TALKER"]
    return str(ROOT / "qwen3c" / "data" / "model.bin")


if __name__ == "__main__":
    main()
