"""What fits in memory.

python -m pytest tests/test_memory.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen3c import memory
from qwen3c.format import Config


def config(context: int) -> Config:
    sizes: dict[str, Any] = {"dim": 1024, "hidden_dim": 3072, "n_layers": 28, "n_heads": 16, "n_kv_heads": 8}
    return Config(**sizes, head_dim=128, vocab_size=151936, n_tokens=151669, context=context, group_size=64,
                  tied_embedding=True, rms_eps=1e-6, rope_theta=1e6)  # fmt: skip


def test_the_context_is_what_fits_in_half_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, model_context, expected in [
        (64 << 30, 40960, 8192),
        (64 << 30, 4096, 4096),
        (1 << 30, 40960, (1 << 29) // (112 << 10)),  # 112 KiB of f16 keys and values per token
        (1 << 20, 40960, 512),
        (1 << 20, 256, 256),
        (None, 40960, 8192),
    ]:
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        assert memory.default_context(config(model_context), "f16") == expected


def test_a_container_counts_with_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = memory.available()
    assert machine is None or machine > 1 << 20
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 900000\nfile 600000\nkernel 5\n")
    assert memory.available() == 2100000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() is None or memory.available() > 2100000  # type: ignore[operator]
