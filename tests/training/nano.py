"""Data and runs that fit into a test: a language of small sums, and train.py in this process."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NANO = ["--dim", "32", "--hidden-dim", "64", "--n-layers", "2", "--n-heads", "2", "--n-kv-heads", "1",
        "--head-dim", "16",
        "--context", "64", "--vocab-size", "320", "--threads", "1"]  # fmt: skip


def train(*arguments: object) -> int:
    """train.py's main, as if its process had just begun."""
    from accelerate.state import AcceleratorState

    from qwen3c.cli.train import main

    AcceleratorState._reset_state(reset_partial_state=True)
    return main([str(a) for a in arguments])


def write_text(directory: Path, n_documents: int = 12, lines: int = 40) -> Path:
    """Documents of lines like `3 + 4 = 7`."""
    directory.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(1)
    for i in range(n_documents):
        pairs = [(numbers.randrange(10), numbers.randrange(10)) for _ in range(lines)]
        (directory / f"{i}.txt").write_text("".join(f"{a} + {b} = {a + b}\n" for a, b in pairs))
    return directory


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_chat(path: Path, n: int = 60) -> Path:
    numbers = random.Random(2)
    pairs = [(numbers.randrange(10), numbers.randrange(10)) for _ in range(n)]
    return write_jsonl(path, [conversation(f"{a} + {b}?", str(a + b)) for a, b in pairs])


def write_tasks(path: Path) -> Path:
    tasks = [(a, b) for a in range(5) for b in range(5)]
    return write_jsonl(
        path,
        [{"messages": [{"role": "user", "content": f"{a} + {b}?"}], "answer": str(a + b)} for a, b in tasks],
    )


def write_jsonl(path: Path, values: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def losses(directory: Path) -> list[float]:
    """The losses of every step, in order."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def environment() -> dict[str, str]:
    """The environment for a train.py in its own process."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


# Rewards that tests name as nano:...


def digits(prompt: str, completion: str, task: dict[str, Any]) -> float:
    """The share of digits: easy to raise."""
    return sum(c.isdigit() for c in completion) / max(len(completion), 1)


def raises(prompt: str, completion: str, task: dict[str, Any]) -> float:
    raise KeyError("no such thing")


def not_a_number(prompt: str, completion: str, task: dict[str, Any]) -> float:
    return float("nan")
