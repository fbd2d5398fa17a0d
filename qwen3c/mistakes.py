"""What was given in place of a model: told by its first bytes, its name or its neighbours, and what to do with it.

Each function returns the end of an error message about a path, such as "is a git-lfs pointer: ...", or "" where it
has nothing to say.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from . import format

START = 64  # bytes of a file that are enough for of_file
_LFS = b"version https://git-lfs.github.com/spec/"
_PICKLES = (
    b"PK\x03\x04",
    b"\x80\x02",
    b"\x80\x03",
    b"\x80\x04",
)  # PyTorch's zip archives, and what it wrote before
_HUB = re.compile(r"(?:(?:https?://)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)/?")
_PICKLED = "is never opened: only safetensors are read"
_SAVE_AGAIN = "transformers saves a model as safetensors: save_pretrained()"


def of_file(path: Path, start: bytes) -> str:
    """A file that is read as a GGUF file; `start` are its first START bytes."""
    if is_lfs_pointer(start):
        return is_lfs_pointer(start)
    if start.startswith(format.MAGIC):
        return f"is a model.bin already: run.py {path} runs it"
    if start[8:9] == b"{" and path.suffix == ".safetensors":
        return f"is a safetensors file: give its directory, {path.parent}"
    if start.startswith(_PICKLES):
        return f"is a PyTorch file, which {_PICKLED}; {_SAVE_AGAIN}"
    if start.lstrip()[:1] == b"{":
        return f"is a JSON file: give the directory of the model, {path.parent}"
    if start.lstrip()[:1] == b"<":
        return "is a web page: download the file that the page is about"
    return ""


def is_lfs_pointer(start: bytes) -> str:
    """A file of the model that git left on the server."""
    if not start.startswith(_LFS):
        return ""
    return "is a git-lfs pointer in place of the file: `git lfs pull` in its directory fetches it"


def missing_directory(directory: Path, given: str) -> str:
    """A directory that does not exist; `given` is what the user wrote for it."""
    hub = _HUB.fullmatch(given)
    if hub is None or os.path.isdir(directory.parent):
        return ""
    name = hub[1].rpartition("/")[2]
    return f"to get the model of that name: hf download {hub[1]} --local-dir {name}"


def directory_without_config(directory: Path) -> str:
    """A directory that has no config.json."""
    if (directory / "adapter_config.json").exists():
        return "is a LoRA adapter: give the directory of its base model, and this one after --lora"
    for path in sorted(directory.glob("*.gguf")):
        return f"is a directory with a GGUF file in it: give the file, {path}"
    for path in sorted(directory.glob("*.bin")):
        if is_model_file(path):
            return f"is a directory with a model.bin in it: run.py {path} runs it"
    for config in sorted(directory.glob("snapshots/*/config.json")):
        return f"is a folder of the download cache: the model is in {config.parent}"
    for config in sorted(directory.glob("*/config.json")):
        return f"has no config.json, but {config.parent} has"
    return ""


def directory_without_weights(directory: Path) -> str:
    """A directory that has a config.json, but no safetensors."""
    for path in sorted(directory.glob("*.gguf")):
        return f", but a GGUF file: give the file, {path}"
    for path in sorted([*directory.glob("*.bin"), *directory.glob("*.pt*")]):
        return f" ({path.name} {_PICKLED}); {_SAVE_AGAIN}"
    return ""


def is_model_file(path: Path) -> bool:
    """Whether a file is a model.bin, as far as its first bytes say."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(format.MAGIC)) == format.MAGIC
