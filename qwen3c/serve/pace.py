"""How many rows of prompts a pass takes, and whose: a budget of time, not of tokens.

A prompt that is read delays the next token of every reply on its way. So a pass gets the rows that fit into a
target of seconds, as the passes before have shown:

    seconds of a pass = quiet (one row of every reply) + the sum over rows of (base + slope * position)

The slope is attention's: a row deep in a long prompt can cost many times what the first one did.

Half of the rows go to the oldest prompt and half to the one with the fewest tokens left, so that a short
question is not kept waiting by a long document and no document starves.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST, STEP = 256, 16  # rows of prompts in a pass; MOST is what the engine computes at once
FEWEST = 4  # however long that takes: a prompt always moves
SIZES = (*range(MOST, STEP - 1, -STEP), 12, 8, FEWEST)
FIRST, FIRST_ALONE = 16, 64  # before a pass has shown what a row costs
ALONE = 0.5  # seconds of a pass when nobody waits for a next token: how soon a cancel comes
SHORTEST, QUIET_STEPS = (
    0.1,
    4,
)  # without --max-gap: the target is so many quiet passes, at least SHORTEST seconds
MARGIN = 0.9  # of the target that is planned for; the rest is for what passes cost more than foreseen
MEMORY = 0.3  # weight of the newest pass in the average of quiet ones
KEPT = 0.85  # of the weight of earlier passes with prompts, when one more has come
RIDGE = 1e-3  # how much of their scatter positions must have before they are believed to matter


class Rows:
    """What rows of prompts cost, by their positions: a line through the latest passes, by least squares."""

    def __init__(self) -> None:
        self._rows_rows = self._rows_depth = self._depth_depth = 0.0  # sums of products over passes, where
        self._rows_seconds = self._depth_seconds = 0.0  # depth is the sum of the positions of all rows
        self._base = self._slope = 0.0

    @property
    def known(self) -> bool:
        """Whether a pass has shown anything."""
        return self._rows_rows > 0

    def seconds(self, read: Sequence[range]) -> float:
        """What rows at these positions will take together."""
        return self._base * sum(map(len, read)) + self._slope * _depth(read)

    def learn(self, seconds: float, read: Sequence[range]) -> None:
        """Rows at these positions took so long."""
        rows, depth = sum(map(len, read)), _depth(read)
        self._rows_rows = KEPT * self._rows_rows + rows * rows
        self._rows_depth = KEPT * self._rows_depth + rows * depth
        self._depth_depth = KEPT * self._depth_depth + depth * depth
        self._rows_seconds = KEPT * self._rows_seconds + rows * seconds
        self._depth_seconds = KEPT * self._depth_seconds + depth * seconds
        depth_depth = (1 + RIDGE) * self._depth_depth
        area = self._rows_rows * depth_depth - self._rows_depth**2
        self._slope = 0.0
        if area > 0:
            found = self._rows_rows * self._depth_seconds - self._rows_depth * self._rows_seconds
            # neither of the two can be negative: where the line says so, the other one has it all
            self._slope = min(max(found / area, 0.0), self._depth_seconds / self._depth_depth)
        self._base = max(self._rows_seconds - self._slope * self._rows_depth, 0.0) / self._rows_rows


def _depth(read: Sequence[range]) -> float:
    """The sum of the positions."""
    return sum(len(one) * (one.start + one.stop - 1) / 2 for one in read)


class Pace:
    """max_gap: seconds between two tokens of a reply while prompts are read; None to let quiet passes say
    it.
    """

    def __init__(self, max_gap: float | None = None) -> None:
        self._max_gap = max_gap
        self._quiet: float | None = None  # seconds of a pass without prompts, for each reply in it
        self._row = Rows()

    def target(self, n_decoding: int) -> float:
        """Seconds that a pass with prompts may take."""
        if n_decoding == 0:
            return ALONE
        if self._max_gap is not None:
            return self._max_gap * MARGIN
        quiet = self._quiet if self._quiet is not None else SHORTEST / QUIET_STEPS
        return min(max(QUIET_STEPS * quiet, SHORTEST), ALONE)

    def shares(self, left: Sequence[range], n_decoding: int) -> Sequence[int]:
        """Rows for each prompt in the next pass; left: the positions that each has still to read, the oldest
        first.
        """
        lengths = [len(one) for one in left]
        if not self._row.known:
            return shares(lengths, FIRST if n_decoding else FIRST_ALONE)
        room = self.target(n_decoding) - ((self._quiet or 0.0) if n_decoding else 0.0)
        given: list[int] = []
        for rows in SIZES:
            given = shares(lengths, rows)
            if self._row.seconds([one[:n] for one, n in zip(left, given, strict=True)]) <= room:
                break
        return given

    def learn(self, seconds: float, read: Sequence[range], n_decoding: int) -> None:
        """A pass of rows of prompts at these positions and one row of each of `n_decoding` replies took so
        long.
        """
        if not read:
            self._quiet = _average(self._quiet, seconds)
        else:
            quiet = min(self._quiet or 0.0, seconds) if n_decoding else 0.0
            self._row.learn(max(seconds - quiet, seconds / 10), read)


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
