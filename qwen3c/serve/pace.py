"""How many rows of prompts a pass takes, and whose: a budget of time, not of tokens.

A prompt that is read delays the next token of every reply on its way. So a pass gets the rows that fit into a
target of seconds, as the passes before have shown:

    seconds of a pass = quiet (one row of every reply) + rows * seconds per row

Half of the rows go to the oldest prompt and half to the one with the fewest tokens left, so that a short
question is not kept waiting by a long document and no document starves.
"""

from __future__ import annotations

from collections.abc import Sequence

FEWEST, MOST, STEP = 16, 256, 16  # rows of prompts in a pass; MOST is what the engine computes at once
ALONE = 0.5  # seconds of a pass when nobody waits for a next token: how soon a cancel comes
SHORTEST, QUIET_STEPS = (
    0.1,
    4,
)  # without --max-gap: the target is so many quiet passes, at least SHORTEST seconds
MARGIN = 0.9  # of the target that is planned for; the rest is for what passes cost more than foreseen
MEMORY = 0.3  # weight of the newest pass in the averages


class Pace:
    """max_gap: seconds between two tokens of a reply while prompts are read; None to let quiet passes say
    it.
    """

    def __init__(self, max_gap: float | None = None) -> None:
        self._max_gap = max_gap
        self._quiet: float | None = None  # seconds of a pass without prompts, for each reply in it
        self._row: float | None = None  # seconds of a row of a prompt, where prompts stand now

    def target(self, n_decoding: int) -> float:
        """Seconds that a pass with prompts may take."""
        if n_decoding == 0:
            return ALONE
        if self._max_gap is not None:
            return self._max_gap * MARGIN
        quiet = self._quiet if self._quiet is not None else SHORTEST / QUIET_STEPS
        return min(max(QUIET_STEPS * quiet, SHORTEST), ALONE)

    def shares(self, left: Sequence[int], n_decoding: int) -> Sequence[int]:
        """Rows for each prompt in the next pass; left: tokens that each has still to read, the oldest
        first.
        """
        return shares(left, self.rows(n_decoding))

    def rows(self, n_decoding: int) -> int:
        """How many rows of prompts the next pass takes."""
        if self._row is None:
            return FEWEST if n_decoding else 64
        quiet = (self._quiet or 0.0) if n_decoding else 0.0
        fitting = (self.target(n_decoding) - quiet) / self._row
        return int(min(max(fitting // STEP * STEP, FEWEST), MOST))

    def learn(self, seconds: float, n_rows: int, n_decoding: int) -> None:
        """A pass of `n_rows` rows of prompts and one row of each of `n_decoding` replies took so long."""
        if n_rows == 0:
            self._quiet = _average(self._quiet, seconds)
        else:
            quiet = min(self._quiet or 0.0, seconds) if n_decoding else 0.0
            self._row = _average(self._row, max(seconds - quiet, seconds / 10) / n_rows)


def shares(left: Sequence[int], rows: int) -> list[int]:
    """How many of `rows` each prompt gets, the oldest first; left: the tokens that each has still to read."""
    given = [0] * len(left)
    if not left:
        return given
    shortest = min(range(len(left)), key=lambda i: left[i])
    given[shortest] = min(left[shortest], rows // 2 if shortest else rows)
    room = rows - given[shortest]
    for i, n in enumerate(left):
        if i != shortest:
            given[i] = min(n, room)
            room -= given[i]
    given[shortest] += min(left[shortest] - given[shortest], room)
    return given


def _average(before: float | None, newest: float) -> float:
    return newest if before is None else before + MEMORY * (newest - before)
