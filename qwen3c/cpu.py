"""Which CPU this is, and how many threads this process should use: what it may use and what the cores can feed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .machine import cpu_quota, read_text

CPU_ROOT = Path("/sys/devices/system/cpu")
THREAD_VARIABLES = ("QWEN3C_THREADS", "OMP_NUM_THREADS")  # the first that is set decides
MAX_THREADS = 1024


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
    """As the manufacturer calls it."""
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
    """Hyper-threads of one core share its arithmetic and its memory port: count them once."""
    cores = {read_text(CPU_ROOT / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return len(cores)
