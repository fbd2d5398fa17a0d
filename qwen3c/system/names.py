"""Names of models on the Hugging Face Hub, as people write them.

Qwen/Qwen3-0.6B                                  the newest revision, main
Qwen/Qwen3-0.6B@c1899de                          another: a branch, a tag or a commit
Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf        a GGUF file of a repository
hf.co/Qwen/Qwen3-0.6B, https://huggingface.co/Qwen/Qwen3-0.6B    where a path could be meant, too
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

MAIN = "main"  # the revision that a name without one means
_PART = r"[A-Za-z0-9][\w.-]*"
_SITE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/")
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w./-]+))?(?::(.+))?", re.ASCII)
_FILES = (".bin", ".gguf", ".safetensors", ".json", ".toml", ".txt")  # endings of names that are no model's
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Name:
    """A model on the Hub: its repository, OWNER/NAME, a revision, and a GGUF file, "" for safetensors."""

    repository: str
    revision: str = MAIN
    file: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return self.repository + revision + (f":{self.file}" if self.file else "")

    @property
    def own(self) -> str:
        """The name without its owner."""
        return self.repository.partition("/")[2]


def parse(given: str) -> Name | None:
    """The name of a model, if `given` looks like one and not like a path.

    It is a path where the folder before the slash exists here, unless the site stands before it. ValueError,
    one line, if it begins as a name does and does not go on as one.
    """
    site = _SITE.match(given)
    match = _NAME.fullmatch(given[site.end() if site else 0 :].rstrip("/"))
    if match is None:
        return None
    repository, revision, file = match.groups()
    if repository.endswith(_FILES) or "--" in repository or ".." in repository:
        return None
    if not site and os.path.exists(os.path.dirname(repository)):
        return None
    if revision is not None and ".." in revision:
        raise ValueError(f"{given}: {revision} is not a revision: a branch, a tag or a commit")
    if file is not None and (
        not file.endswith(".gguf") or file.startswith("/") or ".." in file or "\\" in file
    ):
        raise ValueError(f"{given}: after the colon stands a GGUF file of {repository}, as it is named there")
    return Name(repository, revision or MAIN, file or "")


def is_commit(revision: str) -> bool:
    """Whether a revision is the whole hash of a commit, which never means anything else."""
    return _COMMIT.fullmatch(revision) is not None
