"""Entry points: `qwen3c`, `qwen3c-export`, `qwen3c-train`, `python -m qwen3c`, the scripts in the root."""

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
    """Import a command and run it. Ctrl-C during the import, or at the very end, gives no traceback."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    status: int = importlib.import_module(f".{command}", __package__).main()
    return status
