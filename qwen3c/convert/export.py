"""Hugging Face directory or GGUF file -> model.bin.

    check      everything but the weights themselves, before any file is created
    calibrate  if asked for: the matrices by what a text says of their inputs (calibrate.py)
    stream     the weights, quantised on their way (quantise.py), into a file beside the target
    rename     when it is whole

The bytes depend on the contents of the source, the adapter, the group size and the recipe alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .. import format, memory
from ..memory import gib
from ..system import mistakes
from ..system.machine import default_threads
from ..system.terminal import escaped
from .calibration_text import CalibrationOptions
from .directory import Directory
from .gguf import GGUF
from .gguf_blocks import KINDS
from .huggingface import Checkpoint, CheckpointOptions
from .lora import merge
from .quantise import Converted, Slice, stream
from .source import Source, SourceError, cut

if sys.version_info >= (3, 11):
    from typing import Unpack
elif TYPE_CHECKING:
    from typing_extensions import Unpack

if TYPE_CHECKING:
    from .calibrate import Calibration

ProgressCallback = Callable[[int, int], None]  # bytes of the source done, and in all


@dataclass
class KindError:
    """Quantisation error of all tensors of one kind, such as every layer's mlp.down_proj."""

    tensors: int = 0
    worst: float = 0.0  # largest |weight - stored|
    squared_error: float = 0.0
    squared_weight: float = 0.0
    weights: int = 0
    taken_over: int = 0  # of them, without error; not in the sums above

    @property
    def relative(self) -> float:
        """rms of the error / rms of the weights, without those that are taken over."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else 0.0


@dataclass
class Report:
    """What an export did. `warnings` are sentences about what the model will not do."""

    path: Path
    name: str
    file_size: int = 0
    source_size: int = 0  # bytes of the source's tensors; bytes of them converted so far
    source_done: int = 0
    seconds: float = 0.0
    anonymous_bytes: int = 0  # most seen after any slice; 0 where the system does not tell
    errors: dict[str, KindError] = field(default_factory=dict)
    # of all matrices of one dtype of the source that are stored in one encoding
    losses: dict[tuple[str, format.Encoding], KindError] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, piece: Slice, converted: Converted) -> None:
        """Count a slice as done, add its error to that of its kind, and measure the memory in use."""
        self.source_done += converted.source_size
        self.anonymous_bytes = max(self.anonymous_bytes, anonymous_bytes())
        if not piece.tensor.quantized:
            return
        kind = re.sub(r"^model\.layers\.\d+\.|(?<=experts\.)\d+\.", "", piece.tensor.name).removesuffix(
            ".weight"
        )
        loss = self.losses.setdefault((converted.dtypes, piece.tensor.encoding), KindError())
        loss.tensors += sum(piece.row <= part.row < piece.row + piece.rows for part in piece.tensor.parts)
        loss.weights += piece.rows * piece.columns
        loss.taken_over += converted.taken_over
        of_kind = self.errors.setdefault(kind, KindError())
        of_kind.tensors += piece.row == 0
        for error in (of_kind, loss):
            error.worst = max(error.worst, converted.worst)
            error.squared_error += converted.squared_error
            error.squared_weight += converted.squared_weight

    def loss_lines(self) -> Iterator[str]:
        """Of a source with blocks of codes: what became of each dtype, and how far that is from it."""
        if not any(name in KINDS for dtypes, _ in self.losses for name in dtypes.split()):
            return
        for (dtypes, encoding), loss in self.losses.items():
            lost = f"{loss.relative:.2%} lost"
            if loss.taken_over:
                share = loss.taken_over / loss.weights
                lost = "as they are" if share == 1 else f"{share:.2%} as they are, of the others {lost}"
            what = f"{dtypes} -> {encoding.value.upper()}"
            yield f"{what:<28}{loss.tensors:>6}  {lost}"

    def lines(self) -> Iterator[str]:
        """A table of errors, what was written and what it took, and the warnings."""
        yield f"{'tensors':<28}{'count':>6}{'worst error':>14}{'mean error':>13}"
        for kind, error in self.errors.items():
            yield f"{kind:<28}{error.tensors:>6}{error.worst:>14.3g}{error.relative:>12.3%} "
        yield from self.loss_lines()
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
    threads: int | None = None,
    progress: ProgressCallback | None = None,
    lora: str | os.PathLike[str] | None = None,
    calibrate: CalibrationOptions | None = None,
    **options: Unpack[CheckpointOptions],
) -> Report:
    """Convert the Hugging Face directory or GGUF file `source` into the file `target`.

    force: replace `target` whatever it is. Without it only a model.bin or an empty file is replaced.
    threads: for the quantisation (default: machine.default_threads()); the result does not depend on it.
    progress: told (bytes of the source done, bytes in all) after each slice of a tensor.
    lora: directory of a PEFT adapter, merged into the weights on their way.
    calibrate: quantise by what a text says of the inputs of matrices. What is done is kept beside the
    target until the end, so that the same call goes on after an interruption.
    options: see CheckpointOptions.
    Raises SourceError or OSError; the target is then what it was before.
    """
    start = time.monotonic()
    with contextlib.ExitStack() as opened:
        files = opened.enter_context(_open(source))
        checkpoint = Checkpoint(files, **options)
        if lora is not None:
            adapter = opened.enter_context(Directory(lora, "adapter_config.json"))
            merge(checkpoint, adapter)
            path = _check_target(target, adapter, force)
        path = _check_target(target, files, force)
        calibration = _calibration(calibrate, checkpoint, path)
        writer = _writer(path, checkpoint)
        _check_space(path, writer.file_size + (calibration.plan.state_bytes() if calibration else 0))
        report = Report(path, checkpoint.metadata["name"], writer.file_size, checkpoint.size)
        report.warnings += _warnings(checkpoint)
        if calibration:
            calibration.run()

        def written(piece: Slice, converted: Converted) -> None:
            report.add(piece, converted)
            if progress:
                progress(report.source_done, report.source_size)

        with writer:
            ready = calibration.ready if calibration else None
            stream(checkpoint, writer, threads or default_threads(), written, ready)
        if calibration:
            calibration.state.remove()
        report.seconds = time.monotonic() - start
        return report


@dataclass(frozen=True)
class ExportEstimate:
    """What an export would write, known from config and headers alone."""

    name: str
    config: format.Config
    encodings: format.Encodings
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
        yield (
            f"file: {gib(self.file_size)} ({self.file_size:,} bytes), "
            f"{format.described(self.config, self.encodings)}"
        )
        yield f"disk: {gib(self.free)} free in {self.directory}: {verdict}"
        yield ""
        yield from memory.lines(self.config, self.file_size, self.tokenizer_size)


def estimate(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    **options: Unpack[CheckpointOptions],
) -> ExportEstimate:
    """What `export` with these arguments would take. Without a target the current directory counts.

    No weight is read and nothing is written. Raises SourceError or OSError, as export does.
    """
    with _open(source) as files:
        checkpoint = Checkpoint(files, **options)
        path = Path("model.bin").absolute() if target is None else _check_target(target, files, force)
        writer = _writer(path, checkpoint)
    free = shutil.disk_usage(path.parent).free
    sizes = (checkpoint.size, writer.file_size, len(checkpoint.tokenizer))
    what = (checkpoint.metadata["name"], checkpoint.config, checkpoint.encodings)
    return ExportEstimate(*what, *sizes, str(path.parent), free)


def _open(source: str | os.PathLike[str]) -> Source:
    return GGUF(source) if os.path.isfile(source) else Directory(source)


def _calibration(
    options: CalibrationOptions | None, checkpoint: Checkpoint, path: Path
) -> Calibration | None:
    if options is None:
        return None
    from .calibrate import Calibration

    return Calibration(checkpoint, path, options)


def _warnings(checkpoint: Checkpoint) -> Iterator[str]:
    if not checkpoint.template:
        where = f"{checkpoint.source.location} has no chat template ({checkpoint.source.template_places})"
        yield f"{where}: the model completes text, but cannot chat"


def _writer(path: Path, checkpoint: Checkpoint) -> format.ModelWriter:
    c = checkpoint
    try:
        return format.ModelWriter(path, c.config, c.metadata, c.tokenizer, c.template, c.encodings)
    except ValueError as error:
        raise SourceError(f"{c.source.location}: {cut(error)}") from None


def _check_target(target: str | os.PathLike[str], source: Source, force: bool) -> Path:
    """The path to write, symbolic links followed. SourceError if no file can be written there."""
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
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SourceError(f"{path}: needs {needed:,} bytes, {free:,} are free in {path.parent}")


# ----------------------------------------------------------------------------
# Memory


def anonymous_bytes() -> int:
    """Bytes of memory of this process that no file backs; 0 where the system does not tell."""
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
