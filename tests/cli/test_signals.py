"""What signals do while a block of cli/signals.py runs, and that the old handlers come back.

python -m pytest tests/cli/test_signals.py
"""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from qwen3c.cli.signals import ENDING, Ended, answering, endable, ending, interruptible


def test_the_first_signal_to_end_is_a_ctrl_c_and_the_others_are_ignored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with endable() as ended:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        assert ended() == signal.SIGHUP
    with endable() as ended, interruptible() as interrupted:
        signal.raise_signal(signal.SIGTERM)  # SIGTERM, like Ctrl-C here, only asks for the end
        assert interrupted() and ended() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with endable() as ended:
            signal.raise_signal(signal.SIGHUP)
            assert not ended()
    finally:
        signal.signal(signal.SIGHUP, ignored)


@pytest.mark.parametrize("name", ENDING)
def test_what_is_done_at_the_end_is_not_disturbed_by_further_signals(name: str) -> None:
    with pytest.raises(Ended) as ended, ending():
        try:
            signal.raise_signal(getattr(signal, name))
        finally:
            for other in ENDING:
                signal.raise_signal(getattr(signal, other))
    assert ended.value.status == 128 + getattr(signal, name)
    assert ended.value.word == ENDING[name]


def test_a_signal_that_the_caller_ignores_ends_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with ending():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_handlers_come_back_unless_there_are_newer_ones() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with answering(lambda number, frame: None, "SIGTERM"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    with answering(lambda number, frame: None, "SIGTERM"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


@pytest.mark.parametrize("name", ENDING)
def test_libraries_that_load_are_left_at_once(name: str) -> None:
    """The process ends without `finally` or `except`: a library that catches everything cannot go on."""
    script = f"""
import signal
from qwen3c.cli.signals import leaving_at_once
with leaving_at_once("train.py"):
    try:
        signal.raise_signal(signal.{name})
    except BaseException:
        print("caught")
    finally:
        print("cleaned up")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + getattr(signal, name), "")
    assert done.stderr == f"\ntrain.py: {ENDING[name]}\n"
