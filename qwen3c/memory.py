"""How much memory there is, and what context fits into it."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .format import KV_TYPES, Config

DEFAULT_CONTEXT = 8192  # enough for a long conversation; longer ones are asked for
CGROUP = Path("/sys/fs/cgroup")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CONTEXTS = (1024, 4096, 8192, 16384, 32768, 65536, 131072)
ROWS = 256  # the engine's MAX_ROWS: rows of a prompt in flight
PROGRAM = 45 << 20  # bytes of Python, NumPy, tokenizers and Jinja (measured)
TOKENIZER = 8  # bytes of memory for each byte of tokenizer.json (measured: 90 MB for the 11 MB of Qwen3)


def available() -> int | None:
    """Bytes that can be used without swapping, within the container's limit; None if nobody says."""
    limits = [_of_machine(), _of_container()]
    return min((limit for limit in limits if limit is not None), default=None)


def default_context(config: Config, kv: str) -> int:
    """min(the model's, 8192, what fits in half of the memory available), at least 512 or the model's."""
    context = min(config.context, DEFAULT_CONTEXT)
    memory = available()
    if memory is not None:
        fitting = memory // 2 // config.kv_bytes_per_token(kv)
        context = max(min(context, fitting), min(context, 512))
    return context


def run_state_bytes(config: Config, rows: int = ROWS) -> int:
    """Bytes of the buffers of a forward pass of `rows` rows."""
    c, k = config, config.n_experts_per_token
    hidden_dim = max(c.hidden_dim, k * c.expert_hidden_dim)
    widest = max(c.dim, c.q_dim, hidden_dim, k * c.dim)
    floats = 2 * c.dim + max(c.dim, c.q_dim) + c.q_dim + 2 * c.kv_dim + 3 * hidden_dim + c.head_dim
    floats += c.n_experts + k * (c.dim + 4)
    return rows * (4 * floats + widest + 8 * widest // c.group_size)


def table(config: Config, file_size: int, tokenizer_size: int) -> list[dict[str, Any]]:
    """By context, in bytes: the KV cache when full, all that is resident then, and whether that is available.

    Resident are the mapped file, the KV cache, the buffers, the tokenizer and the program. `fits` is None where
    nobody says how much there is.
    """
    program = file_size + run_state_bytes(config) + PROGRAM + TOKENIZER * tokenizer_size
    free, rows = available(), []
    for context in sorted({*(n for n in CONTEXTS if n < config.context), config.context}):
        row: dict[str, Any] = {"context": context}
        for kv in KV_TYPES:
            row[f"kv_{kv}_bytes"] = context * config.kv_bytes_per_token(kv)
        for kv in KV_TYPES:
            resident = program + row[f"kv_{kv}_bytes"]
            row |= {
                f"resident_{kv}_bytes": resident,
                f"fits_{kv}": None if free is None else resident <= free,
            }
        rows.append(row)
    return rows


def lines(config: Config, file_size: int, tokenizer_size: int) -> Iterator[str]:
    """The same for people."""
    free = available()
    heads = "".join(f"{'KV ' + kv:>11}" for kv in KV_TYPES)
    heads += "".join(f"{'resident ' + kv:>15}" for kv in KV_TYPES)
    yield f"{'context':>9}{heads}   fits here"
    for row in table(config, file_size, tokenizer_size):
        sizes = "".join(f"{gib(row[f'kv_{kv}_bytes']):>11}" for kv in KV_TYPES)
        sizes += "".join(f"{gib(row[f'resident_{kv}_bytes']):>15}" for kv in KV_TYPES)
        fits = [kv for kv in KV_TYPES if row[f"fits_{kv}"]]
        verdict = {0: "no", len(KV_TYPES): "yes"}.get(len(fits), ", ".join(fits) + " only")
        yield f"{row['context']:>9}{sizes}   {'' if free is None else verdict}"
    if free is not None:
        yield f"available: {gib(free)}" + ("" if file_size <= free else _too_large(file_size))


def _too_large(file_size: int) -> str:
    return f"; the file ({gib(file_size)}) does not fit: weights would be read from disk again and again"


def gib(n_bytes: float) -> str:
    """A size for people: GiB, or MiB below a tenth of one."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 / 10 else f"{n_bytes / 2**20:.1f} MiB"


def in_huge_pages(weights: memoryview) -> memoryview:
    """A copy in memory that asks the system for pages of 2 MiB.

    A file is mapped in pages of 4 KiB, and looking up each of them costs bandwidth. The price of the copy is the time
    to read the whole file, and memory that no other process shares and the system cannot take back.
    ValueError if the system has no such pages to give or not so much memory.
    """
    size, free = len(weights), available()
    if not hasattr(mmap, "MADV_HUGEPAGE") or "[never]" in _huge_pages_setting():
        raise ValueError("huge pages: this system has none to give")
    if free is not None and size > free:
        raise ValueError(f"huge pages: the weights take {size:,} bytes, {free:,} are available")
    copy = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy.madvise(mmap.MADV_HUGEPAGE)
    copy[:] = weights
    return memoryview(copy).toreadonly()


def _huge_pages_setting() -> str:
    try:
        return HUGE_PAGES.read_text()
    except OSError:
        return "[never]"


def _of_machine() -> int | None:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _of_container() -> int | None:
    """cgroup version 2 as a container sees it; its page cache counts as used, but gives way."""
    try:
        limit = int((CGROUP / "memory.max").read_text())  # "max" where there is none
        used = int((CGROUP / "memory.current").read_text())
        cache = re.search(r"^file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return max(limit - used + (int(cache[1]) if cache else 0), 0)
