"""Commands that run in the process of the tests leave its signals as they were."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from qwen3c.cli.signals import ENDING


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore pytest's own signal handlers after each test."""
    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
