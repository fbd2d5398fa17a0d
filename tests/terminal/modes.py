"""The modes of run.py that end by themselves, as typed; for test_modes.py and test_coverage.py."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from screen import ROOT
from small_models import TINY_QWEN3

PROMPT = "def fibonacci(n):"
SLOWLY = [sys.executable, str(Path(__file__).with_name("slowly.py"))]
TEXT = "def add(a, b):\n    return a + b\n\n\n" * 60
MODES = {
    "generate": ["-m", "generate", "-i", PROMPT, "-n", "12", "-s", "1"],
    "trace": ["-m", "trace", "-i", PROMPT],
    "trace --html": ["-m", "trace", "-i", PROMPT, "--html", "page.html", "-n", "4"],
    "info": ["-m", "info"],
    "info --verify": ["-m", "info", "--verify"],
    "perplexity": ["-m", "perplexity", "text.txt"],
    "bench": ["-m", "bench"],
    "batch": ["-m", "batch", "requests.jsonl", "-o", "-"],
}


def furnish(folder: Path) -> None:
    """Put there what the modes read."""
    (folder / "text.txt").write_text(TEXT)
    body = {"messages": [{"role": "user", "content": "def"}], "max_tokens": 30}
    request = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    lines = [json.dumps({"custom_id": f"{i}", **request}) + "\n" for i in range(24)]
    (folder / "requests.jsonl").write_text("".join(lines))


def one_thread(mode: str) -> list[str]:
    """The flags for one thread, where a mode computes: two on a busy machine wait for each other."""
    return [] if mode.startswith("info") else ["-j", "1"]


@dataclass(frozen=True)
class Desk:
    """Where commands are typed: a folder with what furnish() puts there, and a model."""

    folder: Path
    model: Path = TINY_QWEN3

    def command(self, mode: str, *more: str, pace: str = "") -> list[str]:
        """One of MODES with more flags; pace: of slowly.py, none: as it is."""
        script = [*SLOWLY, pace, "run.py"] if pace else [sys.executable, str(ROOT / "run.py")]
        return [*script, str(self.model), *one_thread(mode), *MODES[mode], *more]
