"""Commands that run in the process of the tests leave its signals as they were; the models that they open."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from commands import TINY
from small_models import export_small_model

from qwen3c import Model
from qwen3c.cli.signals import ENDING


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore pytest's own signal handlers after each test."""
    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command uses a model that can think, and one thread: two threads on a busy machine wait for each
    other.
    """
    monkeypatch.setenv("QWEN3C_MODEL", TINY)
    monkeypatch.setenv("QWEN3C_THREADS", "1")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TINY, threads=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights, a context of 256, a template that can think."""
    return str(export_small_model(tmp_path_factory.mktemp("small")))
