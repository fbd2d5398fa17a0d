"""Runs Qwen3-family language models on ordinary CPUs.

from qwen3c import Model
with Model("model.bin") as model:
    print(model.chat("Name three rivers."))
    for event in model.generate(model.chat_prompt("And three lakes.")):
        print(event.text, end="", flush=True)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .kernels.spinning import spin_briefly

if TYPE_CHECKING:
    from .conversation import Conversation
    from .drivers.batch import CachedSession
    from .drivers.generate import Generation
    from .drivers.reply import Event, Reply
    from .drivers.sampler import Sampling
    from .engine import Session
    from .format import ModelFileError
    from .model import Model
    from .system.files import MODEL_IN_THE_BOX

__version__ = "0.1.0"
__all__ = [
    "MODEL_IN_THE_BOX",
    "CachedSession",
    "Conversation",
    "Event",
    "Generation",
    "Model",
    "ModelFileError",
    "Reply",
    "Sampling",
    "Session",
    "__version__",
]

spin_briefly()  # before the engine loads OpenMP

# public name -> its module, imported on first use, so that `--help` need not wait for NumPy
_HOMES = {
    "MODEL_IN_THE_BOX": "system.files",
    "CachedSession": "drivers.batch",
    "Conversation": "conversation",
    "Event": "drivers.reply",
    "Generation": "drivers.generate",
    "Model": "model",
    "ModelFileError": "format",
    "Reply": "drivers.reply",
    "Sampling": "drivers.sampler",
    "Session": "engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
