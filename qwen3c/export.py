"""Hugging Face directory -> model.bin, streaming.

    python export.py path/to/Qwen3-0.6B model.bin

    check      everything but the weights themselves, before any file is created
    read       some million weights of a tensor at a time   (one thread)
    quantise   INT8 groups in tiles of 16 rows              (all threads, in C)
    write      beside the target; renamed when whole        (one thread)

The three steps overlap. The bytes depend on the source's contents and the group size alone.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from . import format

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .huggingface import Checkpoint, Files

SLICE_BYTES = 16 << 20  # of weights as float32 in one slice; at most four slices are held
MAX_WEIGHT = 127.5 * 65504  # more than this no fp16 scale can express

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
    """What an export did."""

    path: Path
    name: str
    file_size: int = 0
    source_size: int = 0  # bytes of the tensors read
    seconds: float = 0.0
    anonymous_bytes: int = 0  # most seen at once; 0 where the system does not tell
    errors: dict[str, KindError] = field(default_factory=dict)

    def add(self, piece: Slice, worst: float, squared_error: float, squared_weight: float) -> None:
        """Add the quantisation error of a slice to its kind."""
        kind = re.sub(r"^model\.layers\.\d+\.", "", piece.tensor.name).removesuffix(".weight")
        error = self.errors.setdefault(kind, KindError())
        error.tensors += piece.row == 0
        error.worst = max(error.worst, worst)
        error.squared_error += squared_error
        error.squared_weight += squared_weight

    def lines(self) -> Iterator[str]:
        """A table of errors, then what was written and what it took."""
        yield f"{'tensors':<28}{'count':>6}{'worst error':>14}{'mean error':>13}"
        for kind, error in self.errors.items():
            yield f"{kind:<28}{error.tensors:>6}{error.worst:>14.3g}{error.relative:>12.3%} "
        rate = self.source_size / self.seconds / 1e6
        peak = f"peak memory {peak_bytes() / 1e6:.0f} MB"
        if self.anonymous_bytes:
            peak += f" ({self.anonymous_bytes / 1e6:.0f} MB anonymous)"
        yield f"{self.path}: {self.name}, {self.file_size:,} bytes ({self.file_size / 2**30:.2f} GiB)"
        yield f"{self.source_size:,} bytes of weights in {self.seconds:.1f} s ({rate:.0f} MB/s), {peak}"


def export(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    group_size: int = 64,
    threads: int | None = None,
    name: str | None = None,
    progress: ProgressCallback | None = None,
) -> Report:
    """Convert the Hugging Face directory `source` into the file `target`.

    threads: for the quantisation (default: cpu.default_threads()); the result does not depend on it.
    name: what the model calls itself (default: from config.json).
    Raises SourceError (huggingface.py) or OSError; the target is then what it was before.
    """
    from .cpu import default_threads
    from .huggingface import Checkpoint, Files, SourceError

    start = time.monotonic()
    with Files(source) as files:
        checkpoint = Checkpoint(files, group_size, name)
        path = _check_target(target, files)
        texts = checkpoint.metadata, checkpoint.tokenizer, checkpoint.template
        try:
            writer = format.ModelWriter(path, checkpoint.config, *texts)
        except ValueError as error:
            raise SourceError(f"{files.directory}: {error}") from None
        _check_space(path, writer.file_size)
        report = Report(path, checkpoint.metadata["name"], writer.file_size, checkpoint.size)
        with writer:
            _stream(checkpoint, writer, threads or default_threads(), report, progress)
        report.seconds = time.monotonic() - start
        return report


def _check_target(target: str | os.PathLike[str], files: Files) -> Path:
    """Where the file will really be (a link stays a link), if it can be there."""
    from .huggingface import SourceError

    path = Path(os.path.realpath(target))
    if path.is_dir():
        raise SourceError(f"{target}: is a directory; name the file to write")
    if path.exists():
        if not path.is_file():
            raise SourceError(f"{target}: is not a regular file")
        if any(path.samefile(file.name) for file in files.opened):
            raise SourceError(f"{target}: is a file of the model that is read")
    if not path.parent.is_dir():
        raise SourceError(f"{target}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise SourceError(f"{target}: directory {path.parent} is not writable")
    return path


def _check_space(path: Path, needed: int) -> None:
    from .huggingface import SourceError

    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SourceError(f"{path}: needs {needed:,} bytes, {free:,} are free in {path.parent}")


# ----------------------------------------------------------------------------
# Read, quantise, write


@dataclass(frozen=True)
class Slice:
    """Consecutive rows of one tensor; a vector is one slice of n rows of one number."""

    tensor: format.Tensor
    row: int
    rows: int


def slices(tensor: format.Tensor) -> Iterator[Slice]:
    """The tensor in pieces of whole tiles, each at most SLICE_BYTES of float32 or one tile of rows."""
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    step = rows
    if tensor.quantized:
        step = max(SLICE_BYTES // (4 * columns) // format.TILE_ROWS, 1) * format.TILE_ROWS
    for row in range(0, rows, step):
        yield Slice(tensor, row, min(step, rows - row))


def _stream(
    checkpoint: Checkpoint,
    writer: format.ModelWriter,
    threads: int,
    report: Report,
    progress: ProgressCallback | None,
) -> None:
    """Three steps at once on two buffers each: read a slice, quantise the one before, write the one before it."""
    import numpy as np

    work = [piece for tensor in writer.tensors for piece in slices(tensor)]
    size = 4 * max(piece.rows * math.prod(piece.tensor.shape[1:]) for piece in work)
    inputs, outputs = ([memoryview(np.empty(size, np.uint8)) for _ in range(2)] for _ in range(2))
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writing:
        ahead = reader.submit(_read, checkpoint, work[0], inputs[0])
        written: Future[None] | None = None
        done = 0
        for i, piece in enumerate(work):
            parts = ahead.result()
            if i + 1 < len(work):
                ahead = reader.submit(_read, checkpoint, work[i + 1], inputs[(i + 1) % 2])
            stored = _convert(checkpoint, piece, parts, outputs[i % 2], threads, report)
            if written:
                written.result()
            written = writing.submit(_write, writer, piece, stored)
            done += sum(len(data) for _, data in parts)
            report.anonymous_bytes = max(report.anonymous_bytes, anonymous_bytes())
            if progress:
                progress(done, report.source_size)
        if written:
            written.result()


SourcePart = tuple[format.Part, memoryview]


def _read(checkpoint: Checkpoint, piece: Slice, buffer: memoryview) -> list[SourcePart]:
    """The source bytes of a slice, in `buffer`, by the Hugging Face tensor they come from."""
    parts = []
    for part in piece.tensor.parts:
        first, last = max(part.row, piece.row), min(part.row + part.rows, piece.row + piece.rows)
        if first < last:
            stored = checkpoint.tensors[part.name]
            row_size = stored.size // part.rows
            data, buffer = buffer[: (last - first) * row_size], buffer[(last - first) * row_size :]
            stored.read((first - part.row) * row_size, data)
            parts.append((part, data))
    return parts


def _convert(
    checkpoint: Checkpoint,
    piece: Slice,
    parts: list[SourcePart],
    out: memoryview,
    threads: int,
    report: Report,
) -> memoryview:
    """The stored bytes of a slice; a matrix is quantised into `out` and its error added to the report."""
    import numpy as np

    from . import engine
    from .huggingface import inverse_frequencies

    if not parts:
        return memoryview(inverse_frequencies(checkpoint.rope).astype("<f4").tobytes())
    dtypes = [checkpoint.tensors[part.name].dtype for part, _ in parts]
    if not piece.tensor.quantized:
        values = [to_float32(data, dtype) for (_, data), dtype in zip(parts, dtypes, strict=True)]
        vector = np.concatenate(values)
        if not np.isfinite(vector).all():
            _refuse(checkpoint, piece, parts, int(np.argmin(np.isfinite(vector))))
        return memoryview(vector.astype("<f4").tobytes())
    columns, group_size = piece.tensor.shape[1], checkpoint.config.group_size
    sources = [(data, dtype) for (_, data), dtype in zip(parts, dtypes, strict=True)]
    if len(set(dtypes)) > 1:  # of q, k and v, or gate and up; widening is exact
        sources = [(memoryview(to_float32(*source)).cast("B"), "F32") for source in sources]
    out = out[: format.matrix_size(piece.rows, columns, group_size)]
    n_tiles = -(-piece.rows // format.TILE_ROWS)
    worst, squared_error, squared_weight, bad = engine.quantize_tiles(
        sources, columns, group_size, 0, n_tiles, out, threads
    )
    if bad >= 0:
        _refuse(checkpoint, piece, parts, bad)
    report.add(piece, worst, squared_error, squared_weight)
    return out


def _refuse(checkpoint: Checkpoint, piece: Slice, parts: list[SourcePart], index: int) -> NoReturn:
    """Raise SourceError for the weight at flat `index` of the slice."""
    from .huggingface import SourceError

    columns = math.prod(piece.tensor.shape[1:])
    row, column = piece.row + index // columns, index % columns
    for part, data in parts:
        if part.row <= row < part.row + part.rows:
            stored = checkpoint.tensors[part.name]
            skipped = max(piece.row - part.row, 0)
            value = to_float32(data, stored.dtype)[(row - part.row - skipped) * columns + column]
            place = ", ".join(map(str, (row - part.row, column)[: len(stored.shape)]))
            largest = f"finite numbers up to {MAX_WEIGHT:g}" if piece.tensor.quantized else "finite numbers"
            raise SourceError(f"{stored.path}: {part.name}[{place}] is {value}, only {largest} can be stored")
    raise AssertionError(f"{piece.tensor.name}: no part has row {row}")


def _write(writer: format.ModelWriter, piece: Slice, stored: memoryview) -> None:
    writer.write(stored)
    if piece.row + piece.rows == piece.tensor.shape[0]:
        writer.end_tensor()


def to_float32(data: memoryview, dtype: str) -> NDArray[np.float32]:
    """The numbers in little-endian BF16, F16 or F32 bytes, shape (n,); exact."""
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


# ----------------------------------------------------------------------------
# Memory


def anonymous_bytes() -> int:
    """Memory of this process that no file backs; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def peak_bytes() -> int:
    """The most memory this process has held, mapped files included; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ----------------------------------------------------------------------------
# Command line


class Progress:
    """Bytes done, rate and time left: one line that changes on a terminal, else a line every 10 seconds."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.terminal = stream.isatty()
        self.start = self.shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.shown < (0.1 if self.terminal else 10):
            return
        self.shown = now
        rate = done / (now - self.start)
        text = f"{done / total:4.0%}  {done / 1e9:.2f} of {total / 1e9:.2f} GB"
        text += f"  {rate / 1e6:.0f} MB/s  {(total - done) / rate:.0f} s left"
        if self.terminal:
            bar = "#" * (24 * done // total)
            print(f"\r[{bar:<24}] {text}\x1b[K", end="", file=self.stream, flush=True)
        else:
            print(text, file=self.stream, flush=True)

    def clear(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=self.stream, flush=True)


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that the temporary file is removed."""


def main(argv: list[str] | None = None) -> int:
    """The command `export.py SRC OUT`: 0 done, 2 refused, 130 and 143 interrupted; it never shows a traceback."""
    args = _parse(argv)
    progress = None if args.quiet else Progress(sys.stderr)

    def terminate(*_: object) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        report = export(args.source, args.target, args.group_size, args.threads, args.name, progress)
    except KeyboardInterrupt:
        return _fail(progress, f"{args.target}: interrupted, nothing was written", 130)
    except _Terminated:
        return _fail(progress, f"{args.target}: terminated, nothing was written", 143)
    except OSError as error:
        return _fail(progress, f"{error.filename or args.target}: {error.strerror or error}", 2)
    except MemoryError as error:
        return _fail(progress, f"out of memory: {error}", 2)
    except ValueError as error:
        return _fail(progress, str(error), 2)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if progress:
        progress.clear()
        print(*report.lines(), sep="\n", file=sys.stderr)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export.py", description="Convert a Hugging Face model directory into one model.bin."
    )
    parser.add_argument(
        "source", metavar="SRC", help="directory with config.json, tokenizer.json, *.safetensors"
    )
    parser.add_argument("target", metavar="OUT.bin", help="file to write")
    sizes = ", ".join(map(str, format.GROUP_SIZES))
    parser.add_argument(
        "--group-size", type=int, default=64, help=f"weights per scale: {sizes} (default: 64)"
    )
    parser.add_argument(
        "--threads", type=int, help="threads (default: the physical cores this process may use)"
    )
    parser.add_argument("--name", help="what the model calls itself (default: from config.json)")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads is {args.threads}, at least 1 is needed")
    if not os.path.isdir(args.source) and os.path.isdir(args.target):
        parser.error(f"{args.target} is a directory and {args.source} is not: the order is SRC OUT.bin")
    return args


def _fail(progress: Progress | None, message: str, status: int) -> int:
    if progress:
        progress.clear()
    print("export.py: error:", " ".join(message.split()), file=sys.stderr)
    return status
