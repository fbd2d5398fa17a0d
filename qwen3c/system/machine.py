"""What this computer is to this process: its CPU, how many threads it can feed, and what limits memory.

A container, a service or a batch job is a control group with a limit of its own, and so may be each group
above it. Both versions are read where they are usually mounted. A limit that nobody set, or that cannot be
read, is no limit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CPU_ROOT = Path("/sys/devices/system/cpu")
THREAD_VARIABLES = ("QWEN3C_THREADS", "OMP_NUM_THREADS")  # the first that is set decides
MAX_THREADS = 1024


# ----------------------------------------------------------------------------
# Processors


def default_threads() -> int:
    """What the environment asks for, else what this machine can feed, at least 1.

    That is min(CPUs this process may run on, floor of its CPU quota, physical cores).
    ValueError, one line, if the variable that decides holds no number of threads.
    """
    variable = thread_variable()
    if variable is not None:
        return _threads_of(variable)
    allowed = _allowed_cpus()
    limits = [len(allowed), _physical_cores(allowed)]
    quota = cpu_quota()
    if quota is not None:
        limits.append(int(quota))
    return max(1, min(limits))


def thread_variable() -> str | None:
    """The environment variable that decides about the number of threads; None if none is set."""
    return next((name for name in THREAD_VARIABLES if os.environ.get(name, "").strip()), None)


def n_cpus() -> int:
    """CPUs that this process may run on; hyper-threads count."""
    return len(_allowed_cpus())


def cpu_name() -> str:
    """The CPU's name, as its manufacturer writes it."""
    found = re.search(r"^model name\s*:\s*(.+)$", read_text(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    return found[1] if found else "unknown CPU"


def _threads_of(variable: str) -> int:
    value = os.environ[variable]
    first = value.split(",")[0].strip()  # OpenMP allows a number for each level of nesting
    if not (first.isascii() and first.isdigit() and len(first) < 6 and 1 <= int(first) <= MAX_THREADS):
        raise ValueError(f"{variable} is {value[:40]!r}, not a number of threads from 1 to {MAX_THREADS}")
    return int(first)


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: set[int]) -> int:
    """How many cores `cpus` belong to: hyper-threads share their core's arithmetic units and caches."""
    cores = {read_text(CPU_ROOT / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return len(cores)


# ----------------------------------------------------------------------------
# Limits


@dataclass(frozen=True)
class MemoryLimit:
    """One limit on memory: who set it, its size, and how much of it is left, in bytes."""

    name: str
    size: int
    left: int


def group_memory_limits() -> list[MemoryLimit]:
    """The limits on memory of this process's control groups."""
    limits = [_memory_limit(version, directory) for version, directory in _groups("memory")]
    return [limit for limit in limits if limit is not None]


def address_space() -> MemoryLimit | None:
    """The limit of `ulimit -v` (RLIMIT_AS). It counts every mapping, also files and unused stack."""
    pages = re.match(r"\d+", read_text(Path("/proc/self/statm")) or "")
    try:
        import resource

        size = resource.getrlimit(resource.RLIMIT_AS)[0]
        if pages is None or size == resource.RLIM_INFINITY:
            return None
        used = int(pages[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError):
        return None  # Windows has no such limit
    return MemoryLimit("ulimit -v", size, max(size - used, 0))


def cpu_quota() -> float | None:
    """CPUs of the tightest quota on this process's control group or one above it; None if there is none."""
    quotas = []
    for version, directory in _groups("cpu"):
        if version == 2:  # "max 100000" or "150000 100000"
            limit, _, period = (read_text(directory / "cpu.max") or "max").partition(" ")
        else:  # two files, -1 for no limit
            limit = read_text(directory / "cpu.cfs_quota_us") or "-1"
            period = read_text(directory / "cpu.cfs_period_us") or ""
        if limit.isdigit() and int(period or "100000") > 0:
            quotas.append(int(limit) / int(period or "100000"))
    return min(quotas, default=None)


def _memory_limit(version: int, directory: Path) -> MemoryLimit | None:
    """The memory limit of one control group; its page cache, which can be dropped, counts as left."""
    if version == 2:
        bounds = [_number(directory / name) for name in ("memory.max", "memory.high")]
        used, cache = _number(directory / "memory.current"), "file"
    else:
        bounds = [_number(directory / "memory.limit_in_bytes")]
        used, cache = _number(directory / "memory.usage_in_bytes"), "total_cache"
    size = min((bound for bound in bounds if bound is not None), default=None)
    if size is None or used is None:
        return None
    cached = re.search(rf"^{cache} (\d+)", read_text(directory / "memory.stat") or "", re.MULTILINE)
    return MemoryLimit(
        f"control group {directory}", size, max(size - used + int(cached[1] if cached else 0), 0)
    )


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """(version, directory) of this process's control groups for `controller` and of all groups above them."""
    for line in (read_text(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        inside = Path(path.lstrip("/"))
        if controllers == "":
            root, version = CGROUP_ROOT, 2
        elif controller in controllers.split(","):
            root, version = CGROUP_ROOT / controller, 1
        else:
            continue
        # in a container the path may be the host's, but only the group at the root is mounted
        for group in dict.fromkeys([inside, *inside.parents]):
            yield version, root / group


def _number(path: Path) -> int | None:
    """The number in a file; None where it says "max" or cannot be read."""
    text = read_text(path) or ""
    return int(text) if text.isdigit() else None


def read_text(path: Path) -> str | None:
    """What a file of the system says, without the blanks around it; None where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
