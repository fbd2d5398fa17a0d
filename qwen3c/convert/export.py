"""Hugging Face directory or GGUF file -> model.bin, streaming.

    check      everything but the weights themselves, before any file is created
    convert    a million weights at a time to INT8 groups in tiles of 16 rows; each thread its own, in C
    write      in order, beside the target; renamed when whole

The bytes depend on the contents of the source, the adapter and the group size alone. The codes and scales of
Q8_0 weights are taken over as they are.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import sys
import time
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from .. import format, memory, mistakes
from ..memory import gib
from ..terminal import escaped

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .huggingface import Checkpoint
    from .source import Source, StoredTensor

SLICE_WEIGHTS = 1 << 20  # read, quantised and written at a time: source and result fit in a core's cache
MAX_BUFFERS = 256 << 20  # bytes of all slices in flight
MAX_WEIGHT = 127 * 65504  # more than this no fp16 scale can express

ProgressCallback = Callable[[int, int], None]  # bytes of the source done, and all


@dataclass
class KindError:
    """Quantisation error of all tensors of one kind, such as every layer's mlp.down_proj."""

    tensors: int = 0
    worst: float = 0.0  # largest |weight - stored|
    squared_error: float = 0.0
    squared_weight: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square of the error over that of the weights."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else 0.0


@dataclass
class Report:
    """What an export did. `warnings` are sentences about what the model will not do."""

    path: Path
    name: str
    file_size: int = 0
    source_size: int = 0  # bytes of the tensors read
    seconds: float = 0.0
    anonymous_bytes: int = 0  # most seen at once; 0 where the system does not tell
    errors: dict[str, KindError] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, piece: Slice, converted: _Converted) -> None:
        """Add a slice's error to its kind, and look how much memory is in use."""
        self.anonymous_bytes = max(self.anonymous_bytes, anonymous_bytes())
        if not piece.tensor.quantized:
            return
        kind = re.sub(r"^model\.layers\.\d+\.|(?<=experts\.)\d+\.", "", piece.tensor.name).removesuffix(
            ".weight"
        )
        error = self.errors.setdefault(kind, KindError())
        error.tensors += piece.row == 0
        error.worst = max(error.worst, converted.worst)
        error.squared_error += converted.squared_error
        error.squared_weight += converted.squared_weight

    def lines(self) -> Iterator[str]:
        """A table of errors, what was written and what it took, and the warnings."""
        yield f"{'tensors':<28}{'count':>6}{'worst error':>14}{'mean error':>13}"
        for kind, error in self.errors.items():
            yield f"{kind:<28}{error.tensors:>6}{error.worst:>14.3g}{error.relative:>12.3%} "
        rate = self.source_size / self.seconds / 1e6
        peak = f"peak memory {peak_bytes() / 1e6:.0f} MB"
        if self.anonymous_bytes:
            peak += f" ({self.anonymous_bytes / 1e6:.0f} MB anonymous)"
        yield f"{self.path}: {escaped(self.name)}, {self.file_size / 1e6:,.1f} MB"
        yield f"{self.source_size / 1e6:,.1f} MB of weights in {self.seconds:.1f} s ({rate:.0f} MB/s), {peak}"
        yield from (f"warning: {warning}" for warning in self.warnings)


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    group_size: int | None = None,
    threads: int | None = None,
    name: str | None = None,
    progress: ProgressCallback | None = None,
    lora: str | os.PathLike[str] | None = None,
    yarn: float | None = None,
    yarn_attn_factor: float | None = None,
) -> Report:
    """Convert the Hugging Face directory or GGUF file `source` into the file `target`.

    force: replace `target` whatever it is. Without it only a model.bin or an empty file is replaced.
    group_size: weights that share a scale (default: 64; 32 for a GGUF file with Q8_0 weights).
    threads: for the quantisation (default: cpu.default_threads()); the result does not depend on it.
    name: what the model calls itself (default: from config.json).
    lora: directory of a PEFT adapter, merged into the weights on their way.
    yarn: stretch the context of a model of default rope by this factor. yarn_attn_factor: the factor on cos and
    sin, in place of what transformers computes from the configuration.
    Raises SourceError (huggingface.py) or OSError; the target is then what it was before.
    """
    from ..machine import default_threads
    from .directory import Directory
    from .huggingface import Checkpoint
    from .lora import merge

    start = time.monotonic()
    with contextlib.ExitStack() as opened:
        files = opened.enter_context(_open(source))
        checkpoint = Checkpoint(files, group_size, name, yarn, yarn_attn_factor)
        if lora is not None:
            adapter = opened.enter_context(Directory(lora, "adapter_config.json"))
            merge(checkpoint, adapter)
            path = _check_target(target, adapter, force)
        path = _check_target(target, files, force)
        writer = _writer(path, checkpoint)
        _check_space(path, writer.file_size)
        report = Report(path, checkpoint.metadata["name"], writer.file_size, checkpoint.size)
        report.warnings += _warnings(checkpoint)
        with writer:
            _stream(checkpoint, writer, threads or default_threads(), report, progress)
        report.seconds = time.monotonic() - start
        return report


@dataclass(frozen=True)
class ExportEstimate:
    """What an export would write, known from config and headers alone."""

    name: str
    config: format.Config
    source_size: int
    file_size: int
    tokenizer_size: int
    directory: str  # where the file would be
    free: int  # bytes there

    def lines(self) -> Iterator[str]:
        """Sizes, whether the disk holds the file, then memory by context."""
        weights = f"{self.config.n_parameters / 1e6:,.1f} M parameters, {gib(self.source_size)} of weights"
        verdict = "fits" if self.file_size <= self.free else "does not fit"
        yield f"{self.name}: {weights} as they are"
        yield f"file: {gib(self.file_size)} ({self.file_size:,} bytes), INT8 in groups of {self.config.group_size}"
        yield f"disk: {gib(self.free)} free in {self.directory}: {verdict}"
        yield ""
        yield from memory.lines(self.config, self.file_size, self.tokenizer_size)


def estimate(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    group_size: int | None = None,
    name: str | None = None,
    yarn: float | None = None,
    yarn_attn_factor: float | None = None,
) -> ExportEstimate:
    """What `export` with the same arguments would take; without a target, beside the caller.

    No weight is read and nothing is written. Raises SourceError or OSError, as export does.
    """
    from .huggingface import Checkpoint

    with _open(source) as files:
        checkpoint = Checkpoint(files, group_size, name, yarn, yarn_attn_factor)
        path = Path("model.bin").absolute() if target is None else _check_target(target, files, force)
        writer = _writer(path, checkpoint)
    free = shutil.disk_usage(path.parent).free
    sizes = (checkpoint.size, writer.file_size, len(checkpoint.tokenizer))
    return ExportEstimate(checkpoint.metadata["name"], checkpoint.config, *sizes, str(path.parent), free)


def _open(source: str | os.PathLike[str]) -> Source:
    from .directory import Directory
    from .gguf import GGUF

    return GGUF(source) if os.path.isfile(source) else Directory(source)


def _warnings(checkpoint: Checkpoint) -> Iterator[str]:
    if not checkpoint.template:
        where = f"{checkpoint.source.location} has no chat template ({checkpoint.source.template_places})"
        yield f"{where}: the model completes text, but cannot chat"


def _writer(path: Path, checkpoint: Checkpoint) -> format.ModelWriter:
    from .source import SourceError, cut

    c = checkpoint
    try:
        return format.ModelWriter(path, c.config, c.metadata, c.tokenizer, c.template)
    except ValueError as error:
        raise SourceError(f"{c.source.location}: {cut(error)}") from None


def _check_target(target: str | os.PathLike[str], source: Source, force: bool) -> Path:
    """Where the file will really be (a link stays a link), if it can be there."""
    from .source import SourceError

    path = Path(os.path.realpath(target))
    if path.is_dir():
        raise SourceError(f"{target}: is a directory; name the file to write")
    if path.exists():
        if not path.is_file():
            raise SourceError(f"{target}: is not a regular file")
        if any(path.samefile(file.name) for file in source.opened):
            raise SourceError(f"{target}: is a file of the model that is read")
        if not force and path.stat().st_size and not mistakes.is_model_file(path):
            raise SourceError(f"{target}: exists and is not a model.bin; --force replaces it")
    if not path.parent.is_dir():
        raise SourceError(f"{target}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise SourceError(f"{target}: directory {path.parent} is not writable")
    return path


def _check_space(path: Path, needed: int) -> None:
    from .source import SourceError

    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SourceError(f"{path}: needs {needed:,} bytes, {free:,} are free in {path.parent}")


# ----------------------------------------------------------------------------
# Read, quantise, write


@dataclass(frozen=True)
class Slice:
    """Consecutive rows of one tensor; a vector is one slice, its numbers rows of one column."""

    tensor: format.Tensor
    row: int
    rows: int

    @property
    def columns(self) -> int:
        return math.prod(self.tensor.shape[1:])

    @property
    def is_last(self) -> bool:
        return self.row + self.rows == self.tensor.shape[0]


def slices(tensor: format.Tensor) -> Iterator[Slice]:
    """The tensor in slices of whole tiles with at most SLICE_WEIGHTS weights, or of one tile of rows."""
    step = tensor.shape[0]
    if tensor.quantized:
        step = max(SLICE_WEIGHTS // tensor.shape[1] // format.TILE_ROWS, 1) * format.TILE_ROWS
    for row in range(0, tensor.shape[0], step):
        yield Slice(tensor, row, min(step, tensor.shape[0] - row))


class _Part(NamedTuple):
    """Rows of one Hugging Face tensor that lie in a slice."""

    stored: StoredTensor
    first_row: int
    data: memoryview

    @property
    def n(self) -> int:
        """Weights."""
        return len(self.data) * math.prod(self.stored.shape) // self.stored.size

    def to_float32(self) -> NDArray[np.float32]:
        """Shape (n,); exact."""
        from .source import to_float32

        return to_float32(self.data, self.stored.dtype)


class _Converted(NamedTuple):
    """A slice as it is stored, and how far that is from the source."""

    data: memoryview
    source_size: int
    worst: float = 0.0
    squared_error: float = 0.0
    squared_weight: float = 0.0


def _stream(
    checkpoint: Checkpoint,
    writer: format.ModelWriter,
    threads: int,
    report: Report,
    progress: ProgressCallback | None,
) -> None:
    """Workers read and quantise slices; this thread writes them in order and lets the next ones start.

    They talk through SimpleQueues, the one kind that a signal cannot leave locked: Ctrl-C raises in this thread
    wherever it is, and inside an executor's locks that would hang it and its workers for ever, inside those of
    threading.Thread.start break them. For the same reason nobody waits for a worker to end: with nothing left to do it
    ends by itself.
    """
    work = [piece for tensor in writer.tensors for piece in slices(tensor)]
    size = 4 * max(piece.rows * piece.columns for piece in work)
    # slices in flight: each worker's, and two that are ready when their turn comes
    window = max(3, min(threads + 2, MAX_BUFFERS // (2 * size)))
    sources, targets = ([_buffer(size) for _ in range(window)] for _ in range(2))
    jobs: SimpleQueue[int | None] = SimpleQueue()
    results: list[SimpleQueue[_Converted | BaseException]] = [SimpleQueue() for _ in range(window)]

    def convert_slices() -> None:
        while (job := jobs.get()) is not None:
            place = job % window
            try:
                results[place].put(_convert(checkpoint, work[job], sources[place], targets[place]))
            except BaseException as error:  # whoever waits must hear of it
                results[place].put(error)

    done = 0
    try:
        n_workers = _start_threads(window - 2, convert_slices)
        for i in range(min(window, len(work)) if n_workers else 0):
            jobs.put(i)
        for i, piece in enumerate(work):
            converted: _Converted | BaseException
            if n_workers:
                converted = results[i % window].get()
            else:
                converted = _convert(checkpoint, piece, sources[0], targets[0])
            if isinstance(converted, BaseException):
                raise converted
            writer.write(converted.data)
            if piece.is_last:
                writer.end_tensor()
            if i + window < len(work):
                jobs.put(i + window)
            report.add(piece, converted)
            done += converted.source_size
            if progress:
                progress(done, report.source_size)
    finally:
        with contextlib.suppress(Empty):
            while True:
                jobs.get_nowait()
        for _ in range(window - 2):
            jobs.put(None)


def _start_threads(n: int, target: Callable[[], None]) -> int:
    """Start up to n threads that run `target`; how many the limits of processes and of memory let start."""
    for started in range(n):
        try:
            start_new_thread(target, ())
        except RuntimeError:
            return started
    return n


def _convert(checkpoint: Checkpoint, piece: Slice, source: memoryview, target: memoryview) -> _Converted:
    """Read a slice into `source` and turn it into its stored form, in `target` if it is a matrix."""
    from .rope import inverse_frequencies

    if not piece.tensor.parts:
        return _Converted(_float32_bytes(inverse_frequencies(checkpoint.rope)), 0)
    parts = _read(checkpoint, piece, source)
    size = sum(len(part.data) for part in parts)
    if not piece.tensor.quantized:
        return _Converted(_float32_bytes(_finite(piece, parts)), size)
    target = target[: format.matrix_size(piece.rows, piece.columns, checkpoint.config.group_size)]
    return _Converted(target, size, *_quantize(piece, parts, checkpoint.config.group_size, target))


def _read(checkpoint: Checkpoint, piece: Slice, buffer: memoryview) -> list[_Part]:
    """The source bytes of a slice, in `buffer`, by the Hugging Face tensor they come from."""
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
    piece: Slice, parts: list[_Part], group_size: int, out: memoryview
) -> tuple[float, float, float]:
    """Fill `out`; return the largest error, the sum of squared errors and of squared weights."""
    import numpy as np

    from .. import engine

    sources: list[tuple[Any, str]] = [(part.data, part.stored.dtype) for part in parts]
    dtypes = {dtype for _, dtype in sources}
    if dtypes == {"Q8_0"}:
        np.frombuffer(out, np.uint8)[:] = 0  # the rows that pad the last tile
        _take_over(piece, parts, out)
        return 0.0, 0.0, 0.0
    if "Q8_0" in dtypes:  # zeros, until their own codes take their place
        weights = [np.zeros(p.n, np.float32) if p.stored.dtype == "Q8_0" else p.to_float32() for p in parts]
        sources = [(w.view("u1"), "F32") for w in weights]
    elif len(dtypes) > 1:  # of q, k and v, or of gate and up; widening is exact
        sources = [(part.to_float32().view("u1"), "F32") for part in parts]
    n_tiles = -(-piece.rows // format.TILE_ROWS)
    *errors, bad = engine.quantize_tiles(sources, piece.columns, group_size, n_tiles, out)
    if bad >= 0:
        _refuse(piece, parts, bad)
    if "Q8_0" in dtypes:
        _take_over(piece, parts, out)
    return errors[0], errors[1], errors[2]


def _take_over(piece: Slice, parts: list[_Part], out: memoryview) -> None:
    """Put the codes and scales of Q8_0 parts where docs/FORMAT.md wants them, in tiles of group size 32.

    A negative scale becomes positive with its codes. There is no code -128 in model.bin, nor a scale that
    is not finite: both are refused.
    """
    import numpy as np

    tile = np.dtype([("codes", "i1", (8, format.TILE_ROWS, 4)), ("scales", "<u2", format.TILE_ROWS)])
    tiles = np.frombuffer(out, tile).reshape(-1, piece.columns // 32)
    row, index = 0, 0
    for part in parts:
        n = part.n // piece.columns
        if part.stored.dtype == "Q8_0":
            blocks = np.frombuffer(part.data, [("scale", "<u2"), ("codes", "i1", 32)]).reshape(n, -1)
            scales, codes = blocks["scale"], blocks["codes"]
            bad = (scales & 0x7C00) == 0x7C00
            if bad.any():
                _refuse(piece, parts, index + 32 * int(np.argmax(bad)))
            if codes.min() == -128:
                _refuse(piece, parts, index + int(np.argmin(codes)))
            if (scales >> 15).any():
                codes = np.where(scales[:, :, None] >> 15, -codes, codes)
            which, lane = np.divmod(np.arange(row, row + n), format.TILE_ROWS)
            tiles["codes"][which, :, :, lane] = codes.reshape(n, -1, 8, 4)
            tiles["scales"][which, :, lane] = scales & 0x7FFF
        row, index = row + n, index + part.n


def _refuse(piece: Slice, parts: list[_Part], index: int) -> NoReturn:
    """Raise SourceError for the weight at flat `index` of the slice."""
    from .source import SourceError

    values = [part.to_float32() for part in parts]
    which = 0
    while index >= len(values[which]):
        index -= len(values[which])
        which += 1
    stored, first_row, _ = parts[which]
    row, column = divmod(index, piece.columns)
    place = f"{first_row + row}, {column}" if piece.tensor.quantized else f"{first_row + row}"
    limit = f" up to {MAX_WEIGHT:.7g}" if piece.tensor.quantized else ""
    limit += ", and of Q8_0 no code -128," if stored.dtype == "Q8_0" else ""
    value = f"{stored.name}[{place}] is {values[which][index]:g}"
    raise SourceError(f"{stored.path}: {value}; only finite weights{limit} can be stored")


def _float32_bytes(vector: NDArray[np.float32]) -> memoryview:
    return memoryview(vector.astype("<f4").tobytes())


def _buffer(size: int) -> memoryview:
    """Writable bytes that take no memory until they are used."""
    import numpy as np

    return np.empty(size, np.uint8).data


# ----------------------------------------------------------------------------
# Memory


def anonymous_bytes() -> int:
    """Memory of this process that no file backs; 0 where the system does not tell."""
    try:
        resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most memory this process has held, mapped files included; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
