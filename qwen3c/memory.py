"""How much memory there is, what a model takes of it, and what context fits."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .format import KV_TYPES, Config
from .system import machine

DEFAULT_CONTEXT = 8192  # enough for a long conversation; -c asks for more
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CONTEXTS = (1024, 4096, 8192, 16384, 32768, 65536, 131072)
ROWS = 256  # the engine's MAX_ROWS: rows of a pass
PROGRAM = 45 << 20  # bytes of Python, NumPy, tokenizers and Jinja (measured)
TOKENIZER = 8  # bytes of memory for each byte of tokenizer.json (measured: 90 MB for the 11 MB of Qwen3)
# Address space in bytes (measured), which is more than what is resident
PROGRAM_SPACE = 130 << 20  # address space of NumPy and the engine
TOKENIZER_SPACE = 14  # address space for each byte of tokenizer.json, while the tokenizer loads
THREAD_SPACE = 100 << 20  # address space of the loading thread: its stack, its malloc arena, the library
STACK = 8 << 20  # address space of each further thread
COPIED = 16 << 20  # bytes copied at a time; between two copies signals and other threads get their turn


def available(mapped: int = 0) -> int | None:
    """Bytes that can be used without swapping, within every limit on this process; None if unknown.

    mapped: bytes of a mapped file. The caller counts them as needed, so the address space they take is added
    back.
    """
    free, limit = _of_machine(), _tightest(mapped)
    bounds = [free, None if limit is None else limit.left]
    return min((bound for bound in bounds if bound is not None), default=None)


def check_space_for_program() -> None:
    """MemoryError if `ulimit -v` leaves too little to load NumPy and the engine: loading would end the
    process.
    """
    _check_address_space("NumPy and the engine", PROGRAM_SPACE)


def check_space_for_model(config: Config, tokenizer_size: int, threads: int) -> None:
    """MemoryError if `ulimit -v` leaves too little to load the tokenizer and run a prompt.

    Checked in advance, because the tokenizer's library ends the process when it gets no memory.
    """
    _check_address_space("tokenizer and buffers", _address_space(config, tokenizer_size, threads))


def _check_address_space(what: str, needed: int) -> None:
    limit = machine.address_space()
    if limit is not None and limit.left < needed:
        raise MemoryError(
            f"{what} take {needed >> 20} MiB of address space, "
            f"{limit.name} leaves {limit.left >> 20} of {limit.size >> 20} MiB"
        )


def default_context(config: Config, kv: str) -> int:
    """min(the model's context, 8192, what fits in half of the available memory), but at least min(512,
    model's).
    """
    context = min(config.context, DEFAULT_CONTEXT)
    memory = available()
    if memory is not None:
        fitting = memory // 2 // config.kv_bytes_per_token(kv)
        context = max(min(context, fitting), min(context, 512))
    return context


def run_state_bytes(config: Config, rows: int = ROWS) -> int:
    """Bytes of the buffers of a forward pass of `rows` rows, by a formula close to the engine's own count."""
    c, k = config, config.n_experts_per_token
    hidden_dim = max(c.hidden_dim, k * c.expert_hidden_dim)
    widest = max(c.dim, c.q_dim, hidden_dim, k * c.dim)
    floats = 2 * c.dim + max(c.dim, c.q_dim) + c.q_dim + 2 * c.kv_dim + 3 * hidden_dim + c.head_dim
    floats += c.n_experts + k * (c.dim + 4)
    return rows * (4 * floats + widest + 8 * widest // c.group_size)


def _address_space(config: Config, tokenizer_size: int, threads: int) -> int:
    """Bytes of address space that a model takes besides its file and its KV cache."""
    return TOKENIZER_SPACE * tokenizer_size + THREAD_SPACE + STACK * (threads - 1) + run_state_bytes(config)


def table(config: Config, file_size: int, tokenizer_size: int, mapped: int = 0) -> list[dict[str, Any]]:
    """By context, in bytes: the KV cache when full, all that is resident then, and whether that is available.

    Resident are the mapped file, the KV cache, the buffers, the tokenizer and the program. `fits` is None if
    the available memory is unknown. mapped: how many bytes of the file are mapped already.
    """
    program = file_size + run_state_bytes(config) + PROGRAM + TOKENIZER * tokenizer_size
    free, rows, space = available(mapped), [], machine.address_space()
    room = (
        None if space is None else space.left + mapped - file_size - _address_space(config, tokenizer_size, 1)
    )
    for context in sorted({*(n for n in CONTEXTS if n < config.context), config.context}):
        row: dict[str, Any] = {"context": context}
        for kv in KV_TYPES:
            row[f"kv_{kv}_bytes"] = context * config.kv_bytes_per_token(kv)
        for kv in KV_TYPES:
            kv_bytes = row[f"kv_{kv}_bytes"]
            resident = program + kv_bytes
            fits = None if free is None else resident <= free and (room is None or kv_bytes <= room)
            row |= {f"resident_{kv}_bytes": resident, f"fits_{kv}": fits}
        rows.append(row)
    return rows


def lines(config: Config, file_size: int, tokenizer_size: int, mapped: int = 0) -> Iterator[str]:
    """table() as lines of text, within 80 columns unless the name of a limit is long."""
    free, limit = available(mapped), _tightest(mapped)
    # indexed by how many of the KV types fit
    verdicts = ("no", f"{KV_TYPES[0]} only", f"not {KV_TYPES[-1]}", "yes")
    yield f"{'':<8}{'KV cache when full':^30}{'all that is resident then':^30}"
    yield f"{'context':>8}" + "".join(f"{kv:>10}" for kv in KV_TYPES) * 2 + "  fits here"
    for row in table(config, file_size, tokenizer_size, mapped):
        sizes = "".join(
            f"{gib(row[f'{what}_{kv}_bytes']):>10}" for what in ("kv", "resident") for kv in KV_TYPES
        )
        verdict = verdicts[sum(bool(row[f"fits_{kv}"]) for kv in KV_TYPES)]
        yield f"{row['context']:>8}{sizes}  {'' if free is None else verdict}".rstrip()
    if free is not None:
        within = f"; {limit.name} allows {gib(limit.size)}" if limit and limit.left <= free else ""
        yield f"available: {gib(free)}{within}" + ("" if file_size <= free else _too_large(file_size))


def _too_large(file_size: int) -> str:
    return f"; the file ({gib(file_size)}) does not fit: weights would be read from disk again and again"


def gib(n_bytes: float) -> str:
    """A size for people: GiB, or MiB below a tenth of one."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 / 10 else f"{n_bytes / 2**20:.1f} MiB"


def in_huge_pages(weights: memoryview) -> memoryview:
    """A copy of `weights` in memory for which the system is asked to use pages of 2 MiB.

    A file is mapped in pages of 4 KiB, and looking up each page costs bandwidth. The copy costs the time to
    read the whole file, and memory that cannot be shared with other processes nor reclaimed.
    ValueError if the system has no such pages or not enough memory.
    """
    size, free = len(weights), available()
    if not hasattr(mmap, "MADV_HUGEPAGE") or "[never]" in _huge_pages_setting():
        raise ValueError("huge pages: this system has none to give")
    if free is not None and size > free:
        raise ValueError(f"huge pages: the weights take {size:,} bytes, {free:,} are available")
    copy = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy.madvise(mmap.MADV_HUGEPAGE)
    for start in range(0, size, COPIED):
        copy[start : start + COPIED] = weights[start : start + COPIED]
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


def _tightest(mapped: int) -> machine.MemoryLimit | None:
    """The limit that leaves the fewest bytes; a limit on address space counts the `mapped` bytes as left."""
    limits = machine.group_memory_limits()
    space = machine.address_space()
    if space is not None:
        limits.append(replace(space, left=space.left + mapped))
    return min(limits, key=lambda limit: limit.left, default=None)
