"""The default thread count respects the environment, affinity, cgroup quotas and hyper-threads.

python -m pytest tests/system/test_machine.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3c.system import machine


def on_machine(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: set[int]) -> None:
    monkeypatch.setattr(machine, "_allowed_cpus", lambda: cpus)
    monkeypatch.setattr(machine, "read_text", lambda path: files.get(str(path)))
    monkeypatch.setattr(machine, "CGROUP_ROOT", Path("/cgroup"))
    monkeypatch.setattr(machine, "CPU_ROOT", Path("/cpus"))
    for variable in machine.THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def siblings(*pairs: str) -> dict[str, str]:
    return {
        f"/cpus/cpu{i}/topology/thread_siblings_list": pair
        for pair in pairs
        for i in map(int, pair.split(","))
    }


def test_hyper_threads_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, siblings("0,4", "1,5", "2,6", "3,7"), set(range(8)))
    assert machine.default_threads() == 4


def test_affinity_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, siblings("0,4", "1,5", "2,6", "3,7"), {0, 4, 1})
    assert machine.default_threads() == 2


def test_unknown_topology_counts_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, {}, set(range(6)))
    assert machine.default_threads() == 6


@pytest.mark.parametrize(
    ("quota", "threads"), [("250000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("800000 100000", 8)]
)
def test_a_cgroup_2_quota_is_rounded_down(monkeypatch: pytest.MonkeyPatch, quota: str, threads: int) -> None:
    on_machine(monkeypatch, {"/proc/self/cgroup": "0::/a/b", "/cgroup/a/cpu.max": quota}, set(range(8)))
    assert machine.default_threads() == threads


def test_a_quota_at_the_root_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, {"/proc/self/cgroup": "0::/", "/cgroup/cpu.max": "300000 100000"}, set(range(8)))
    assert machine.default_threads() == 3


def test_a_cgroup_1_quota_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/self/cgroup": "3:cpu,cpuacct:/box\n1:memory:/box",
        "/cgroup/cpu/box/cpu.cfs_quota_us": "400000",
        "/cgroup/cpu/box/cpu.cfs_period_us": "100000",
        "/cgroup/cpu/cpu.cfs_quota_us": "-1",
    }
    on_machine(monkeypatch, files, set(range(8)))
    assert machine.default_threads() == 4


@pytest.mark.parametrize(
    ("environment", "threads", "variable"),
    [
        ({}, 8, None),
        ({"OMP_NUM_THREADS": "3"}, 3, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "5,2"}, 5, "OMP_NUM_THREADS"),  # a number for each level of nesting
        ({"QWEN3C_THREADS": "2", "OMP_NUM_THREADS": "3"}, 2, "QWEN3C_THREADS"),
        ({"QWEN3C_THREADS": " 20 "}, 20, "QWEN3C_THREADS"),  # more than there are: it was asked for
        ({"QWEN3C_THREADS": "", "OMP_NUM_THREADS": ""}, 8, None),
    ],
)
def test_the_environment_decides_first(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], threads: int, variable: str | None
) -> None:
    on_machine(monkeypatch, {}, set(range(8)))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (machine.default_threads(), machine.thread_variable()) == (threads, variable)


@pytest.mark.parametrize("value", ["many", "0", "-1", "1025", "2.5", "1e9", "9" * 5000, ",", "²"])
@pytest.mark.parametrize("variable", ["QWEN3C_THREADS", "OMP_NUM_THREADS"])
def test_a_variable_that_holds_no_number_of_threads_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    on_machine(monkeypatch, {}, {0})
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError) as caught:
        machine.default_threads()
    said = str(caught.value)
    assert said.startswith(f"{variable} is ") and "from 1 to 1024" in said and len(said) < 120


def test_this_machine_gives_at_least_one_thread() -> None:
    assert machine.default_threads() >= 1
