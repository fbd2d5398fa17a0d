#!/usr/bin/env python3
"""Training data of the model in the box, from the standard library of the Python that runs this.

    python recipe/corpus.py build/box

writes

    text/train/, text/validation/            one file per module, split by document: for `train.py pretrain`
    chat.jsonl, chat_validation.jsonl        conversations: for `train.py sft`
    tasks.jsonl, tasks_validation.jsonl      sums with a checkable answer: for `train.py grpo`
    functions.jsonl                          functions to complete, whose text can be checked: likewise
    headers_validation.jsonl                 100 functions to complete   } of validation documents,
    questions_validation.jsonl               200 definitions to explain  } for evaluate.py
    manifest.json                            every document and file, with size and SHA-256

The same library and seed give the same bytes. Held-out data comes from validation documents alone.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import arithmetic
import conversations
import functions
import talk
from conversations import Sample
from functions import Definition

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
SEVERAL_TURNS, COMPARISONS, SORTINGS = 1200, 600, 600  # conversations of these kinds
REHEARSED = 1200  # functions as plain text among the conversations, so that completing text is not forgotten
TASKS, HELD_OUT_TASKS, HELD_OUT_HEADERS, HELD_OUT_QUESTIONS = 2000, 200, 100, 200
FUNCTION_TASKS, LONGEST_FUNCTION_TASK = 1000, 700  # characters of question and answer
DATA_LINE = re.compile(r"""[\s\d(){}\[\],:+.\-"'\\xXa-fA-F]*(#.*)?""")


@dataclass(frozen=True)
class Document:
    """One module: `path` relative to the library, normalised source, side of the split."""

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


def short_functions(definitions: Iterable[Definition]) -> dict[str, list[str]]:
    """By path, the documented short functions of a module and of its classes, each at the margin.

    In a module most functions are indented methods among others. Here each is alone and at the margin, as
    people write a function that is to be completed.
    """
    found: dict[str, list[str]] = {}
    for d in definitions:
        if conversations.is_short(d) and 0 < len(d.docstring) <= conversations.LONGEST_DOCSTRING:
            function = f"{conversations.header_with_docstring(d)}\n{d.body}\n"
            if functions.has_body(function):
                found.setdefault(d.path, []).append(function)
    return found


def write_text(documents: list[Document], short: dict[str, list[str]], out: Path) -> None:
    """Every module as a file of its side; beside it in train/, as NAME.functions.py, its short functions."""
    for split in ("train", "validation"):
        folder = out / "text" / split
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.py"):
            old.unlink()
        for document in documents:
            if document.validation == (split == "validation"):
                (folder / document.path.replace("/", ".")).write_text(document.text, encoding="utf-8")
    for path, texts in short.items():
        name = path.replace("/", ".").removesuffix(".py") + ".functions.py"
        (out / "text" / "train" / name).write_text("\n\n".join(texts), encoding="utf-8")


# ----------------------------------------------------------------------------
# Conversations and tasks


@dataclass(frozen=True)
class Side:
    """Documents of one side of the split and what they define."""

    documents: list[Document]
    definitions: list[Definition]

    @classmethod
    def of(cls, documents: list[Document], validation: bool) -> Side:
        homes = functions.public_homes({document.path: document.text for document in documents})
        own = [document for document in documents if document.validation == validation]
        return cls(
            own, [d for document in own for d in functions.definitions(document.path, document.text, homes)]
        )

    def module_sentences(self) -> dict[str, str]:
        return {functions.module_name(d.path): functions.module_sentence(d.text) for d in self.documents}


def chat_samples(side: Side, validation: bool, parameters: str, seed: int) -> list[Sample]:
    """Every conversation of one side, shuffled; those longer than a context are dropped."""
    random = Random(f"{seed}:{validation}:chat")
    sums = list(arithmetic.exchanges("validation" if validation else "chat", seed))
    sums = sums[:100] if validation else sums
    small_talk = list(talk.exchanges(parameters))
    random.shuffle(small_talk)
    held_out = len(small_talk) // 20
    small_talk = small_talk[:held_out] if validation else small_talk[held_out:]
    scale = 20 if validation else 1
    samples = list(conversations.about_definitions(side.definitions, seed))
    samples += conversations.about_modules(side.module_sentences(), side.definitions, seed)
    samples += conversations.in_several_turns(
        side.definitions, small_talk, sums, SEVERAL_TURNS // scale, seed
    )
    samples += [Sample("sums", exchange) for exchange in sums]
    samples += [Sample("comparisons", arithmetic.comparison(random)) for _ in range(COMPARISONS // scale)]
    samples += [Sample("sorting", arithmetic.sorting(random)) for _ in range(SORTINGS // scale)]
    samples += [Sample("small talk", exchange) for exchange in small_talk]
    samples = [s for s in samples if s.characters <= conversations.LONGEST_SAMPLE]
    random.shuffle(samples)
    return list(conversations.with_system(samples, seed))


def held_out_headers(train: Side, validation: Side, count: int, seed: int) -> list[dict[str, Any]]:
    """Headers of functions in validation documents whose docstring is nowhere in the training text."""
    known = {d.docstring for d in train.definitions}
    chosen = [
        d
        for d in validation.definitions
        if conversations.is_short(d)
        and 0 < len(d.docstring) <= conversations.LONGEST_DOCSTRING
        and d.docstring not in known
        and functions.has_body(f"{conversations.header_with_docstring(d)}\n{d.body}")
    ]
    return [
        {
            "path": d.path,
            "name": d.name,
            "header": conversations.header_with_docstring(d) + "\n",
            "body": d.body,
        }
        for d in sample(chosen, count, seed, "headers")
    ]


def held_out_questions(train: Side, validation: Side, count: int, seed: int) -> list[dict[str, Any]]:
    """Questions "what does this code do" about validation documents whose answers no training sample has."""
    known = {d.sentence for d in train.definitions}
    chosen = list(
        {d.sentence: d for d in validation.definitions if d.sentence and d.sentence not in known}.values()
    )
    lines: list[dict[str, Any]] = []
    for d in sample(chosen, count, seed, "questions"):
        question, answer = conversations.of_code(d, Random(f"{seed}:{conversations.full_name(d)}:question"))
        messages = [{"role": "user", "content": question}]
        lines.append({"path": d.path, "name": d.name, "messages": messages, "answer": answer})
    return lines


def sample(chosen: list[Definition], count: int, seed: int, purpose: str) -> list[Definition]:
    return Random(f"{seed}:{purpose}").sample(chosen, min(count, len(chosen)))


# ----------------------------------------------------------------------------
# Files


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_json_lines(path: Path, values: Iterable[object]) -> None:
    write_lines(path, (json.dumps(value, ensure_ascii=False) for value in values))


def manifest(documents: list[Document], out: Path, seed: int) -> dict[str, object]:
    """What the data was made from and what came out: every document and file with its size and SHA-256."""

    def entry(data: bytes) -> dict[str, object]:
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    return {
        "source": "the standard library of CPython",
        "python": platform.python_version(),
        "licence": "Python Software Foundation License Version 2 (PSF-2.0)",
        "seed": seed,
        "documents": {
            d.path: {"split": "validation" if d.validation else "train", **entry(d.text.encode())}
            for d in documents
        },
        "files": {file.name: entry(file.read_bytes()) for file in sorted(out.glob("*.jsonl"))},
    }


def table(train: list[Sample], validation: list[Sample]) -> str:
    """Counts and characters of conversations by kind; about four characters are a token."""
    lines = [f"{'':<20}{'train':>8}{'characters':>12}{'validation':>12}{'characters':>12}"]
    for kind in [*sorted({s.kind for s in train}), "all"]:
        cells = []
        for samples in (train, validation):
            own = [s.characters for s in samples if kind in (s.kind, "all")]
            cells += [len(own), sum(own)]
        lines.append(f"{kind:<20}{cells[0]:>8}{cells[1]:>12}{cells[2]:>12}{cells[3]:>12}")
    return "\n".join(lines)


def function_tasks(samples: list[Sample], count: int, seed: int) -> list[dict[str, Any]]:
    """Questions of the "complete" samples, short ones, with what rewards.function looks for in a reply."""
    tasks = []
    for sample in samples:
        if sample.kind == "complete" and sample.characters <= LONGEST_FUNCTION_TASK:
            question, code = sample.turns
            name, parameters = functions.name_and_parameters(code)
            if f"def {name}(" not in question:
                continue  # asked for by its description: the reply cannot know the name
            message = {"role": "user", "content": question}
            tasks.append({"messages": [message], "function": name, "parameters": parameters})
    return Random(f"{seed}:functions").sample(tasks, min(count, len(tasks)))


def write(documents: list[Document], out: Path, parameters: str, seed: int) -> None:
    """Everything, with a table of it on stdout."""
    train, validation = Side.of(documents, False), Side.of(documents, True)
    short = short_functions(train.definitions)
    write_text(documents, short, out)
    texts = {
        "train": [d.text for d in train.documents],
        "functions": [text for texts in short.values() for text in texts],
        "validation": [d.text for d in validation.documents],
    }
    for name, parts in texts.items():
        print(f"{name:<12}{len(parts):>6} documents{sum(map(len, parts)):>12} characters")
    chats = [chat_samples(side, side is validation, parameters, seed) for side in (train, validation)]
    rehearsed = Random(f"{seed}:rehearsed").sample(
        texts["functions"], min(REHEARSED, len(texts["functions"]))
    )
    texts_lines = (json.dumps({"text": text}, ensure_ascii=False) for text in rehearsed)
    write_lines(out / "chat.jsonl", [*(s.line() for s in chats[0]), *texts_lines])
    write_lines(out / "chat_validation.jsonl", (s.line() for s in chats[1]))
    print(table(*chats))

    records: dict[str, list[dict[str, Any]]] = {
        "tasks.jsonl": arithmetic.tasks("tasks", seed, TASKS),
        "tasks_validation.jsonl": arithmetic.tasks("validation", seed, HELD_OUT_TASKS),
        "functions.jsonl": function_tasks(chats[0], FUNCTION_TASKS, seed),
        "headers_validation.jsonl": held_out_headers(train, validation, HELD_OUT_HEADERS, seed),
        "questions_validation.jsonl": held_out_questions(train, validation, HELD_OUT_QUESTIONS, seed),
    }
    for name, values in records.items():
        write_json_lines(out / name, values)
        print(f"{name:<28}{len(values):>6}")
    origin = manifest(documents, out, seed)
    write_lines(out / "manifest.json", [json.dumps(origin, indent=1, ensure_ascii=False)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the training data of the model in the box.")
    parser.add_argument("out", type=Path, help="folder to write")
    library = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument(
        "--source", type=Path, default=library, help="a Python library (default: this Python's)"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--parameters", default="4 million", help="how many the model says it has (%(default)s)"
    )
    args = parser.parse_args(argv)
    # old modules hold escapes that newer Pythons warn about
    warnings.simplefilter("ignore", SyntaxWarning)
    documents = list(read_library(args.source, args.seed))
    if len({document.validation for document in documents}) < 2:
        few = f"{len(documents)} modules of code are too few for training and validation text"
        print(f"corpus.py: error: {args.source}: {few}", file=sys.stderr)
        return 2
    try:
        write(documents, args.out, args.parameters, args.seed)
    except OSError as error:
        print(f"corpus.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
