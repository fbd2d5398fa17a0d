"""The default thread count respects affinity, cgroup quotas and hyper-threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3c import cpu


def machine(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: set[int]) -> None:
    monkeypatch.setattr(cpu, "_allowed_cpus", lambda: cpus)
    monkeypatch.setattr(cpu, "_read", lambda path: files.get(str(path)))
    monkeypatch.setattr(cpu, "CGROUP_ROOT", Path("/cgroup"))
    monkeypatch.setattr(cpu, "CPU_ROOT", Path("/cpus"))


def siblings(*pairs: str) -> dict[str, str]:
    return {
        f"/cpus/cpu{i}/topology/thread_siblings_list": pair
        for pair in pairs
        for i in map(int, pair.split(","))
    }


def test_hyper_threads_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, siblings("0,4", "1,5", "2,6", "3,7"), set(range(8)))
    assert cpu.default_threads() == 4


def test_affinity_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, siblings("0,4", "1,5", "2,6", "3,7"), {0, 4, 1})
    assert cpu.default_threads() == 2


def test_unknown_topology_counts_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {}, set(range(6)))
    assert cpu.default_threads() == 6


@pytest.mark.parametrize(
    ("quota", "threads"), [("250000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("800000 100000", 8)]
)
def test_a_cgroup_2_quota_is_rounded_down(monkeypatch: pytest.MonkeyPatch, quota: str, threads: int) -> None:
    machine(monkeypatch, {"/proc/self/cgroup": "0::/a/b", "/cgroup/a/cpu.max": quota}, set(range(8)))
    assert cpu.default_threads() == threads


def test_a_quota_at_the_root_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"/proc/self/cgroup": "0::/", "/cgroup/cpu.max": "300000 100000"}, set(range(8)))
    assert cpu.default_threads() == 3


def test_a_cgroup_1_quota_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/self/cgroup": "3:cpu,cpuacct:/box\n1:memory:/box",
        "/cgroup/cpu/box/cpu.cfs_quota_us": "400000",
        "/cgroup/cpu/box/cpu.cfs_period_us": "100000",
        "/cgroup/cpu/cpu.cfs_quota_us": "-1",
    }
    machine(monkeypatch, files, set(range(8)))
    assert cpu.default_threads() == 4


def test_this_machine_gives_at_least_one_thread() -> None:
    assert cpu.default_threads() >= 1
