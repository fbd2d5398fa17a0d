"""A pass with prompts takes about the seconds it may, and every prompt gets its share."""

from __future__ import annotations

import random

import pytest

from qwen3c.serve.pace import ALONE, FEWEST, MOST, Pace, shares


@pytest.mark.parametrize("gap", [0.05, 0.1, 0.2, 1.0])
@pytest.mark.parametrize("depth_cost", [0.0, 2e-7])
def test_the_gap_is_kept_once_a_pass_has_shown_what_rows_cost(gap: float, depth_cost: float) -> None:
    """A machine on which a row costs 1 ms, and more the deeper it is; a pass of replies 20 ms."""
    pace, depth, late = Pace(gap), 0, []
    pace.learn(0.02, 0, 4)
    for i in range(200):
        rows = pace.rows(4)
        seconds = 0.02 + rows * (0.001 + depth_cost * depth)
        pace.learn(seconds, rows, 4)
        depth += rows
        if i > 3 and rows > FEWEST:
            late.append(seconds)
    assert all(seconds <= 1.05 * gap for seconds in late)
    assert gap < 0.06 or rows == MOST or max(late) > 0.7 * gap


def test_nobody_waits_so_a_pass_is_long() -> None:
    pace = Pace(0.1)
    for _ in range(20):
        rows = pace.rows(0)
        pace.learn(rows * 0.001, rows, 0)
    assert pace.rows(0) == MOST and pace.target(0) == ALONE


def test_without_a_gap_the_target_follows_the_quiet_pass() -> None:
    pace = Pace()
    pace.learn(0.05, 0, 1)
    assert pace.target(1) == pytest.approx(0.2)
    pace = Pace()
    pace.learn(0.001, 0, 1)
    assert pace.target(1) == pytest.approx(0.1)


def test_a_prompt_always_moves() -> None:
    pace = Pace(0.01)
    pace.learn(1.0, 0, 64)
    pace.learn(5.0, 16, 64)
    assert pace.rows(64) == FEWEST


def test_the_oldest_and_the_shortest_share_and_nothing_is_wasted() -> None:
    assert shares([], 64) == []
    assert shares([500], 64) == [64]
    assert shares([500, 8000, 20], 64) == [44, 0, 20]
    assert shares([500, 8000, 400], 64) == [32, 0, 32]
    assert shares([3, 8000], 64) == [3, 61]
    draw = random.Random(2)
    for _ in range(500):
        left = [draw.randrange(1, 300) for _ in range(draw.randrange(1, 8))]
        rows = draw.randrange(1, 257)
        given = shares(left, rows)
        assert sum(given) == min(rows, sum(left))
        assert all(0 <= n <= most for n, most in zip(given, left, strict=True))
        assert given[0] or rows == 1
