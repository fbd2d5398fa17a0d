"""docs/FORMAT.md's quantisation rule and tile layout in plain NumPy; the C code must give equal bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TILE_ROWS = 16


def quantize(weights: NDArray[np.float32], group_size: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Codes (rows, columns) and scales (rows, columns / group_size) of float32 weights (rows, columns)."""
    rows, columns = weights.shape
    groups = weights.reshape(rows, columns // group_size, group_size)
    largest = np.abs(groups).max(axis=2)
    scales = _fp16_scales(largest / np.float32(127), largest)
    codes = _codes(groups, scales)
    squares = (codes.astype(np.int64) ** 2).sum(axis=2)
    fitted = _sum(groups * codes) / np.where(squares == 0, 1, squares).astype(np.float32)
    second_scales = _fp16_scales(fitted, largest)  # type: ignore[arg-type]
    second_codes = _codes(groups, second_scales)
    better = _loss(groups, second_scales, second_codes) < _loss(groups, scales, codes)
    scales = np.where(better, second_scales, scales)
    codes = np.where(better[:, :, None], second_codes, codes)
    return codes.reshape(rows, columns).astype(np.int8), scales


def _fp16_scales(scales: NDArray[np.float32], largest: NDArray[np.float32]) -> NDArray[np.float16]:
    """Scales as fp16, rounded, or up where the largest weight would lie over half a step beyond 127."""
    with np.errstate(over="ignore"):  # of next-larger values that are not used
        halves = scales.astype(np.float16)
        too_small = largest > np.float32(127.5) * halves.astype(np.float32)
        return np.where(too_small, np.nextafter(halves, np.float16(np.inf)), halves)


def _codes(groups: NDArray[np.float32], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    divisor = np.where(scales == 0, np.float16(1), scales).astype(np.float32)[:, :, None]
    return np.clip(np.rint(groups / divisor), -127, 127)


def _loss(
    groups: NDArray[np.float32], scales: NDArray[np.float16], codes: NDArray[np.float32]
) -> NDArray[np.float32]:
    with np.errstate(invalid="ignore"):  # an infinite scale loses everything
        off = groups - codes * scales.astype(np.float32)[:, :, None]
    return _sum(off * off)


def _sum(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The kernels' float32 sum over the last axis: 16 lanes, then lane i + lane i + 8, + 4, + 2, + 1."""
    lanes = values.reshape(*values.shape[:-1], -1, 16)
    total = np.zeros(lanes.shape[:-2] + (16,), np.float32)
    for i in range(lanes.shape[-2]):
        total = lanes[..., i, :] + total
    for width in (8, 4, 2, 1):
        total = total[..., :width] + total[..., width : 2 * width]
    return total[..., 0]


def dequantize(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """scale * code, shape (rows, columns)."""
    group_size = codes.shape[1] // scales.shape[1]
    return codes.astype(np.float32) * np.repeat(scales.astype(np.float32), group_size, axis=1)


def tiles(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> bytes:
    """The stored form: per 16 rows, per group, the codes four columns at a time and then the scales."""
    rows, columns = codes.shape
    group_size = columns // scales.shape[1]
    padded_rows = -(-rows // TILE_ROWS) * TILE_ROWS
    codes = np.pad(codes, ((0, padded_rows - rows), (0, 0)))
    scales = np.pad(scales, ((0, padded_rows - rows), (0, 0)))
    stored = []
    for row in range(0, padded_rows, TILE_ROWS):
        for group in range(scales.shape[1]):
            first = group * group_size
            for column in range(first, first + group_size, 4):
                stored.append(codes[row : row + TILE_ROWS, column : column + 4].tobytes())
            stored.append(scales[row : row + TILE_ROWS, group].astype("<f2").tobytes())
    return b"".join(stored)


def untile(
    stored: bytes | memoryview, rows: int, columns: int, group_size: int
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """The codes and scales in the stored form of a (rows, columns) matrix."""
    n_tile_rows, n_groups = -(-rows // TILE_ROWS), columns // group_size
    tile = np.frombuffer(stored, np.uint8).reshape(n_tile_rows, n_groups, TILE_ROWS * (group_size + 2))
    codes = tile[:, :, : TILE_ROWS * group_size].view(np.int8)
    codes = codes.reshape(n_tile_rows, n_groups, group_size // 4, TILE_ROWS, 4).transpose(0, 3, 1, 2, 4)
    scales = np.ascontiguousarray(tile[:, :, TILE_ROWS * group_size :]).view("<f2").transpose(0, 2, 1)
    return codes.reshape(-1, columns)[:rows], scales.reshape(-1, n_groups)[:rows]
