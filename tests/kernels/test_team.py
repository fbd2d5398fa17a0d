"""A pass does every task once, stage after stage, whichever threads come when; a broken team is noticed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_kernels import COMPILER, KERNELS

SOURCE = Path(__file__).with_name("team.c")
STAGES = 400

# threads planned, threads that take part, how many of them come late, stage before which the pass is stopped
PASSES = {
    "one thread": (1, 1, 0, STAGES),
    "two threads": (2, 2, 0, STAGES),
    "five threads on however many cores": (5, 5, 0, STAGES),
    "one of three planned": (3, 1, 0, STAGES),
    "two come when all is done": (4, 4, 2, STAGES),
    "given up": (3, 3, 0, 200),
    "given up, one late": (3, 3, 1, 200),
}

MUTATIONS = {
    "a stage is left before it is whole": ("< w->n; spins++", "< 0; spins++"),
    "the others' shares are left": ("for (; w->share < threads; w->share++)",
                                    "for (; w->share < 1; w->share++)"),
    "a share is taken twice": ("__atomic_fetch_add(w->counters + 1 + owner, 1,",
                               "__atomic_fetch_add(w->counters + 1 + w->index, 1,"),
    "the count of a stage is kept": ("w->team->stride * w->stages++", "w->team->stride * (w->stages++ > 0)"),
    "a pass begins where the last ended": ("memset(team->counters, 0,", "memset(team->counters, 0, 0 *"),
}  # fmt: skip


def build(directory: Path, header: str) -> Path:
    (directory / "team.h").write_text(header)
    flags = ["-O2", "-std=c11", "-D_POSIX_C_SOURCE=200809L", "-pthread", f"-I{directory}"]
    subprocess.run([COMPILER, *flags, str(SOURCE), "-o", str(directory / "team")], check=True)
    return directory / "team"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("team"), (KERNELS / "team.h").read_text())


def passes(program: Path, numbers: tuple[int, ...]) -> bool:
    """Whether a run of team.c succeeds; a pass that hangs fails."""
    try:
        result = subprocess.run([str(program), *map(str, numbers)], capture_output=True, timeout=10)
    except subprocess.TimeoutExpired:
        return False
    return result.returncode == 0


@pytest.mark.parametrize("case", PASSES)
def test_every_task_is_done_once_after_the_stage_before(program: Path, case: str) -> None:
    assert passes(program, PASSES[case])


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_team_is_noticed(tmp_path: Path, mutation: str) -> None:
    right, wrong = MUTATIONS[mutation]
    header = (KERNELS / "team.h").read_text()
    assert header.count(right) == 1, f"team.h no longer holds {right!r}"
    program = build(tmp_path, header.replace(right, wrong))
    assert not all(passes(program, numbers) for numbers in PASSES.values())
