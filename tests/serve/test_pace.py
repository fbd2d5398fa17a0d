"""A pass with prompts takes about the seconds it may, and every prompt gets its share."""

from __future__ import annotations

import random

import pytest

from qwen3c.serve.pace import ALONE, FEWEST, MOST, Pace, shares

QUIET = 0.02  # seconds of a pass with replies alone


def passes(
    pace: Pace, prompts: list[int], n_decoding: int, slope: float, noise: float = 0.0
) -> list[tuple[float, int]]:
    """(seconds, rows) of each pass that reads prompts of these lengths, on a machine of a simulated clock.

    A row costs 1 ms and `slope` seconds more for each position before it. noise: how far a pass is off.
    """
    draw, found = random.Random(3), []
    left = [range(n) for n in prompts]
    while any(left):
        left = [one for one in left if one]
        given = pace.shares(left, n_decoding)
        read = [one[:n] for one, n in zip(left, given, strict=True) if n]
        seconds = (QUIET if n_decoding else 0) + sum(0.001 + slope * i for one in read for i in one)
        seconds *= 1 + draw.uniform(-noise, noise)
        pace.learn(seconds, read, n_decoding)
        found.append((seconds, sum(given)))
        left = [one[n:] for one, n in zip(left, given, strict=True)]
    return found


@pytest.mark.parametrize("gap", [0.05, 0.1, 0.2, 1.0])
@pytest.mark.parametrize("slope", [0.0, 2e-7, 2e-6])
def test_the_gap_is_kept_once_a_pass_has_shown_what_rows_cost(gap: float, slope: float) -> None:
    """At the end of 8,000 tokens, on the steepest of these machines, a row costs 17 times the first one's."""
    pace = Pace(gap)
    pace.learn(QUIET, [], 4)
    late = [seconds for seconds, rows in passes(pace, [8000], 4, slope)[1:] if rows > FEWEST]
    assert all(seconds <= 1.02 * gap for seconds in late)
    assert gap > 0.9 or max(late) > 0.7 * gap


@pytest.mark.parametrize("slope", [0.0, 2e-7, 2e-6])
def test_the_gap_is_kept_with_several_prompts_at_several_depths_on_a_noisy_machine(slope: float) -> None:
    pace = Pace(0.2)
    pace.learn(QUIET, [], 4)
    for prompts in ([8000], [300, 8000], [8000, 20, 4000, 300], [1000]):
        found = passes(pace, prompts, 4, slope, noise=0.05)
        assert all(seconds <= 1.25 * 0.2 for seconds, _ in found[1:])


def test_passes_are_no_shorter_than_they_must_be() -> None:
    """A prompt takes about the time that its rows need and its replies are owed, at every depth."""
    pace = Pace(0.2)
    pace.learn(QUIET, [], 4)
    found = passes(pace, [8000], 4, 2e-6)
    rows = 8000 * 0.001 + 2e-6 * 8000 * 7999 / 2
    fewest = rows / (0.9 * 0.2 - QUIET)  # passes, if each were as long as it may be
    assert len(found) < 1.35 * fewest


def test_nobody_waits_so_a_pass_is_long() -> None:
    pace = Pace(0.1)
    found = passes(pace, [9000], 0, 0.0)
    assert found[5][1] == MOST and pace.target(0) == ALONE


def test_without_a_gap_the_target_follows_the_quiet_pass() -> None:
    pace = Pace()
    pace.learn(0.05, [], 1)
    assert pace.target(1) == pytest.approx(0.2)
    pace = Pace()
    pace.learn(0.001, [], 1)
    assert pace.target(1) == pytest.approx(0.1)


def test_a_prompt_always_moves() -> None:
    pace = Pace(0.01)
    pace.learn(1.0, [], 64)
    pace.learn(5.0, [range(16)], 64)
    assert pace.shares([range(16, 900)], 64) == [FEWEST]


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
