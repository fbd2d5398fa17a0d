"""The command export.py: a Hugging Face directory or a GGUF file -> model.bin, with progress on a terminal.

python export.py path/to/Qwen3-0.6B model.bin
python export.py path/to/Qwen3-0.6B model.bin --lora path/to/adapter
python export.py Qwen3-0.6B-Q8_0.gguf model.bin
python export.py Qwen/Qwen3-0.6B model.bin
python export.py path/to/Qwen3-0.6B model.bin --bits 4
python export.py path/to/Qwen3-0.6B model.bin --bits 4 --calibrate text.txt
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import format
from ..system.machine import default_threads
from ..system.terminal import Progress, unheard
from .command import Parser, answer, concerning, program_name
from .named import export_source

if TYPE_CHECKING:
    from ..convert.calibration_text import CalibrationOptions
    from ..convert.recipe import Recipe

SCRIPT = "export.py"


def main(argv: Sequence[str] | None = None) -> int:
    """The command `export.py SRC OUT`; its exit status, as cli/command.py lists them."""
    return answer(argv, script=SCRIPT, parse=parse, work=_work, ended=_ended)


def _ended(args: argparse.Namespace, word: str) -> str:
    from ..convert.calibration_state import finished, folder

    target = Path(os.path.realpath(args.target or ""))
    if (args.calibrate is None and args.importance is None) or not finished(target):
        return f"error: {_subject(args)}: {word}, nothing was written"
    done, kept = len(finished(target)), folder(target)
    return f"{args.target}: {word} after block {done}; the same command goes on from there ({kept.name})"


def _subject(args: argparse.Namespace) -> str:
    """The file that an error is about if the error names none."""
    subject: str = args.target or args.source
    return subject


def _work(args: argparse.Namespace) -> int:
    # the export has its own threads, and OpenBLAS would end the process if a limit keeps it from starting any
    # a calibration multiplies matrices, one after the other
    calibrates = args.calibrate is not None or args.importance is not None
    blas = args.threads or default_threads() if calibrates else 1
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(blas))
    progress = None if args.quiet else Progress(describe_bytes)
    try:
        with concerning(_subject(args)):
            lines = _lines(args, progress)
    finally:
        if progress:
            progress.clear()
    if args.estimate:
        print(*lines, sep="\n")
    elif not args.quiet:
        with unheard():
            print(*lines, sep="\n", file=sys.stderr, flush=True)
    return 0


def _lines(args: argparse.Namespace, progress: Progress | None) -> list[str]:
    """Export, or only estimate; returns the lines to print."""
    if progress:
        progress.say(f"reading {args.source}")
    from ..convert.export import estimate, export
    from ..convert.huggingface import CheckpointOptions

    options = {key: getattr(args, key) for key in CheckpointOptions.__optional_keys__}
    options["recipe"] = _recipe(args)
    source, own_name = export_source(args.source, quiet=args.quiet)
    options["name"] = args.name or own_name
    if args.estimate:
        return [*estimate(source, args.target, force=args.force, **options).lines()]
    report = export(
        source,
        args.target,
        force=args.force,
        threads=args.threads,
        lora=args.lora,
        calibrate=_calibration(args, progress),
        progress=functools.partial(_draw, progress) if progress else None,
        **options,
    )
    return [*report.lines()]


def _recipe(args: argparse.Namespace) -> Recipe | None:
    """What --bits or --recipe says; None: what the source asks for."""
    from ..convert import recipe

    if args.recipe is not None:
        with concerning(args.recipe):
            return recipe.read(args.recipe)
    return None if args.bits is None else recipe.of_bits(args.bits)


def _calibration(args: argparse.Namespace, progress: Progress | None) -> CalibrationOptions | None:
    """What --calibrate or --importance says."""
    from ..convert.calibration_text import CalibrationOptions

    if args.calibrate is None and args.importance is None:
        return None
    text, feedback = (args.calibrate, True) if args.importance is None else (args.importance, False)
    if progress is None:
        return CalibrationOptions(text, feedback)
    calibrating: Progress | None = None

    def say(line: str) -> None:
        progress.clear()
        with unheard():
            print(line, file=sys.stderr, flush=True)

    def draw(done: float, total: float) -> None:
        nonlocal calibrating
        calibrating = calibrating or Progress(lambda *_: "calibrated", start=done)
        calibrating(done, total)
        if done >= total:
            calibrating.clear()

    return CalibrationOptions(text, feedback, say, draw)


def _draw(progress: Progress, done: int, total: int) -> None:
    progress(done, total)
    if done == total:
        progress.say("writing to disk")


def describe_bytes(done: float, total: float, rate: float) -> str:
    """The words of the progress line: bytes of the source read, and how fast."""
    return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB  {rate / 1e6:.0f} MB/s"


# ----------------------------------------------------------------------------
# Arguments


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of export.py; exits with an error if they contradict each other."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads is {args.threads}, at least 1 is needed")
    if args.bits is not None and args.recipe is not None:
        parser.error("--bits and --recipe both say how many bits; give one of them")
    if not args.source:
        parser.error("SRC is an empty text")
    if not args.target and not args.estimate:
        parser.error("OUT.bin is missing; with --estimate nothing is written")
    if args.target and not os.path.isdir(args.source) and os.path.isdir(args.target):
        parser.error(f"{args.target} is a directory and {args.source} is not: the order is SRC OUT.bin")
    return args


def _parser() -> Parser:
    parser = Parser(
        SCRIPT,
        usage=f"{program_name(SCRIPT)} SRC OUT.bin [options]",
        description="Convert a Hugging Face model directory or a GGUF file into one model.bin.",
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        help="directory with config.json, tokenizer.json, *.safetensors; or a GGUF file; or the name of a "
        "model on the Hugging Face Hub, such as Qwen/Qwen3-0.6B",
    )
    add(
        "target",
        metavar="OUT.bin",
        nargs="?",
        help="file to write; one that exists is replaced if it is a model.bin or empty",
    )
    add("--force", action="store_true", help="replace OUT.bin whatever it is")
    add("--estimate", action="store_true",
        help="only say how large the file and the memory it takes would be; reads no weight, writes "
            "nothing")  # fmt: skip
    add("--bits",
        help="about how many bits a weight takes: 4, 4.5, 5, 6, 8 (default: 8; of a quantised GGUF file no "
            "fewer than it has)")  # fmt: skip
    add("--recipe", metavar="FILE", help="TOML file: which matrix is int4, int6 or int8 (docs/FORMAT.md)")
    by_data = parser.add_mutually_exclusive_group().add_argument
    by_data("--calibrate", metavar="TEXT", nargs="?", const="",
        help="choose the codes of int4 and int6 for the inputs that a text or chat JSONL gives them "
            "(default: a built-in mix); takes minutes to hours, goes on where interrupted")  # fmt: skip
    by_data("--importance", metavar="TEXT", nargs="?", const="",
        help="the quicker way: only weigh the columns by these inputs")  # fmt: skip
    sizes = ", ".join(map(str, format.GROUP_SIZES))
    add("--group-size", type=int,
        help=f"weights per scale: {sizes} (default: 64; 32 for quantised GGUF files and for fewer bits than "
            "8)")  # fmt: skip
    add("--lora", metavar="DIR", help="merge this PEFT adapter into the weights")
    add("--threads", type=int, help="threads (default: the physical cores this process may use)")
    add("--name", help="what the model calls itself (default: from config.json)")
    add("--yarn", type=float, metavar="FACTOR", help="stretch the context by this factor (default: as it is)")
    add("--yarn-attn-factor", type=float, metavar="X",
        help="factor on the rotary cosine and sine of a YaRN model (default: as transformers computes "
            "it)")  # fmt: skip
    add("--quiet", action="store_true", help="print errors only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
