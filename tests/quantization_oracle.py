"""docs/FORMAT.md's quantisation rule and tile layout in plain NumPy; the C code must give equal bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32] | np.float32
TILE_ROWS = 16
CODEBOOK = np.array([-31, -25, -20, -16, -12, -9, -5, -2, 0, 3, 6, 9, 13, 17, 22, 28], np.int8)


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


def quantize_fitted(
    weights: NDArray[np.float32],
    group_size: int,
    encoding: str,
    importance: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Codes and scales of int4 or int6, as `quantize` gives them of int8."""
    rows, columns = weights.shape
    groups = weights.reshape(rows, -1, group_size)
    if importance is None:
        importance = np.ones(columns, np.float32)
    weight = np.broadcast_to(importance.reshape(1, -1, group_size), groups.shape)
    best_scales = np.zeros(groups.shape[:2], np.float16)
    best_lost = np.full(groups.shape[:2], np.inf, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # of scales that are not taken
        for first in _first_scales(groups, encoding):
            wanted = first
            for _ in range(2):
                scales = wanted.astype(np.float16)
                codes = _fitted_codes(groups, scales, encoding)
                lost, wanted = _lost_and_refitted(groups, codes, scales, weight)
                better = lost < best_lost
                best_scales = np.where(better, scales, best_scales)
                best_lost = np.where(better, lost, best_lost)
    codes = _fitted_codes(groups, best_scales, encoding)
    return codes.reshape(rows, columns).astype(np.int8), best_scales


def _first_scales(groups: NDArray[np.float32], encoding: str) -> Iterator[NDArray[np.float32]]:
    at = np.abs(groups).argmax(axis=2)[:, :, None]
    extreme = np.take_along_axis(groups, at, axis=2)[:, :, 0]
    ends, factors = ((28, -31), (0.9, 1.0, 1.1)) if encoding == "int4" else ((31,), (0.95, 1.0, 1.05))
    extreme = extreme if encoding == "int4" else np.abs(extreme)
    for end, factor in itertools.product(ends, factors):
        yield extreme / np.float32(end) * np.float32(factor)


def _fitted_codes(
    groups: NDArray[np.float32], scales: NDArray[np.float16], encoding: str
) -> NDArray[np.float32]:
    scale = scales.astype(np.float32)
    usable = (scale != 0) & np.isfinite(scale)
    inverse = np.where(usable, np.float32(1) / np.where(usable, scale, np.float32(1)), np.float32(0))
    x = groups * inverse[:, :, None]
    if encoding == "int6":
        return np.rint(np.clip(x, -31, 31))
    place = np.rint(np.clip(_fma(x, np.float32(2), np.float32(-0.5)), -63, 63)).astype(np.int64)
    middles = 2 * np.arange(-64, 64) + 1  # in quarters, of the halves that a place stands for
    nearest = np.abs(4 * CODEBOOK.astype(np.int64) - middles[:, None]).argmin(axis=1)
    return CODEBOOK[nearest[place + 64]].astype(np.float32)


def _lost_and_refitted(
    groups: NDArray[np.float32], codes: NDArray[np.float32], scales: NDArray[np.float16],
    weight: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
    """The sum of weighted squared errors, and the scale that makes it least for these codes."""
    lost, products, squares = (np.zeros(groups.shape[:2], np.float32) for _ in range(3))
    for c in range(groups.shape[2]):
        w, code, importance = groups[:, :, c], codes[:, :, c], weight[:, :, c]
        off = w - scales.astype(np.float32) * code
        lost = _fma(importance * off, off, lost)
        products = _fma(importance * code, w, products)
        squares = _fma(importance * code, code, squares)
    some = squares > 0
    return lost, np.where(some, products / np.where(some, squares, np.float32(1)), np.float32(0))


def _fma(a: NDArray[np.float32], b: Floats, c: Floats) -> NDArray[np.float32]:
    """a b + c, rounded once (the product of two float32 is exact in float64)."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def dequantize(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """scale * code, shape (rows, columns)."""
    group_size = codes.shape[1] // scales.shape[1]
    return codes.astype(np.float32) * np.repeat(scales.astype(np.float32), group_size, axis=1)


def tiles(codes: NDArray[np.int8], scales: NDArray[np.float16], encoding: str = "int8") -> bytes:
    """The stored form: per 16 rows the codebook if it is int4, then per group the codes and the scales."""
    rows, columns = codes.shape
    group_size = columns // scales.shape[1]
    padded_rows = -(-rows // TILE_ROWS) * TILE_ROWS
    codes = np.pad(codes, ((0, padded_rows - rows), (0, 0)))
    scales = np.pad(scales, ((0, padded_rows - rows), (0, 0)))
    stored = []
    for row in range(0, padded_rows, TILE_ROWS):
        if encoding == "int4":
            stored.append(CODEBOOK.tobytes() + bytes(16))
        for group in range(scales.shape[1]):
            tile = codes[row : row + TILE_ROWS, group * group_size : (group + 1) * group_size]
            blocks = [tile[:, column : column + 4] for column in range(0, group_size, 4)]
            stored.append(PLANES[encoding](blocks))
            stored.append(scales[row : row + TILE_ROWS, group].astype("<f2").tobytes())
    return b"".join(stored)


def _nibbles(blocks: list[NDArray[np.int64]]) -> bytes:
    pairs = zip(blocks[::2], blocks[1::2], strict=True)
    return b"".join((low % 16 + high % 16 * 16).astype(np.uint8).tobytes() for low, high in pairs)


def _int4(blocks: list[NDArray[np.int8]]) -> bytes:
    return _nibbles([np.searchsorted(CODEBOOK, block) for block in blocks])


def _int6(blocks: list[NDArray[np.int8]]) -> bytes:
    offset = [block.astype(np.int64) + 32 for block in blocks]
    high = [block // 16 for block in offset]
    crumbs = [sum(high[i + k] * 4**k for k in range(4)) for i in range(0, len(high), 4)]
    return _nibbles(offset) + b"".join(np.asarray(c, np.uint8).tobytes() for c in crumbs)


PLANES = {"int8": lambda blocks: b"".join(block.tobytes() for block in blocks), "int4": _int4, "int6": _int6}


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
