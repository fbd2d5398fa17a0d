#!/usr/bin/env python3
"""Training data of the model in the box, from the standard library of the Python that runs this.

    python recipe/corpus.py build/box

writes `text/train/` and `text/validation/`: one file per module, split by document. The same library and seed give
the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Folders that hold no library source: tests, other people's packages, bundled wheels; or tables and the same
# twenty lines a hundred times over (encodings).
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "__pycache__",
    "_bundled",
    "pydoc_data",
    "msilib",
    "encodings",
}
SKIPPED_FILES = re.compile(r"_sysconfigdata.*|this\.py|entities\.py|_?pydoc_topics\.py|__phello__.*")
TABLE_LINES = 40  # a literal that spans more lines is a table
DATA_SHARE = 0.5  # a module with a larger share of lines without a word of code is data
SMALLEST_DOCUMENT = 200  # characters
VALIDATION_SHARE = 0.05
SEED = 11  # of CPython 3.11, a validation side of 5.5 % of the text in which no module outweighs the others
DATA_LINE = re.compile(r"""[\s\d(){}\[\],:+.\-"'\\xXa-fA-F]*(#.*)?""")


@dataclass(frozen=True)
class Document:
    """One module: `path` relative to the library, its normalised source, and which side of the split it is on."""

    path: str
    text: str
    validation: bool


def is_validation(path: str, seed: int) -> bool:
    """The split depends on the path and the seed alone: it stays when other files come or go."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def is_table(node: ast.stmt) -> bool:
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
        return False
    literal = isinstance(node.value, (ast.Dict, ast.List, ast.Tuple, ast.Set, ast.Constant))
    return literal and (node.end_lineno or 0) - node.lineno >= TABLE_LINES


def normalise(source: str) -> str | None:
    """The source with spaces for tabs, no trailing blanks, no tables; None for what is not code."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    lines = source.replace("\f", "").split("\n")
    for node in reversed(tree.body):
        if is_table(node):
            del lines[node.lineno - 1 : node.end_lineno]
    lines = [line.expandtabs(8).rstrip() for line in lines]
    text = re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip() + "\n"
    filled = [line for line in text.split("\n") if line]
    if sum(DATA_LINE.fullmatch(line) is not None for line in filled) > DATA_SHARE * len(filled):
        return None
    try:
        ast.parse(text)
    except SyntaxError:
        return None
    return text


def read_library(source: Path, seed: int) -> Iterator[Document]:
    """Every module of the library that is code, in the order of its path."""
    for file in sorted(source.rglob("*.py"), key=lambda file: file.relative_to(source).as_posix()):
        path = file.relative_to(source)
        if (
            SKIPPED_FOLDERS & set(path.parts)
            or SKIPPED_FILES.fullmatch(path.name)
            or path.parts[0].startswith("config-")
        ):
            continue
        try:
            text = normalise(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if text is not None and len(text) >= SMALLEST_DOCUMENT:
            yield Document(path.as_posix(), text, is_validation(path.as_posix(), seed))


def write_text(documents: list[Document], out: Path) -> None:
    for split in ("train", "validation"):
        folder = out / "text" / split
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.py"):
            old.unlink()
        for document in documents:
            if document.validation == (split == "validation"):
                (folder / document.path.replace("/", ".")).write_text(document.text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the training data of the model in the box.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="a Python library (default: this Python's)",
    )
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    documents = list(read_library(args.source, args.seed))
    if not any(document.validation for document in documents) or all(
        document.validation for document in documents
    ):
        print(
            f"{args.source}: {len(documents)} modules; too few for training and validation text",
            file=sys.stderr,
        )
        return 2
    write_text(documents, args.out)
    for split in ("train", "validation"):
        texts = [document.text for document in documents if document.validation == (split == "validation")]
        print(f"{split:<12}{len(texts):>6} documents{sum(map(len, texts)):>12} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
