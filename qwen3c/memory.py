"""How much memory there is, and what context fits into it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .format import Config

DEFAULT_CONTEXT = 8192  # enough for a long conversation; longer ones are asked for
CGROUP = Path("/sys/fs/cgroup")


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
