"""What fits in memory.

python -m pytest tests/test_memory.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import export_small_model

from qwen3c import engine, memory
from qwen3c.format import KV_TYPES, Config, ModelFile


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


def of_huge_pages(address: int) -> str:
    """The lines of /proc/self/smaps about the mapping that holds an address."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    heads = [i for i, line in enumerate(lines) if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line)]
    for i, end in zip(heads, [*heads[1:], len(lines)], strict=True):
        first, last = (int(part, 16) for part in lines[i].split()[0].split("-"))
        if first <= address < last:
            return "\n".join(lines[i:end])
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")
def test_weights_in_huge_pages_compute_the_same_bits_in_memory_of_their_own(tmp_path: Path) -> None:
    path = str(export_small_model(tmp_path))
    mapped = engine.Model(path)
    copied = engine.Model(path, huge_pages=True)
    ids = np.arange(20)
    assert (mapped.session().forward(ids) == copied.session().forward(ids)).all()
    address = np.frombuffer(copied.file.weights, np.uint8).ctypes.data
    mapping = of_huge_pages(address)
    assert path not in mapping and re.search(r"VmFlags:.* hg\b", mapping)
    assert path in of_huge_pages(np.frombuffer(mapped.file.weights, np.uint8).ctypes.data)
    tensor = copied.file.tensors[-1]
    assert bytes(copied.file.data(tensor)) == bytes(mapped.file.data(tensor))
    with pytest.raises(TypeError):
        copied.file.weights[0] = 1


def test_huge_pages_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(export_small_model(tmp_path))
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(memory, "HUGE_PAGES", setting)
    for file in (setting, tmp_path / "missing"):
        monkeypatch.setattr(memory, "HUGE_PAGES", file)
        with pytest.raises(ValueError, match="^huge pages: this system has none to give$"):
            engine.Model(path, huge_pages=True)
    setting.write_text("always [madvise] never\n")
    monkeypatch.setattr(memory, "HUGE_PAGES", setting)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(ValueError, match=r"^huge pages: the weights take [\d,]+ bytes, 1,000 are available$"):
        engine.Model(path, huge_pages=True)


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


def test_the_table_says_what_fits_by_context_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    # Qwen3-0.6B: 626 MB of file, 112 KiB of f16 keys and values per token; 785 MB were measured (docs/PERFORMANCE.md)
    monkeypatch.setattr(memory, "available", lambda: 1 << 30)
    rows = memory.table(config(40960), 626 << 20, 11 << 20)
    assert [row["context"] for row in rows] == [1024, 4096, 8192, 16384, 32768, 40960]
    # an int8 head is 128 codes and a scale of 2 bytes
    kv_bytes = {"int8": 28 * 8 * 2 * 130, "f16": 112 << 10, "f32": 224 << 10}
    assert {kv: rows[0][f"kv_{kv}_bytes"] for kv in KV_TYPES} == {kv: 1024 * n for kv, n in kv_bytes.items()}
    without_kv = {row[f"resident_{kv}_bytes"] - row[f"kv_{kv}_bytes"] for row in rows for kv in KV_TYPES}
    assert len(without_kv) == 1 and 770 << 20 < without_kv.pop() < 800 << 20
    assert [[kv for kv in KV_TYPES if row[f"fits_{kv}"]] for row in rows[:3]] == [
        list(KV_TYPES),
        ["int8"],
        [],
    ]
    verdicts = [line.split("  ")[-1].strip() for line in memory.lines(config(40960), 626 << 20, 11 << 20)]
    assert verdicts[1:4] == ["yes", "int8 only", "no"]
    monkeypatch.setattr(memory, "available", lambda: None)
    assert memory.table(config(40960), 1, 1)[0]["fits_f16"] is None
    assert "available" not in "".join(memory.lines(config(40960), 1, 1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_takes_what_the_table_says(tmp_path: Path) -> None:
    path = export_small_model(tmp_path, dim=1024, hidden_dim=3072, n_layers=2, head_dim=128, context=1024)
    script = f"""
        import re, sys
        from qwen3c import Model
        model = Model({str(path)!r})
        model.session().forward([1] * 1024)
        print(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    file = ModelFile(path)
    said = memory.table(file.config, file.file_size, len(file.tokenizer))[-1]["resident_f16_bytes"]
    assert said * 0.75 < int(done.stdout) * 1024 < said * 1.2
