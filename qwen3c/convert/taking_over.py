"""Codes and scales of GGUF blocks that tiles of model.bin hold as they are.

Q4_0 is INT4 with a codebook -8..7, MXFP4 one with twice E2M1's numbers, Q5_0 is INT6, Q8_0 INT8; and each
is also what has more bits. Groups are of 32 weights and scales are fp16 on both sides: nothing is lost. IQ4's
16 codes have 8 bits and those of a codebook 6: each becomes the nearest, and loses less than by a search.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import format
from .gguf_blocks import KINDS, PIECE_WEIGHTS, Decoded, Kind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GROUP_SIZE = 32
_LARGEST = {format.Encoding.INT8: 127, format.Encoding.INT6: 31}


class Held(NamedTuple):
    """Rows of a matrix as codes and scales, which of the rows an encoding holds so, and what that loses."""

    rows: NDArray[np.bool_]  # (n,)
    codes: NDArray[np.int8]  # (n, columns); of INT4 places in the codebook
    scales: NDArray[np.uint16]  # (n, columns / 32), bits of an fp16
    # (n, 3): largest error, sums of squared errors and of squared weights; zeros where nothing is lost
    lost: NDArray[np.float32]
    codebook: tuple[int, ...]  # of INT4


def can_hold(dtype: str, group_size: int, encoding: format.Encoding) -> bool:
    """Whether the encoding has the codes of this kind of block, and groups as large."""
    kind = KINDS.get(dtype)
    if kind is None or not kind.largest or group_size != GROUP_SIZE:
        return False
    return bool(kind.codebook) if encoding is format.Encoding.INT4 else kind.largest <= _LARGEST[encoding]


def hold(data: memoryview, dtype: str, columns: int, encoding: format.Encoding) -> Held:
    """Rows of blocks that the encoding can hold (can_hold), as it would.

    A scale becomes the nearest fp16. A row where it is beyond all of them is not held, unless the codes that
    it is for are zeros.
    """
    import numpy as np

    kind = KINDS[dtype]
    step = max(PIECE_WEIGHTS // columns, 1) * (columns // kind.weights * kind.size)
    pieces = [
        _hold(kind, data[start : start + step], columns, encoding) for start in range(0, len(data), step)
    ]
    rows, codes, scales, lost = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return Held(rows, codes, scales, lost, kind.codebook)


def _is_near(kind: Kind, encoding: format.Encoding) -> bool:
    """Whether codes become others near them."""
    return encoding is format.Encoding.INT4 and kind.unit != 1


def _hold(kind: Kind, data: memoryview, columns: int, encoding: format.Encoding) -> tuple[NDArray[Any], ...]:
    """The arrays of Held of a few rows."""
    import numpy as np

    decoded = kind.decode(kind.blocks(data))
    with np.errstate(over="ignore", invalid="ignore"):
        unit = np.float32(kind.unit if _is_near(kind, encoding) else 1)
        halves = (decoded.scales * unit).astype(np.float16)
    held = np.isfinite(halves)
    if not held.all():
        zero = ~held & ~decoded.codes.any(axis=1) & np.isfinite(decoded.scales)
        halves[zero], held[zero] = 0, True
    lost = np.zeros((len(data) // kind.size * kind.weights // columns, 3), np.float32)
    if _is_near(kind, encoding):
        near = np.take(_table(kind.codes, kind.codebook), decoded.codes.view(np.uint8))
        lost = _lost(decoded, Decoded(near, halves.astype(np.float32)), columns)
    elif not np.array_equal(halves, decoded.scales):
        lost = _lost(decoded, Decoded(decoded.codes, halves.astype(np.float32)), columns)
        lost[lost[:, 1] == 0] = 0
    codes, scales = decoded.codes, halves.view(np.uint16)
    if encoding is format.Encoding.INT4:
        codes = _places(codes, kind.codes)
    elif (scales >> 15).any():  # only INT4 has negative scales
        codes = np.where(scales[:, None] >> 15, -codes, codes)
        scales = scales & np.uint16(0x7FFF)
    groups = columns // GROUP_SIZE
    rows = np.logical_and.reduce(held.reshape(-1, groups), axis=1)
    return rows, codes.reshape(-1, columns), scales.reshape(-1, groups), lost


def _lost(decoded: Decoded, stored: Decoded, columns: int) -> NDArray[np.float32]:
    """Of each row the largest error, the sums of squared errors and of squared weights, (rows, 3)."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        weights = decoded.weights().reshape(-1, columns)
        off = weights - stored.weights().reshape(-1, columns)
        sums = [np.einsum("ij,ij->i", x, x) for x in (off, weights)]
        return np.stack([np.abs(off).max(axis=1), *sums], axis=1)


def _places(codes: NDArray[np.int8], known: tuple[int, ...]) -> NDArray[np.int8]:
    """Where each code is among those known."""
    import numpy as np

    if known == tuple(range(known[0], known[-1] + 1)):
        return codes - np.int8(known[0])
    return np.take(_table(known, tuple(range(len(known)))), codes.view(np.uint8))


def _table(known: tuple[int, ...], values: tuple[int, ...]) -> NDArray[np.int8]:
    """The value of each known code, at the byte it is."""
    import numpy as np

    table = np.zeros(256, np.int8)
    table[[*reversed(known)]] = [*reversed(values)]  # of equal codes the first counts
    return table


def of_one_codebook(held: list[Held | None], n_rows: list[int]) -> list[Held | None]:
    """`held`, the parts of a matrix, without the rows of tile rows that are not held by one codebook.

    n_rows: of each part.
    """
    import numpy as np

    n = sum(n_rows)
    books = np.zeros(format.align(n, format.TILE_ROWS), np.intp)  # of each row; 0 if it is not held
    ends = [*itertools.accumulate(n_rows)]
    known: dict[tuple[int, ...], int] = {}
    for part, end, rows in zip(held, ends, n_rows, strict=True):
        if part is not None:
            books[end - rows : end] = part.rows * known.setdefault(part.codebook, len(known) + 1)
    books[n:] = books[n - 1]
    tile_rows = books.reshape(-1, format.TILE_ROWS)
    whole = (tile_rows == tile_rows[:, :1]).all(axis=1) & (tile_rows[:, 0] > 0)
    whole = np.repeat(whole, format.TILE_ROWS)
    return [
        None if part is None else part._replace(rows=whole[end - rows : end])
        for part, end, rows in zip(held, ends, n_rows, strict=True)
    ]


def clear(tile_rows: NDArray[Any]) -> None:
    """Make all weights zeros, for the rows that pad the last tile row: of INT6 the code 0 is stored as 32."""
    import numpy as np

    tile_rows.view(np.uint8)[:] = 0
    if "crumbs" in (tile_rows["tiles"].dtype.names or ()):
        tile_rows["tiles"]["crumbs"] = 0b10101010


def put(tile_rows: NDArray[Any], encoding: format.Encoding, first: int, held: Held) -> None:
    """Store the held rows; row 0 of them is row `first` of the tile rows.

    tile_rows: (n,) of format.tile_row_type(columns, 32, encoding). Every 4 codes of a row are moved as one.
    """
    import numpy as np

    rows = np.flatnonzero(held.rows)
    which, lanes = np.divmod(first + rows, format.TILE_ROWS)
    tiles = tile_rows["tiles"]
    for name, plane in _planes(held, rows, encoding).items():
        tiles[name].view("<u4")[..., 0][which, :, :, lanes] = plane
    tiles["scales"].view("<u2")[which, :, lanes] = held.scales[rows]
    if encoding is format.Encoding.INT4:
        tile_rows["codebook"][which] = np.array(held.codebook, np.int8)


def _planes(held: Held, rows: NDArray[np.intp], encoding: format.Encoding) -> dict[str, NDArray[np.uint32]]:
    """The planes of format.tile_row_type, (rows, groups, blocks), 4 codes of a row in each number."""
    import numpy as np

    codes = held.codes if len(rows) == len(held.codes) else held.codes[rows]
    if encoding is format.Encoding.INT6:
        codes = codes + np.int8(32)
    fours = np.ascontiguousarray(codes).view("<u4").reshape(len(rows), -1, GROUP_SIZE // 4)
    if encoding is format.Encoding.INT8:
        return {"codes": fours}
    low = fours & np.uint32(0x0F0F0F0F)
    planes = {"nibbles": low[..., ::2] | low[..., 1::2] << np.uint32(4)}
    if encoding is format.Encoding.INT6:
        high = (fours >> np.uint32(4) & np.uint32(0x03030303)).reshape(len(rows), -1, 2, 4)
        planes["crumbs"] = sum(high[..., k] << np.uint32(2 * k) for k in range(1, 4)) | high[..., 0]
    return planes
