"""What a calibration has done, in a folder beside its target, so that one that was ended goes on.

    plan.json        what the calibration depends on
    block-000.npz    the stored tensors of a block by name, and "errors" of each, as Converted has them
    x-000.npy        the residual stream behind that block; of the last finished one alone

A file appears whole or not at all, and x before its block: what was killed in between is done again.
"""

from __future__ import annotations

import functools
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import format
from ..system.files import replacing, write_whole
from .quantise import Converted, Slice
from .source import SourceError

Array = NDArray[np.float32]
Errors = tuple[float, float, float, int]  # the last four fields of Converted
Stored = dict[str, tuple[NDArray[np.uint8], Errors]]  # by tensor


class CalibrationState:
    """The blocks that are done. plan: what the result depends on, as JSON.

    SourceError if the folder belongs to a calibration of another plan, or is damaged. OSError.
    """

    def __init__(self, target: Path, plan: dict[str, Any]) -> None:
        self.path = folder(target)
        self._plan = json.dumps(plan, indent=1, sort_keys=True)
        self._blocks = functools.lru_cache(2)(self._read)
        self._block_of: dict[str, int] = {}
        if self.path.exists():
            self._check()
        self.done = len(finished(target))
        for block in range(self.done):
            self._block_of |= dict.fromkeys(self._blocks(block), block)

    def _check(self) -> None:
        plan = self.path / "plan.json"
        if not plan.is_file() and any(self.path.iterdir()):
            raise SourceError(f"{self.path}: is in the way of the state of the calibration; remove it")
        if plan.is_file() and plan.read_text(encoding="utf-8") != self._plan:
            other = "is of a calibration of another source, text or options"
            raise SourceError(f"{self.path}: {other}; remove it to start over")

    def create(self) -> None:
        """The folder exists and says what it is of."""
        self.path.mkdir(exist_ok=True)
        write_whole(self.path / "plan.json", self._plan)

    def save(self, stored: Stored, x: Array) -> None:
        """Another block is done, its tensors as they are stored; x behind it."""
        with replacing(self._x(self.done)) as path, open(path, "wb") as file:
            np.save(file, x)
        arrays: dict[str, Any] = {name: data for name, (data, _) in stored.items()}
        arrays["errors"] = np.array([errors for _, errors in stored.values()], np.float64).reshape(-1, 4)
        with replacing(self._block(self.done)) as path, open(path, "wb") as file:
            np.savez(file, **arrays)
        self._block_of |= dict.fromkeys(stored, self.done)
        self.done += 1
        self._x(self.done - 2).unlink(missing_ok=True)

    def x(self) -> Array:
        """The residual stream behind the last block that is done."""
        path = self._x(self.done - 1)
        try:
            return np.asarray(np.load(path, allow_pickle=False), np.float32)
        except (OSError, ValueError, EOFError):
            raise self._damaged(path) from None

    def slice(self, piece: Slice) -> Converted | None:
        """A slice of a tensor as it is stored; None if no block has it. Threads may call it."""
        tensor = piece.tensor
        if tensor.name not in self._block_of:
            return None
        data, errors = self._blocks(self._block_of[tensor.name])[tensor.name]
        n = format.TILE_ROWS
        size = len(data) // (format.align(tensor.shape[0], n) // n)
        part = data[piece.row // n * size : format.align(piece.row + piece.rows, n) // n * size]
        return Converted(part.data, 0, "", *(errors if piece.row == 0 else ()))

    def remove(self) -> None:
        """The calibration is at its end: nothing of it is kept."""
        shutil.rmtree(self.path)

    def _read(self, block: int) -> Stored:
        try:
            with np.load(self._block(block), allow_pickle=False) as file:
                names = [name for name in file.files if name != "errors"]
                rows = zip(names, file["errors"].tolist(), strict=True)
                return {name: (file[name], (a, b, c, int(d))) for name, (a, b, c, d) in rows}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise self._damaged(self._block(block)) from None

    def _damaged(self, path: Path) -> SourceError:
        return SourceError(f"{path}: is damaged; remove {self.path} to start over")

    def _block(self, block: int) -> Path:
        return self.path / f"block-{block:03}.npz"

    def _x(self, block: int) -> Path:
        return self.path / f"x-{block:03}.npy"


def folder(target: Path) -> Path:
    """Where the state of the calibration of `target` is."""
    return target.with_name(f"{target.name}.calibration")


def finished(target: Path) -> list[Path]:
    """The files of the blocks that are done."""
    found: list[Path] = []
    while (path := folder(target) / f"block-{len(found):03}.npz").exists():
        found.append(path)
    return found
