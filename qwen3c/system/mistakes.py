"""What was given in place of a model, told by its first bytes, name or neighbours; and what to do with it.

Two programs ask: the one that opens a model.bin (format.py), and the exporter, which reads a directory or a
GGUF file (convert/). Each function returns a piece of an error message about a path, or "" where it has
nothing to say.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from . import names

MODEL_BIN = b"QWEN3C\x1a\n"  # what every model.bin begins with
GGUF = b"GGUF"
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, by the format's own rule
START = 64  # how many bytes of a file tell its kind

_LFS = b"version https://git-lfs.github.com/spec/"
_PYTORCH = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")  # zip archives, and the bare pickles before
_PICKLED = "is never opened: only safetensors are read"
_SAVE_AGAIN = "transformers saves a model as safetensors: save_pretrained()"

# kind of a file -> what to say where a model.bin was expected, and where the source of an export was
_ADVICE = {
    "model.bin": ("", "is a model.bin already: run.py {path} runs it"),
    "GGUF": ("a GGUF file; `python export.py {path} model.bin` converts it", ""),
    "git-lfs": (
        "a git-lfs pointer; `git lfs pull` in its folder fetches the file itself",
        "is a git-lfs pointer in place of the file: `git lfs pull` in its directory fetches it",
    ),
    "PyTorch": (
        "a PyTorch or zip file; export.py converts a folder with *.safetensors, or a GGUF file",
        f"is a PyTorch file, which {_PICKLED}; {_SAVE_AGAIN}",
    ),
    "web page": (
        "a web page; the download brought no model; `python run.py OWNER/NAME` fetches one",
        "is a web page: download the file that the page is about",
    ),
    "safetensors": (
        "a safetensors file; `python export.py {folder} model.bin` converts its folder",
        "is a safetensors file: give its directory, {folder}",
    ),
    "JSON": (
        "a JSON file; `python export.py {folder} model.bin` converts the folder of a model",
        "is a JSON file: give the directory of the model, {folder}",
    ),
}


# ----------------------------------------------------------------------------
# Files


def kind_of(start: bytes) -> str:
    """The kind of a file, a key of _ADVICE. start: its first START bytes, or all of a shorter file."""
    if start.startswith(MODEL_BIN):
        return "model.bin"
    if start.startswith(GGUF):
        return "GGUF"
    if start.startswith(_LFS):
        return "git-lfs"
    if start.startswith(_PYTORCH):
        return "PyTorch"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_SAFETENSORS_HEADER:
        return "safetensors"
    return {b"{": "JSON", b"<": "web page"}.get(start.lstrip()[:1], "")


def in_place_of_model_bin(path: str, start: bytes) -> str:
    """What the file at `path` is; start: its first bytes. Goes behind "not a model.bin but"."""
    return _advice(path, start)[0]


def in_place_of_source(path: Path, start: bytes) -> str:
    """What the file at `path` is if no GGUF file; start: its first bytes. Goes behind the path."""
    return _advice(os.fspath(path), start)[1]


def in_place_of_part(start: bytes) -> str:
    """What stands in place of a file of a Hugging Face directory, such as a pointer of git-lfs."""
    return _ADVICE["git-lfs"][1] if kind_of(start) == "git-lfs" else ""


def _advice(path: str, start: bytes) -> tuple[str, str]:
    names = {"path": shlex.quote(path), "folder": shlex.quote(os.path.dirname(path) or ".")}
    for_model, for_source = _ADVICE.get(kind_of(start), ("", ""))
    return for_model.format(**names), for_source.format(**names)


def is_model_file(path: Path) -> bool:
    """Whether a file is a model.bin, as far as its first bytes say."""
    if not path.is_file():  # opening a FIFO would block
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(MODEL_BIN)) == MODEL_BIN
    except OSError:
        return False


# ----------------------------------------------------------------------------
# Nothing there


def hub_name(given: str) -> names.Name | None:
    """The name on the Hugging Face Hub that `given` is; None if it is none, or not spelled as one."""
    try:
        return names.parse(given)
    except ValueError:
        return None


def download(given: str) -> str:
    """The command that downloads a model's own files, if `given` is a name on the Hugging Face Hub."""
    name = hub_name(given)
    return f"hf download {name.repository} --local-dir {name.own}" if name else ""


def missing_model_bin(path: str) -> str:
    """What to do where a model.bin was expected at `path` and nothing is there; goes behind the complaint."""
    name = hub_name(path)
    if name is None:
        return "; `python export.py DIR model.bin` makes one of a Hugging Face model or a GGUF file"
    command = f"`python run.py {shlex.quote(str(name))}`"
    return f"; {command} fetches it from the Hugging Face Hub, in Python Model.from_hub({str(name)!r})"


def missing_source(given: str) -> str:
    """What to do where the user wrote `given` for a directory and nothing is there."""
    name = hub_name(given)
    if name is None:
        return ""
    return f"`python export.py {shlex.quote(str(name))} model.bin` fetches it from the Hugging Face Hub"


# ----------------------------------------------------------------------------
# A directory


def directory_for_model_bin(directory: Path) -> str:
    """What to do where a model.bin was expected and a directory is there; goes behind the complaint."""
    for path in _model_files(directory):
        return f"; did you mean {path}?"
    convertible = [directory] if (directory / "config.json").is_file() else sorted(directory.glob("*.gguf"))
    for path in convertible:
        return f"; `python export.py {shlex.quote(os.fspath(path))} model.bin` converts it"
    return ""


def directory_without_config(directory: Path) -> str:
    """What a directory without a config.json is, where a model's was expected; goes behind its path."""
    if (directory / "adapter_config.json").exists():
        return "is a LoRA adapter: give the directory of its base model, and this one after --lora"
    for path in sorted(directory.glob("*.gguf")):
        return f"is a directory with a GGUF file in it: give the file, {path}"
    for path in _model_files(directory):
        return f"is a directory with a model.bin in it: run.py {path} runs it"
    for config in sorted(directory.glob("snapshots/*/config.json")):
        return f"is a folder of the download cache: the model is in {config.parent}"
    for config in sorted(directory.glob("*/config.json")):
        return f"has no config.json, but {config.parent} has"
    return ""


def directory_without_weights(directory: Path) -> str:
    """What a directory with a config.json has in place of safetensors; goes behind the complaint."""
    for path in sorted(directory.glob("*.gguf")):
        return f", but a GGUF file: give the file, {path}"
    for path in sorted([*directory.glob("*.bin"), *directory.glob("*.pt*")]):
        return f" ({path.name} {_PICKLED}); {_SAVE_AGAIN}"
    return ""


def _model_files(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.glob("*.bin")) if is_model_file(path)]
