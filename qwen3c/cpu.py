"""Which CPU this is, and how many threads this process should use: what it may use and what the cores can feed."""

from __future__ import annotations

import os
import re
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CPU_ROOT = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """min(CPUs this process may run on, floor of the cgroup CPU quota, physical cores), at least 1."""
    allowed = _allowed_cpus()
    limits = [len(allowed), _physical_cores(allowed)]
    quota = _cgroup_quota()
    if quota is not None:
        limits.append(int(quota))
    return max(1, min(limits))


def cpu_name() -> str:
    """As the manufacturer calls it."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    return found[1] if found else "unknown CPU"


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: set[int]) -> int:
    """Hyper-threads of one core share its arithmetic and its memory port: count them once."""
    cores = {_read(CPU_ROOT / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return len(cores)


def _cgroup_quota() -> float | None:
    """CPUs of the tightest quota on the way from this process's cgroup to the root; None if there is none."""
    quotas = []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2: "max 100000" or "150000 100000"
            for directory in _up_to_root(CGROUP_ROOT, path):
                quotas.append(_quota(*(_read(directory / "cpu.max") or "max 1").split()))
        elif "cpu" in controllers.split(","):  # version 1: two files, -1 for no limit
            for directory in _up_to_root(CGROUP_ROOT / "cpu", path):
                limit, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
                quotas.append(_quota(limit or "-1", period or "1"))
    return min((q for q in quotas if q is not None), default=None)


def _up_to_root(root: Path, path: str) -> list[Path]:
    inside = Path(path.lstrip("/"))
    return [root / inside, *(root / parent for parent in inside.parents)] if inside.parts else [root]


def _quota(limit: str, period: str = "100000") -> float | None:
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) > 0 else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
