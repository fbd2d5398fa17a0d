"""The command export.py: a Hugging Face directory or a GGUF file -> model.bin, with progress on a terminal.

python export.py path/to/Qwen3-0.6B model.bin
python export.py path/to/Qwen3-0.6B model.bin --lora path/to/adapter
python export.py Qwen3-0.6B-Q8_0.gguf model.bin
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn, TextIO

from .. import format
from ..convert.export import estimate, export
from ..files import reason
from ..terminal import Progress, abandon_closed_streams, escaped, one_line, open_streams, program_name


def describe_bytes(done: float, total: float, rate: float) -> str:
    """The words of the progress line: bytes of the source read, and how fast."""
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB  {rate / 1e6:.0f} MB/s"


class _Ended(SystemExit):
    """SIGINT, SIGTERM or SIGHUP, as an exception, so that the temporary file is removed."""

    words = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "its terminal was closed"}

    def __init__(self, number: int) -> None:
        self.status = 128 + number  # as a shell says it
        self.word = self.words[signal.Signals(number).name]
        super().__init__(self.status)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within, the first signal that asks the program to end raises _Ended. From then on they are ignored: it ends.

    A closed terminal sends two. A signal that the caller ignores (nohup, a background job) stays ignored.
    """
    numbers = [getattr(signal, name) for name in _Ended.words if hasattr(signal, name)]
    previous = {number: signal.getsignal(number) for number in numbers}
    chosen = [number for number in numbers if previous[number] not in (signal.SIG_IGN, None)]

    def end(number: int, frame: FrameType | None) -> None:
        for other in chosen:
            signal.signal(other, signal.SIG_IGN)
        raise _Ended(number)

    for number in chosen:
        signal.signal(number, end)
    ended = False
    try:
        yield
    except _Ended:
        ended = True
        raise
    finally:
        for number in chosen if not ended else ():
            signal.signal(number, previous[number])


def main(argv: list[str] | None = None) -> int:
    """The command `export.py SRC OUT`: 0 done, 2 refused, 130, 143 or 129 ended by a signal; no traceback."""
    open_streams()
    args = _parse(argv)
    # the work has threads of its own; where a limit lets OpenBLAS start none, it would end the process
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    progress = None if args.quiet else Progress(describe_bytes)
    target = args.target or args.source  # what a message is about
    try:
        with _ended_by_signals():
            lines = _run(args, progress)
    except _Ended as ended:
        return _fail(f"{target}: {ended.word}, nothing was written", ended.status, progress)
    except OSError as error:
        return _fail(f"{error.filename or target}: {reason(error)}", 2, progress)
    except MemoryError as error:
        return _fail(f"{target}: out of memory{f': {error}' if str(error) else ''}", 2, progress)
    except ImportError as error:  # NumPy wraps the reason in a page of advice
        cause = error.__cause__
        return _fail(one_line(cause if isinstance(cause, ImportError) else error), 2, progress)
    except ValueError as error:
        return _fail(one_line(error), 2, progress)
    if progress:
        progress.clear()
    if args.estimate or not args.quiet:
        _say(*lines, file=sys.stdout if args.estimate else sys.stderr)
    return 0


def _run(args: argparse.Namespace, progress: Progress | None) -> list[str]:
    """What was asked for; the lines to print about it."""
    options = {key: getattr(args, key) for key in ("force", "group_size", "name", "yarn", "yarn_attn_factor")}
    if progress:
        progress.say(f"reading {args.source}")
    if args.estimate:
        return [*estimate(args.source, args.target, **options).lines()]

    report = export(
        args.source,
        args.target,
        threads=args.threads,
        lora=args.lora,
        progress=functools.partial(_draw, progress) if progress else None,
        **options,
    )
    return [*report.lines()]


def _draw(progress: Progress, done: int, total: int) -> None:
    progress(done, total)
    if done == total:
        progress.say("writing to disk")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    name = program_name("export.py")
    parser = _Parser(
        prog=name,
        usage=f"{name} SRC OUT.bin [options]",
        description="Convert a Hugging Face model directory or a GGUF file into one model.bin.",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="directory with config.json, tokenizer.json, *.safetensors; or a GGUF file",
    )
    parser.add_argument(
        "target",
        metavar="OUT.bin",
        nargs="?",
        help="file to write; one that exists is replaced if it is a model.bin or empty",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT.bin whatever it is")
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="only say how large the file and the memory it takes would be; reads no weight, writes nothing",
    )
    sizes = ", ".join(map(str, format.GROUP_SIZES))
    parser.add_argument(
        "--group-size", type=int, help=f"weights per scale: {sizes} (default: 64; 32 for Q8_0)"
    )
    parser.add_argument("--lora", metavar="DIR", help="merge this PEFT adapter into the weights")
    parser.add_argument(
        "--threads", type=int, help="threads (default: the physical cores this process may use)"
    )
    parser.add_argument("--name", help="what the model calls itself (default: from config.json)")
    parser.add_argument(
        "--yarn", type=float, metavar="FACTOR", help="stretch the context by this factor (default: as it is)"
    )
    parser.add_argument(
        "--yarn-attn-factor",
        type=float,
        metavar="X",
        help="factor on the rotary cosine and sine of a YaRN model (default: as transformers computes it)",
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads is {args.threads}, at least 1 is needed")
    if not args.source:
        parser.error("SRC is an empty text")
    if not args.target and not args.estimate:
        parser.error("OUT.bin is missing; with --estimate nothing is written")
    if args.target and not os.path.isdir(args.source) and os.path.isdir(args.target):
        parser.error(f"{args.target} is a directory and {args.source} is not: the order is SRC OUT.bin")
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line; the usage is in --help."""
        self.exit(_fail(message, 2))


def _fail(message: str, status: int, progress: Progress | None = None) -> int:
    if progress:
        progress.clear()
    _say(f"{program_name('export.py')}: error: {escaped(' '.join(message.split()))}", file=sys.stderr)
    return status


def _say(*lines: str, file: TextIO) -> None:
    """Print lines; whoever closed the stream does not want to know, nor does the flush at exit."""
    with contextlib.suppress(OSError):
        print(*lines, sep="\n", file=file, flush=True)
    abandon_closed_streams()
