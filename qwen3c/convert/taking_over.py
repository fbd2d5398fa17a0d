"""Codes and scales of GGUF blocks that a tile of model.bin holds as they are, with nothing lost.

Q4_0 is INT4 with a codebook -8..7, MXFP4 one with twice E2M1's numbers, Q5_0 is INT6, Q8_0 INT8; and each
is also what has more bits. Groups are of 32 weights and scales are fp16 on both sides.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import format
from .blocks import KINDS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GROUP_SIZE = 32
_LARGEST = {format.Encoding.INT8: 127, format.Encoding.INT6: 31}


class Held(NamedTuple):
    """Rows of a matrix as codes and scales, and which of the rows an encoding holds so."""

    rows: NDArray[np.bool_]  # (n,)
    codes: NDArray[np.int8]  # (n, columns)
    scales: NDArray[np.uint16]  # (n, columns / 32), bits of an fp16
    codebook: tuple[int, ...]  # of INT4


def can_hold(dtype: str, group_size: int, encoding: format.Encoding) -> bool:
    """Whether the encoding has the codes of this kind of block, and groups as large."""
    kind = KINDS.get(dtype)
    if kind is None or not kind.largest or group_size != GROUP_SIZE:
        return False
    return bool(kind.codebook) if encoding is format.Encoding.INT4 else kind.largest <= _LARGEST[encoding]


def hold(data: memoryview, dtype: str, columns: int, encoding: format.Encoding) -> Held:
    """Rows of blocks that the encoding can hold (can_hold), as it would.

    A row with a scale that is no finite fp16 is not held, unless the codes it is for are all zero. Where a
    scale must not be negative, it and its codes change sign.
    """
    import numpy as np

    kind = KINDS[dtype]
    decoded = kind.decode(kind.blocks(data))
    with np.errstate(over="ignore"):
        halves = decoded.scales.astype(np.float16)
    held = (halves.astype(np.float32) == decoded.scales) & np.isfinite(decoded.scales)
    if not held.all():
        zero = ~held & ~decoded.codes.any(axis=1) & np.isfinite(decoded.scales)
        halves[zero], held[zero] = 0, True
    scales, codes = halves.view(np.uint16), decoded.codes
    if encoding is not format.Encoding.INT4:
        negative = scales >> 15 != 0
        if negative.any():
            codes = np.where(negative[:, None], -codes, codes)
        scales = scales & np.uint16(0x7FFF)
    groups = columns // GROUP_SIZE
    rows = held.reshape(-1, groups).all(axis=1)
    return Held(rows, codes.reshape(-1, columns), scales.reshape(-1, groups), kind.codebook)


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


def _planes(
    held: Held, rows: NDArray[np.intp], encoding: format.Encoding
) -> dict[str, NDArray[np.uint32]]:
    """The planes of format.tile_row_type, (rows, groups, blocks), 4 codes of a row in each number."""
    import numpy as np

    codes = held.codes if len(rows) == len(held.codes) else held.codes[rows]
    if encoding is format.Encoding.INT4:
        codes = _places(codes, held.codebook)
    elif encoding is format.Encoding.INT6:
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


def _places(codes: NDArray[np.int8], codebook: tuple[int, ...]) -> NDArray[np.int8]:
    """Where each code is in the codebook."""
    import numpy as np

    if codebook == tuple(range(codebook[0], codebook[-1] + 1)):
        return codes - np.int8(codebook[0])
    places = np.zeros(256, np.int8)
    for place, code in reversed([*enumerate(codebook)]):
        places[code] = place
    return np.take(places, codes.view(np.uint8))
