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

from qwen3c import Model, engine, memory
from qwen3c.format import KV_TYPES, Config, ModelFile
from qwen3c.system import machine


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
        monkeypatch.setattr(memory, "available", lambda mapped=0, free=free: free)
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
    mapped = engine.Engine(path)
    copied = engine.Engine(path, huge_pages=True)
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
            engine.Engine(path, huge_pages=True)
    setting.write_text("always [madvise] never\n")
    monkeypatch.setattr(memory, "HUGE_PAGES", setting)
    monkeypatch.setattr(memory, "available", lambda mapped=0: 1000)
    with pytest.raises(ValueError, match=r"^huge pages: the weights take [\d,]+ bytes, 1,000 are available$"):
        engine.Engine(path, huge_pages=True)


GROUP_FILES = {
    2: {"limit": "memory.max", "used": "memory.current", "cache": "file"},
    1: {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "cache": "total_cache"},
}
PARENTS = {2: Path("/cgroup"), 1: Path("/cgroup/memory")}


def in_group(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """Put this process into the control groups of `files`, on a machine of 64 GB without other limits."""
    monkeypatch.setattr(machine, "CGROUP_ROOT", Path("/cgroup"))
    monkeypatch.setattr(machine, "read_text", lambda path: files.get(str(path)))
    monkeypatch.setattr(memory, "_of_machine", lambda: 64 << 30)


def group(version: int, path: str, limit: str, used: int = 0, cache: int = 0) -> dict[str, str]:
    names, directory = GROUP_FILES[version], PARENTS[version] / path
    statistics = f"anon 5\n{names['cache']} {cache}\nkernel 5"
    return {
        str(directory / names["limit"]): limit,
        str(directory / names["used"]): str(used),
        str(directory / "memory.stat"): statistics,
    }


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_limit_on_the_way_up_from_this_processs_group_counts(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {
        "/proc/self/cgroup": {1: "4:cpu:/\n3:memory:/a.slice/b.service", 2: "0::/a.slice/b.service"}[version]
    }
    none = {1: "9223372036854771712", 2: "max"}[version]
    service = group(version, "a.slice/b.service", "3000000", used=1500000, cache=600000)
    for files, expected in [
        (service | group(version, "a.slice", none, 10**9), 2_100_000),  # its page cache gives way
        (group(version, "a.slice/b.service", none) | group(version, "a.slice", "500", 100), 400),
        (service | group(version, "a.slice", "500", 600), 0),
        (group(version, "", "7000", 1000), 6000),  # of a container, which sees its own group as the root
        (group(version, "a.slice/b.service", none, 10**6), 64 << 30),
        (group(version, "another.slice", "1000"), 64 << 30),
        ({}, 64 << 30),
    ]:
        in_group(monkeypatch, files | where)
        assert memory.available() == expected
    in_group(monkeypatch, service | where)
    told = list(memory.lines(config(40960), 626 << 20, 11 << 20))
    assert len(told) > 4 and all(line.endswith("  no") for line in told[2:-1])
    directory = PARENTS[version] / "a.slice/b.service"
    assert told[-1].startswith(f"available: 2.0 MiB; control group {directory} allows 2.9 MiB; the file")


def test_a_service_that_is_slowed_down_above_a_limit_counts_as_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = group(2, "s", "5000") | {"/cgroup/s/memory.high": "3000", "/proc/self/cgroup": "0::/s"}
    in_group(monkeypatch, files)
    assert memory.available() == 3000


def under_limit(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """The address space of this process is limited, and so much of it is left."""
    monkeypatch.setattr(machine, "address_space", lambda: machine.MemoryLimit("ulimit -v", 1 << 30, left))


def test_address_space_counts_but_that_of_the_file_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    in_group(monkeypatch, {})
    under_limit(monkeypatch, 5 << 20)
    assert memory.available() == 5 << 20
    size, tokenizer = 600 << 20, 1 << 20
    under_limit(monkeypatch, 500 << 20)
    for mapped, expected in ((size, ["int8", "f16", "f32"]), (0, [])):
        row = memory.table(config(1024), size, tokenizer, mapped)[0]
        assert [kv for kv in KV_TYPES if row[f"fits_{kv}"]] == expected
    # what is resident would fit, but not the address space that the tokenizer takes while it loads
    under_limit(monkeypatch, 150 << 20)
    row = memory.table(config(1024), size, tokenizer, size)[0]
    assert row["resident_int8_bytes"] < memory.available(size) and not row["fits_int8"]


def test_a_model_that_the_address_space_does_not_hold_is_refused_before_its_tokenizer_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = str(export_small_model(tmp_path))
    under_limit(monkeypatch, 50 << 20)
    with pytest.raises(MemoryError, match=r"take \d+ MiB of address space, ulimit -v leaves 50 of 1024 MiB$"):
        Model(path)
    under_limit(monkeypatch, 500 << 20)
    assert Model(path).tokenizer.encode("a")


@pytest.mark.skipif(sys.platform != "linux", reason="needs an address space with a limit")
@pytest.mark.parametrize("megabytes", [60, 100, 125, 140, 150, 170, 200, 230, 240, 250, 260, 270])
def test_no_limit_on_address_space_ends_in_an_abort(megabytes: int, tmp_path: Path) -> None:
    path = export_small_model(tmp_path)
    script = (
        f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({megabytes} << 20, {megabytes} << 20))\n"
    )
    script += "from qwen3c.cli.run import main\n"
    script += f"raise SystemExit(main([{str(path)!r}, '-i', 'x', '-n', '1', '-j', '1']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode in (0, 2), done.stderr
    if done.returncode:
        assert done.stderr.startswith("run.py: error: ") and done.stderr.count("\n") == 1, done.stderr
        assert "cannot write" not in done.stderr


def test_the_table_says_what_fits_by_context_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    # Qwen3-0.6B: 626 MB of file, 112 KiB of f16 keys and values per token; 785 MB were measured
    monkeypatch.setattr(memory, "available", lambda mapped=0: 1 << 30)
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
    told = list(memory.lines(config(40960), 626 << 20, 11 << 20))
    assert [line.split("  ")[-1].strip() for line in told[2:5]] == ["yes", "int8 only", "no"]
    assert all(len(line) < 80 for line in told)
    monkeypatch.setattr(memory, "available", lambda mapped=0: None)
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
