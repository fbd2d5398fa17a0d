"""What run.py is told: every option belongs to some modes, and the options tell the mode.

python -m pytest tests/cli/test_options.py
"""

from __future__ import annotations

import argparse
import re
import sys

import pytest
from commands import TINY, in_process

from qwen3c.cli import modes as run_modes, named, options as run_options
from qwen3c.cli.options import USED_BY, new_parser

pytestmark = pytest.mark.usefixtures("default_model")

ALL = {"chat", "generate", "trace", "info", "perplexity", "bench", "batch", "serve", "mcp", "models"}
MAKES_TEXT = {"chat", "generate", "trace"}
SAMPLING = (
    "-t 1", "-p 1", "-s 1", "--top-k 1", "--min-p 0.1", "--presence-penalty 1", "--frequency-penalty 1",
    "--repetition-penalty 1", "--logit-bias 5=1",
)  # fmt: skip
OPTIONS = [  # and the modes that use them
    (("-i x", "--chat-template", "--raw"), {"generate", "trace"}),
    (("--file /dev/null",), {"generate", "trace", "perplexity"}),
    (("--echo", "--schema x"), {"generate"}),
    (("-y x", "--system-file x", "-r 1", "--think", "--no-think"), MAKES_TEXT),
    (("-n 1", "--stop x", *SAMPLING), MAKES_TEXT),
    (("-c 0",), MAKES_TEXT | {"perplexity", "batch", "serve", "mcp"}),
    (("-j 1", "--kv f16", "--huge-pages", "--isa scalar"), ALL - {"info", "models"}),
    (("--activations int8",), ALL - {"info", "serve", "models"}),
    (
        (
            "--host x",
            "--port 1",
            "--fd 3",
            "--config x",
            "--print-config",
            "--api-keys x",
            "--max-gap 1",
            "--cache-memory x",
            "--queue 1",
            "--running 1",
            "--cors-origin x",
            "--allowed-host x",
            "--drain 1",
            "--log-json",
            "--no-metrics",
            "--metrics",
            "--model-alias a=b",
            "--idle-unload 1",
        ),
        {"serve"},
    ),
    (("--hide-thinking", "--json --logprobs 1"), {"chat", "generate"}),
    (("--json",), ALL - {"bench", "batch", "serve", "mcp"}),
    (("--level compact", "--html x"), {"trace"}),
    (("--verify",), {"info"}),
    (("-o y", "--concurrency 1", "--max-memory x"), {"batch"}),
    (("--mcp x",), {"chat", "serve"}),
    (("--bits 4",), ALL - {"models"}),
    (("--prune",), {"models"}),
]


@pytest.mark.parametrize("mode", sorted(ALL))
def test_a_mode_refuses_in_one_line_every_option_that_it_does_not_use(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_modes, "MODES", dict.fromkeys(run_options.MODES, lambda args: 0))
    monkeypatch.setattr(named, "model_file", lambda given, bits: given)  # --bits is for no file
    for option, modes in [(option, modes) for options, modes in OPTIONS for option in options]:
        text = ["text"] * (mode == "perplexity" and "--file" not in option)
        text += ["requests", "-o", "x"] * (mode == "batch")
        done = in_process(capsys, TINY, *text, "-m", mode, *option.split())
        if mode in modes:
            assert (done.status, done.err) == (0, ""), option
            continue
        assert done.status == 2 and done.err.count("\n") == 1, option
        belongs = re.fullmatch(rf"run.py: error: (\S+) belongs to -m (.+), not to -m {mode}\n", done.err)
        assert belongs, done.err
        flags = set(belongs[1].split("/"))
        assert flags & set(option.split())
        if len(option.split()) < 3:
            assert set(re.split(", | or ", belongs[2])) == modes


def test_every_option_is_some_modes() -> None:
    dests = {action.dest for action in new_parser()._actions}
    assert dests - {"help", "version", "mode", "paths"} == USED_BY.keys()


def test_without_a_mode_the_options_tell_which_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen: list[str] = []

    def note(args: argparse.Namespace) -> int:
        chosen.append(args.mode)
        return 0

    monkeypatch.setattr(run_modes, "MODES", dict.fromkeys(run_options.MODES, note))
    for at_terminal in (True, False):
        monkeypatch.setattr(sys, "stdin", FakeStdin(at_terminal))
        for options, expected in [
            ("", "chat" if at_terminal else "generate"),
            ("-t 0.5 -y x", "chat" if at_terminal else "generate"),
            ("-i x", "generate"),
            ("--file x", "generate"),
            ("--raw", "generate"),
            ("--echo -i x", "generate"),
            ("--verify --json", "info"),
            ("--html x -i x", "trace"),
        ]:
            assert in_process(capsys, *options.split()).status == 0
            assert chosen.pop() == expected, (at_terminal, options)


class FakeStdin:
    def __init__(self, at_terminal: bool) -> None:
        self.isatty = lambda: at_terminal
