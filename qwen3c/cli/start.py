"""The ways in: `qwen3c`, `qwen3c-export` and `qwen3c-train`, `python -m qwen3c`, and the scripts in the root."""

from __future__ import annotations

import importlib
import signal


def run() -> int:
    """The command run.py: a model.bin answers, completes, is looked into and measured."""
    return _start("run")


def export() -> int:
    """The command export.py: a Hugging Face directory or a GGUF file -> model.bin."""
    return _start("export")


def train() -> int:
    """The command train.py: text -> a model."""
    return _start("train")


def _start(command: str) -> int:
    """Ctrl-C while the modules load, or at the very end, is an end without a traceback; between, main() answers it."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    status: int = importlib.import_module(f".{command}", __package__).main()
    return status
