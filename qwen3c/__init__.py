"""Runs Qwen3-family language models on ordinary CPUs.

from qwen3c import Model
model = Model("model.bin")
for event in model.generate(model.chat_prompt([{"role": "user", "content": "Hello"}])):
    print(event.text, end="", flush=True)
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Session
    from .format import ModelFileError
    from .model import Model

__version__ = "0.1.0"
__all__ = ["Model", "ModelFileError", "Session", "__version__"]

# A thread that waits for another may spin for some microseconds, then must sleep: a spinning one takes the core its
# partner needs as soon as anything else runs on the machine (docs/PERFORMANCE.md has the figures). libgomp reads this
# when the engine is loaded; the engine then takes it away again.
BORROWED_VARIABLE = None if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() else "GOMP_SPINCOUNT"
if BORROWED_VARIABLE:
    os.environ[BORROWED_VARIABLE] = "500"

# name -> module; imported on first use, so that `--help` does not wait for NumPy
_HOMES = {"Model": "model", "Session": "engine", "ModelFileError": "format"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
