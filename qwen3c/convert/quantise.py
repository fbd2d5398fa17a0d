"""The weights of a checkpoint -> the tensors of a model.bin, streaming.

    read       a million weights at a time, as they are stored
    quantise   to groups in tiles of 16 rows, as each matrix is encoded; each thread its own slice, in C
    write      in the order of the file

The codes and scales of GGUF's blocks are taken over as they are where the encoding holds them
(taking_over.py).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from .. import format
from . import taking_over
from .rope import inverse_frequencies
from .source import SourceError, StoredTensor, to_float32

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .huggingface import Checkpoint

SLICE_WEIGHTS = 1 << 20  # weights in a slice: its source and result fit in a core's cache
MAX_BUFFERS = 256 << 20  # bytes of all slices in flight
# a larger weight needs a scale beyond fp16
MAX_WEIGHT = {
    format.Encoding.INT8: 127 * 65504,
    format.Encoding.INT4: 31 * 65504,
    format.Encoding.INT6: 31 * 65504,
}


@dataclass(frozen=True)
class Slice:
    """Consecutive rows of one tensor. A vector is one slice, with rows of one number."""

    tensor: format.Tensor
    row: int
    rows: int

    @property
    def columns(self) -> int:
        return math.prod(self.tensor.shape[1:])

    @property
    def is_last(self) -> bool:
        return self.row + self.rows == self.tensor.shape[0]


def slices(tensor: format.Tensor, most: int = 0) -> Iterator[Slice]:
    """The tensor in slices of whole tiles with at most `most` weights, or of one tile of rows.

    Where the next part begins with a tile row, so does a slice: it then has one dtype. most: 0 for
    SLICE_WEIGHTS.
    """
    rows = tensor.shape[0]
    if not tensor.quantized:
        yield Slice(tensor, 0, rows)
        return
    step = max((most or SLICE_WEIGHTS) // tensor.shape[1] // format.TILE_ROWS, 1) * format.TILE_ROWS
    starts = [part.row for part in tensor.parts if part.row % format.TILE_ROWS == 0]
    for start, end in itertools.pairwise([*starts, rows]):
        for row in range(start, end, step):
            yield Slice(tensor, row, min(step, end - row))


class _Part(NamedTuple):
    """Rows of one Hugging Face tensor that lie in a slice."""

    stored: StoredTensor
    first_row: int
    data: memoryview

    @property
    def n(self) -> int:
        """How many weights."""
        return len(self.data) * math.prod(self.stored.shape) // self.stored.size

    def to_float32(self) -> NDArray[np.float32]:
        """The weights as float32 (n,), exactly."""
        return to_float32(self.data, self.stored.dtype)


class Converted(NamedTuple):
    """A slice as it is stored, and how far that is from the source."""

    data: memoryview
    source_size: int
    dtypes: str = ""  # of the source; several in a slice are joined
    worst: float = 0.0
    squared_error: float = 0.0
    squared_weight: float = 0.0
    taken_over: int = 0  # weights that are stored as they are; not in the sums


def stream(
    checkpoint: Checkpoint,
    writer: format.ModelWriter,
    threads: int,
    written: Callable[[Slice, Converted], None],
    ready: Callable[[Slice], Converted | None] | None = None,
) -> None:
    """Workers read and quantise slices; this thread writes them in order and lets the next ones start.

    written: called after each slice, in this thread. ready: gives a slice that is quantised already.
    SourceError, with its place, for a weight that cannot be stored.

    Threads talk through SimpleQueues, the one kind of queue that a signal cannot leave locked. Ctrl-C raises
    in this thread at any line; inside the locks of an executor or of threading.Thread.start that would hang
    or break the program. For the same reason this thread does not join the workers: they end by themselves
    when there is nothing left to do.
    """
    work = [piece for tensor in writer.tensors for piece in slices(tensor)]
    size = 4 * max(piece.rows * piece.columns for piece in work)
    # slices in flight: one for each worker, and two finished ones that wait to be written
    window = max(3, min(threads + 2, MAX_BUFFERS // (2 * size)))
    sources, targets = ([buffer(size) for _ in range(window)] for _ in range(2))
    jobs: SimpleQueue[int | None] = SimpleQueue()
    results: list[SimpleQueue[Converted | BaseException]] = [SimpleQueue() for _ in range(window)]

    def converted_slice(piece: Slice, source: memoryview, target: memoryview) -> Converted:
        return (ready and ready(piece)) or convert(checkpoint, piece, source, target)

    def convert_slices() -> None:
        while (job := jobs.get()) is not None:
            place = job % window
            try:
                results[place].put(converted_slice(work[job], sources[place], targets[place]))
            except BaseException as error:  # the writing thread raises it
                results[place].put(error)

    try:
        n_workers = _start_threads(window - 2, convert_slices)
        for i in range(min(window, len(work)) if n_workers else 0):
            jobs.put(i)
        for i, piece in enumerate(work):
            converted: Converted | BaseException
            if n_workers:
                converted = results[i % window].get()
            else:
                converted = converted_slice(piece, sources[0], targets[0])
            if isinstance(converted, BaseException):
                raise converted
            writer.write(converted.data)
            if piece.is_last:
                writer.end_tensor()
            if i + window < len(work):
                jobs.put(i + window)
            written(piece, converted)
    finally:
        with contextlib.suppress(Empty):
            while True:
                jobs.get_nowait()
        for _ in range(window - 2):
            jobs.put(None)


def _start_threads(n: int, target: Callable[[], None]) -> int:
    """Start up to n threads that run `target`; returns how many the system let start."""
    for started in range(n):
        try:
            start_new_thread(target, ())
        except RuntimeError:
            return started
    return n


def convert(
    checkpoint: Checkpoint,
    piece: Slice,
    source: memoryview,
    target: memoryview,
    importance: NDArray[np.float32] | None = None,
) -> Converted:
    """Read a slice into `source` and turn it into its stored form, in `target` if it is a matrix.

    importance: of each column's squared error (columns,), for INT4 and INT6; None for 1.
    """
    if not piece.tensor.parts:
        return Converted(_float32_bytes(inverse_frequencies(checkpoint.rope)), 0)
    parts = _read(checkpoint, piece, source)
    size = sum(len(part.data) for part in parts)
    if not piece.tensor.quantized:
        return Converted(_float32_bytes(_finite(piece, parts)), size)
    group_size = checkpoint.config.group_size
    target = target[: format.matrix_size(piece.rows, piece.columns, group_size, piece.tensor.encoding)]
    dtypes = " and ".join(dict.fromkeys(part.stored.dtype for part in parts))
    return Converted(target, size, dtypes, *_quantize(piece, parts, group_size, target, importance))


def weights(checkpoint: Checkpoint, piece: Slice, source: memoryview) -> NDArray[np.float32]:
    """A slice of a matrix as float32 (rows, columns), read into `source`."""
    import numpy as np

    parts = [part.to_float32() for part in _read(checkpoint, piece, source)]
    return np.concatenate(parts).reshape(piece.rows, piece.columns)


def source_size(checkpoint: Checkpoint, piece: Slice) -> int:
    """Bytes of a slice in the source."""
    size = 0
    for part in piece.tensor.parts:
        rows = min(part.row + part.rows, piece.row + piece.rows) - max(part.row, piece.row)
        size += max(rows, 0) * (checkpoint.tensors[part.name].size // part.rows)
    return size


def _read(checkpoint: Checkpoint, piece: Slice, buffer: memoryview) -> list[_Part]:
    """Read the source bytes of a slice into `buffer`; returns them as parts, one for each Hugging Face
    tensor.
    """
    parts = []
    for part in piece.tensor.parts:
        first, last = max(part.row, piece.row), min(part.row + part.rows, piece.row + piece.rows)
        if first < last:
            stored = checkpoint.tensors[part.name]
            row_size = stored.size // part.rows
            data, buffer = buffer[: (last - first) * row_size], buffer[(last - first) * row_size :]
            stored.read((first - part.row) * row_size, data)
            parts.append(_Part(stored, first - part.row, data))
    return parts


def _finite(piece: Slice, parts: list[_Part]) -> NDArray[np.float32]:
    import numpy as np

    vector = np.concatenate([part.to_float32() for part in parts])
    finite = np.isfinite(vector)
    if not finite.all():
        _refuse(piece, parts, int(np.argmin(finite)))
    return vector


def _quantize(
    piece: Slice,
    parts: list[_Part],
    group_size: int,
    out: memoryview,
    importance: NDArray[np.float32] | None,
) -> tuple[float, float, float, int]:
    """Fill `out`; return the largest error, the sums of squared errors and of squared weights, and how many
    weights are taken over: they are not in the sums.
    """
    import numpy as np

    from .. import engine

    encoding = piece.tensor.encoding
    held = _hold(piece, parts, group_size)
    errors = (0.0, 0.0, 0.0)
    tile_rows = np.frombuffer(out, format.tile_row_type(piece.columns, group_size, encoding))
    if all(part_held is not None and part_held.rows.all() for part_held in held):
        taking_over.clear(tile_rows)
    else:
        sources = _sources(piece, parts, held)
        *rounded, bad = engine.quantize_tiles(
            sources, piece.columns, group_size, out, encoding.value, importance
        )
        if bad >= 0:
            _refuse(piece, parts, bad)
        errors = (rounded[0], rounded[1], rounded[2])
    row = taken_over = 0
    for part, part_held in zip(parts, held, strict=True):
        if part_held is not None:
            taking_over.put(tile_rows, encoding, row, part_held)
            lost = part_held.lost[part_held.rows]
            taken_over += int(np.count_nonzero(lost[:, 2] == 0)) * piece.columns
            error, weight = (float(total) for total in lost[:, 1:].sum(axis=0, dtype=np.float64))
            errors = (max(errors[0], float(lost[:, 0].max(initial=0))), errors[1] + error, errors[2] + weight)
        row += part.n // piece.columns
    return errors[0], errors[1], errors[2], taken_over


def _sources(piece: Slice, parts: list[_Part], held: list[taking_over.Held | None]) -> list[tuple[Any, str]]:
    """The weights as quantize_tiles wants them, all of one dtype; rows that are held are zeros."""
    dtypes = {part.stored.dtype for part in parts}
    if len(dtypes) == 1 and dtypes <= {"BF16", "F16", "F32"}:
        return [(part.data, part.stored.dtype) for part in parts]
    result = []
    for part, part_held in zip(parts, held, strict=True):
        # q, k and v, or gate and up, may differ in dtype; widening to float32 is exact
        weights = part.to_float32()
        if part_held is not None:
            weights.reshape(-1, piece.columns)[part_held.rows] = 0
        result.append((weights.view("u1"), "F32"))
    return result


def _hold(piece: Slice, parts: list[_Part], group_size: int) -> list[taking_over.Held | None]:
    """What of each part is taken over as it is; None: nothing. SourceError for the code -128 of Q8_0."""
    import numpy as np

    encoding = piece.tensor.encoding
    held: list[taking_over.Held | None] = []
    index = 0
    for part in parts:
        found = None
        if taking_over.can_hold(part.stored.dtype, group_size, encoding):
            found = taking_over.hold(part.data, part.stored.dtype, piece.columns, encoding)
            if found.codes.min() == -128:
                _refuse(piece, parts, index + int(np.argmin(found.codes)))
        held.append(found)
        index += part.n
    if encoding is format.Encoding.INT4:
        return taking_over.of_one_codebook(held, [part.n // piece.columns for part in parts])
    return held


def _refuse(piece: Slice, parts: list[_Part], index: int) -> NoReturn:
    """Raise SourceError for the weight at flat `index` of the slice."""
    values = [part.to_float32() for part in parts]
    which = 0
    while index >= len(values[which]):
        index -= len(values[which])
        which += 1
    stored, first_row, _ = parts[which]
    row, column = divmod(index, piece.columns)
    place = f"{first_row + row}, {column}" if piece.tensor.quantized else f"{first_row + row}"
    limit = f" up to {MAX_WEIGHT[piece.tensor.encoding]:.7g}" if piece.tensor.quantized else ""
    limit += ", and of Q8_0 no code -128," if stored.dtype == "Q8_0" else ""
    value = f"{stored.name}[{place}] is {values[which][index]:g}"
    raise SourceError(f"{stored.path}: {value}; only finite weights{limit} can be stored")


def _float32_bytes(vector: NDArray[np.float32]) -> memoryview:
    return memoryview(vector.astype("<f4").tobytes())


def buffer(size: int) -> memoryview:
    """A buffer of `size` bytes that takes no memory until it is written (an anonymous map)."""
    import numpy as np

    return np.empty(size, np.uint8).data
