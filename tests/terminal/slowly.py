"""A command with its work made slow, so that its progress is drawn as it is for a large model.

    python slowly.py drawn run.py -m perplexity text.txt

drawn    status lines appear at once
undrawn  never, however long the command takes; what stays on the screen must be the same
quick    nothing is slow; bench makes up what it measures, as it does with the others
quiet    nothing is slow, and status lines never appear, whatever else keeps the machine busy
at-once  nothing is slow or made up; status lines appear at once

When the slow part begins, a file `working` appears where the command runs.
"""

from __future__ import annotations

import functools
import math
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
HASTE = 50  # how much faster the clock of status lines runs
PAUSE = 0.02  # seconds that a piece of work takes at least


def main() -> None:
    pace, script, *arguments = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    if pace == "at-once":
        show_status_lines_at_once()
    elif pace == "quiet":
        hurry_status_lines(math.nan)
    else:
        shorten_bench(0.0 if pace == "quick" else 25 * PAUSE)
    if pace in ("drawn", "undrawn"):
        slow_down()
        hurry_status_lines(HASTE if pace == "drawn" else math.nan)
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def hurry_status_lines(haste: float) -> None:
    """haste: how much faster their clock runs; with NaN it is never time to draw one."""
    from qwen3c.system import terminal

    clock = SimpleNamespace(**{**vars(time), "monotonic": lambda: time.monotonic() * haste})
    terminal.time = clock  # type: ignore[assignment, attr-defined]


def show_status_lines_at_once() -> None:
    from qwen3c.system import terminal

    begin = terminal.StatusLine.__init__

    def begin_at_once(self: terminal.StatusLine, delay: float = 0.0, **options: float) -> None:
        begin(self, 0.0, **options)

    terminal.StatusLine.__init__ = begin_at_once  # type: ignore[assignment, method-assign]


def slow_down() -> None:
    """Passes of a reply, tokens of a perplexity, tensors that are verified."""
    from qwen3c import engine
    from qwen3c.drivers import batch
    from qwen3c.format import ModelFile

    pause_before(batch, "forward", PAUSE)
    pause_before(engine, "log_sum_exp", PAUSE / 20)
    pause_before(ModelFile, "_has_sound_tiles", PAUSE)


def shorten_bench(seconds: float) -> None:
    """Shrink the benchmark: few tokens, one run each, made-up limits that take `seconds` to measure."""
    from qwen3c.inspect import bench

    def measure(machine: bench.Machine) -> None:
        say_that_work_begins()
        time.sleep(seconds)
        machine.bandwidth.append(20e9)
        machine.peak.append(200e9)

    bench.Machine.measure = measure  # type: ignore[assignment, method-assign]
    bench.PROBE_BYTES = 1 << 20
    bench.QUICK_RUNS = (1, 1)
    bench.QUICK = tuple((kind, 4, words) for kind, _, words in bench.QUICK)  # type: ignore[assignment]
    bench.check_bits = lambda model: "bits not checked"


@functools.cache
def say_that_work_begins() -> None:
    Path("working").touch()


def pause_before(owner: object, name: str, seconds: float) -> None:
    function: Callable[..., Any] = getattr(owner, name)

    def slow(*args: Any, **options: Any) -> Any:
        say_that_work_begins()
        time.sleep(seconds)
        return function(*args, **options)

    setattr(owner, name, slow)


if __name__ == "__main__":
    main()
