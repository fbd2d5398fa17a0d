"""Checkpoints: whole directories that appear at once, under their final name, or not at all.

OUT/                      the best model so far, a Hugging Face directory
OUT/metrics.jsonl         one line per logged step, evaluation and reward
OUT/curves.png
OUT/checkpoints/step-N/   a Hugging Face directory and trainer.pt: what resuming needs
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import replacing, sync, sync_directory
from . import TrainingError

FOLDER = "checkpoints"
STATE = "trainer.pt"
_NAME = re.compile(r"step-(\d+)$")


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in out.glob(f"{FOLDER}/step-*") if (m := _NAME.match(p.name))]
    return [path for _, path in sorted(found)]


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary directory, then give it its name; an older one of the name goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            sync(file)
        sync_directory(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(directory: Path, out: Path) -> None:
    """Copy the model files of a checkpoint into `out`, each one replaced at once, the weights last."""
    files = [p for p in directory.iterdir() if p.is_file() and p.name != STATE]
    for file in sorted(files, key=lambda p: (p.suffix == ".safetensors", p.name)):
        with replacing(out / file.name) as temporary:
            shutil.copyfile(file, temporary)


def prune(out: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what writers that were killed left behind."""
    for path in checkpoints(out)[:-keep]:
        shutil.rmtree(path)
    for path in out.glob(f"{FOLDER}/.step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


class Metrics:
    """metrics.jsonl: a record per line. On resuming, lines after the checkpoint's step are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path.exists():
            self.records = [r for r in read_metrics(path) if r["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut short by a kill is left out."""
    records = []
    lines = path.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise TrainingError(f"{path}: line {number} is not JSON") from None
    return records
