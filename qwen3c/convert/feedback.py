"""Codes of INT4 and INT6 that know of each other: what rounding one column loses, later columns make good.

    inputs     H = X^T X of the rows X that the matrix will be multiplied with
    scales     as without data (weighted by the mean squares of X they lose a little more)
    codes      column after column, those of the largest inputs first; each is rounded after it has taken over
               what the columns before it lost

This is GPTQ (Frantar et al. 2022) in the form of LDLQ (Chee et al. 2023), which needs no inverse of H: with
H = A D A^T, A unit upper triangular, the column k of W is rounded at W_k + (W - Q)_<k A_<k,k. Then the loss
tr((W - Q) H (W - Q)^T) is sum_k D_k |what rounding column k lost|^2. Scales stand still ("static groups"), so
that the order of the columns is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..format import TILE_ROWS, Encoding, codes_and_scales

Array = NDArray[np.float32]

# Of the mean of the diagonal of H, added to it: columns that the text hardly used stay put. The fewer rows H
# has beside columns, the more, for few rows say little of how columns go together: an expert that saw next to
# nothing is quantised as without data. Half was the best of what was tried (docs/FIDELITY.md)
DAMPING, FEW_ROWS = 0.01, 0.5


class Inputs:
    """What a matrix is multiplied with: H, the sum of x^T x over `rows` rows x (columns,).

    whole: whether all of H is kept, or its diagonal alone.
    """

    def __init__(self, columns: int, whole: bool) -> None:
        self.rows = 0
        self.squares = np.zeros(columns, np.float32)
        self.hessian = np.zeros((columns, columns), np.float32) if whole else None

    def add(self, x: Array) -> None:
        """Count the rows of x (n, columns)."""
        self.rows += len(x)
        if self.hessian is None:
            self.squares += np.einsum("ij,ij->j", x, x)
        else:
            self.hessian += x.T @ x
            self.squares = self.hessian.diagonal().copy()

    @property
    def damping(self) -> np.float32:
        """What is added to the diagonal of H."""
        mean = float(self.squares.mean()) or 1.0
        return np.float32((DAMPING + FEW_ROWS * len(self.squares) / self.rows) * mean)

    @property
    def importance(self) -> Array:
        """The mean square of each column, damped as H is."""
        return np.asarray((self.squares + self.damping) / self.rows, np.float32)


@dataclass(frozen=True)
class Factor:
    """H = A D A^T over the columns in `order`; upper: A (columns, columns)."""

    order: NDArray[np.intp]
    upper: Array


def factor(inputs: Inputs) -> Factor:
    """H, damped, taken apart; more of it is damped where rounding has made it indefinite."""
    assert inputs.hessian is not None
    order = np.argsort(-inputs.squares, kind="stable")
    # the Cholesky factor of H with its columns turned round is A sqrt(D) turned round
    turned = inputs.hessian[np.ix_(order[::-1], order[::-1])]
    damping = inputs.damping
    while True:
        turned[np.diag_indices_from(turned)] = inputs.squares[order[::-1]] + damping
        try:
            lower = np.linalg.cholesky(turned)
            break
        except np.linalg.LinAlgError:
            damping *= 10
    upper = np.ascontiguousarray(lower[::-1, ::-1])
    upper /= upper.diagonal()
    return Factor(order, upper)


def round_with_feedback(
    weights: Array, tile_rows: NDArray[Any], encoding: Encoding, factor: Factor
) -> tuple[float, float]:
    """Put the codes of weights (rows, columns) into `tile_rows`, whose scales stay as they are.

    Columns are halved again and again, so that nearly all feedback is products of large matrices.

    tile_rows: ceil(rows / 16) of format.tile_row_type. Returns the largest |w - stored| and the sum of
    (w - stored)^2.
    """
    _, scales = codes_and_scales(tile_rows)  # (padded rows, groups)
    padded = np.zeros((len(scales), weights.shape[1]), np.float32)
    padded[: len(weights)] = weights
    with np.errstate(divide="ignore"):
        inverses = np.where(scales == 0, np.float32(0), 1 / scales)
    size = weights.shape[1] // scales.shape[1]
    by_group = np.ascontiguousarray(scales.T), np.ascontiguousarray(inverses.T)
    values, table = _codes(tile_rows, encoding)
    wanted = padded.T[factor.order]  # a column is a row here, so that it lies together
    targets, lost = wanted.copy(), np.empty_like(wanted)
    stored = np.empty(wanted.shape, np.uint8)

    def round_columns(first: int, last: int) -> None:
        """Columns first..last - 1, whose targets have taken over what those before `first` lost."""
        if last - first == 1:
            column = factor.order[first]
            index = table[_places(targets[first] * by_group[1][column // size], encoding)]
            stored[column] = index
            lost[first] = wanted[first] - values[index] * by_group[0][column // size]
            return
        middle = (first + last) // 2
        round_columns(first, middle)
        targets[middle:last] += factor.upper[first:middle, middle:last].T @ lost[first:middle]
        round_columns(middle, last)

    round_columns(0, len(wanted))
    put_codes(tile_rows, encoding, stored.T)
    return float(np.abs(lost).max()), float(np.einsum("ij,ij->", lost, lost))


def _places(x: Array, encoding: Encoding) -> NDArray[np.intp]:
    """Where in a table of 128 the code nearest to each x is (docs/FORMAT.md has the rule)."""
    twice = x * 2 - np.float32(0.5) if encoding is Encoding.INT4 else x
    limit = 63 if encoding is Encoding.INT4 else 31
    return (np.rint(np.clip(twice, -limit, limit)) + 64).astype(np.intp)


def _codes(tile_rows: NDArray[Any], encoding: Encoding) -> tuple[Array, NDArray[np.uint8]]:
    """The value of each code as it is stored, and the stored code nearest to each place of _places."""
    if encoding is Encoding.INT6:
        return np.arange(-32, 32).astype(np.float32), np.arange(-32, 96).clip(0, 63).astype(np.uint8)
    codebook = tile_rows["codebook"][0].astype(np.float32)
    middles = (np.arange(128) - 64) / 2 + 0.25
    return codebook, np.abs(middles[:, None] - codebook).argmin(axis=1).astype(np.uint8)


def put_codes(tile_rows: NDArray[Any], encoding: Encoding, stored: NDArray[np.uint8]) -> None:
    """Put codes (rows, columns) into their places: of INT4 places in the codebook, of INT6 code + 32.

    What format.codes_and_scales reads.
    """
    tiles = tile_rows["tiles"]
    blocks = stored.reshape(len(tile_rows), TILE_ROWS, tiles.shape[1], -1, 4).transpose(0, 2, 3, 1, 4)
    low = blocks & 15
    tiles["nibbles"] = low[:, :, 0::2] | low[:, :, 1::2] << 4
    if encoding is Encoding.INT6:
        high = blocks >> 4
        tiles["crumbs"] = (
            high[:, :, 0::4] | high[:, :, 1::4] << 2 | high[:, :, 2::4] << 4 | high[:, :, 3::4] << 6
        )
