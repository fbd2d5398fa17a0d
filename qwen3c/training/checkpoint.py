"""Checkpoints: whole directories that appear at once, under their final name, or not at all.

OUT/                      the best model so far, a Hugging Face directory
OUT/metrics.jsonl         one line per logged step, evaluation and reward
OUT/curves.png
OUT/checkpoints/step-N/   a Hugging Face directory and trainer.pt: what resuming needs
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..system.files import replacing, sync, sync_directory
from . import TrainingError

FOLDER = "checkpoints"
STATE = "trainer.pt"
METRICS, CURVES = "metrics.jsonl", "curves.png"
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.*",
    "*.safetensors", "*.safetensors.index.json",
)  # fmt: skip
_NAME = re.compile(r"step-(\d+)$")
_TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp$")  # the temporary names that files.replacing gives


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in out.glob(f"{FOLDER}/step-*") if (m := _NAME.match(p.name))]
    return [path for _, path in sorted(found)]


def check_free(out: Path) -> None:
    """TrainingError, naming what is there, if a new run must not write into `out`."""
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out}: is a file; -o takes a folder")
    if checkpoints(out):
        raise TrainingError(
            f"{out}: holds a run already; --resume goes on with it, or choose another directory "
            "(--force begins anew and removes it)"
        )
    found = model_files(out)
    if found:
        names = ", ".join(path.name for path in found[:4]) + (", ..." if len(found) > 4 else "")
        raise TrainingError(
            f"{out}: holds {_model_name(out)} that no run left checkpoints of ({names}); choose another "
            "directory "
            "(--force replaces it)"
        )


def model_files(directory: Path) -> list[Path]:
    """The files of a Hugging Face model in a directory."""
    found = {path for pattern in MODEL_FILES for path in directory.glob(pattern)}
    return sorted(path for path in found if not path.name.startswith("."))


def _model_name(directory: Path) -> str:
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
        return f"a model ({config['architectures'][0]})"
    except (OSError, ValueError, LookupError, TypeError):
        return "a model"


def begin(out: Path) -> None:
    """Make `out` ready for a new run: remove an earlier run's files, but its model only when replaced."""
    out.mkdir(parents=True, exist_ok=True)
    for path in [*checkpoints(out), *out.glob(f"{FOLDER}/.step-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)
    for name in (METRICS, CURVES):
        (out / name).unlink(missing_ok=True)


def tidy(out: Path) -> None:
    """Remove temporary files in `out` that killed writers left."""
    for path in out.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and (match[1] in (METRICS, CURVES) or any(Path(match[1]).match(p) for p in MODEL_FILES)):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, an error of writing becomes a TrainingError with this path and the reason; libraries omit one
    of them.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise TrainingError(f"{path}: cannot be written: {why}") from None


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary directory, then rename it to `path`, replacing an older one."""
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
    """Copy the model files of a checkpoint into `out`, each replaced atomically, the weights last.

    Files of an older model that this one lacks, such as a chat template or shards, are removed.
    """
    files = [p for p in directory.iterdir() if p.is_file() and p.name != STATE]
    for file in sorted(files, key=lambda p: (p.suffix == ".safetensors", p.name)):
        with replacing(out / file.name) as temporary:
            shutil.copyfile(file, temporary)
    for stale in {path.name for path in model_files(out)} - {file.name for file in files}:
        (out / stale).unlink()


def prune(out: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and temporary files that killed writers left."""
    for path in checkpoints(out)[:-keep]:
        shutil.rmtree(path)
    for path in out.glob(f"{FOLDER}/.step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


class Metrics:
    """metrics.jsonl: a record per line. On resuming, lines after the checkpoint's step are dropped.

    step: the checkpoint's; for a new run 0, and there is no file yet (see begin).
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path.exists():
            self.records = [r for r in read_metrics(path) if r["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; an unfinished last line, left by a killed run, is skipped."""
    records = []
    lines = path.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise TrainingError(f"{path}: line {number} is not JSON") from None
    return records


# ----------------------------------------------------------------------------
# Inputs: what must be equal for a run to be resumed

Inputs = dict[str, "str | int | float | None"]
"""Name -> value, as a person reads both ("--context": 256), or a fingerprint (see fingerprint)."""

_FINGERPRINT = "sha256:"


def fingerprint(parts: Iterable[bytes]) -> str:
    """A hash, as text, of a sequence of byte strings; other boundaries between them give another hash."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return _FINGERPRINT + whole.hexdigest()


def file_fingerprint(paths: Iterable[Path]) -> str:
    """The fingerprint of the contents of files, in this order."""

    def blocks() -> Iterable[bytes]:
        for path in paths:
            yield path.name.encode()
            with open(path, "rb") as file:
                while block := file.read(1 << 24):
                    yield block

    return fingerprint(blocks())


def check_inputs(path: Path, saved: Inputs, given: Inputs) -> None:
    """TrainingError, naming the first difference, if the checkpoint's run began with other inputs."""
    for name in dict.fromkeys([*saved, *given]):
        old, new = saved.get(name), given.get(name)
        if old == new:
            continue
        if str(old).startswith(_FINGERPRINT) and str(new).startswith(_FINGERPRINT):
            raise TrainingError(f"{path}: was made with another {name}: its contents are not the same")
        was, now = (_in_words(value) for value in (old, new))
        raise TrainingError(f"{path}: was made with {name} {was}, not {now}")


def _in_words(value: str | int | float | None) -> str:
    if value is None:
        return "not given"
    return "of other contents" if str(value).startswith(_FINGERPRINT) else str(value)
