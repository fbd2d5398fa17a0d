"""The definitions of a module: functions, methods and classes with header, body and first sentence."""

from __future__ import annotations

import ast
import copy
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SENTENCE_LENGTHS = range(16, 241)  # characters of a sentence worth learning
TOOLS = {"idlelib", "lib2to3", "distutils", "turtledemo", "ensurepip"}  # programs more than libraries
PUBLIC_NAMES = {"posixpath": "os.path"}  # modules that users know by another name
SIGNATURE = re.compile(
    r"[\w.]+\(.*\)(\s*->.*|:)?|[\w.,\s]+=\s*[\w.]+\(.*\).*|.*\)\s*->.*"
)  # in place of a sentence


@dataclass(frozen=True)
class Definition:
    """One function or class of a module. module: where users find it; path: where it is written.

    header: on one line, as `def wrap(text, width=70):`. docstring: dedented, or "". sentence: the first of
    the docstring, or "". body: what follows the docstring, indented by four spaces; "" for a class.
    """

    module: str
    path: str
    name: str  # with its class, as TextWrapper.wrap
    kind: str  # "function", "method" or "class"
    header: str
    docstring: str
    sentence: str
    body: str

    @property
    def code(self) -> str:
        """The function without its docstring."""
        return f"{self.header}\n{self.body}"

    @property
    def public(self) -> bool:
        """Whether a user of the library may want to call it."""
        parts = [*self.module.split("."), *self.name.split(".")]
        return parts[0] not in TOOLS and not any(part.startswith("_") for part in parts)


def module_name(path: str) -> str:
    """xml/dom/minidom.py -> xml.dom.minidom; a package by its own name"""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def public_homes(texts: Mapping[str, str]) -> dict[str, str]:
    """ "asyncio.runners.run" -> "asyncio": the public module that re-exports a definition.

    texts: of all modules, by path. A package passes on what it imports from its own modules, any module what
    it imports from one whose name begins with an underscore; `import *` means that module's __all__.
    """
    trees = {module_name(path): ast.parse(text) for path, text in texts.items()}
    homes: dict[str, str] = {}
    for path in sorted(texts):
        module = module_name(path)
        for node in _imports(trees[module]):
            package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
            source = ".".join(filter(None, [package if node.level == 1 else "", node.module or ""]))
            own = path.endswith("__init__.py") and source.startswith(module + ".")
            if source not in trees or not (own or source.startswith("_")) or module.startswith("_"):
                continue
            for alias in node.names:
                for name in _exported(trees[source]) if alias.name == "*" else [alias.name]:
                    homes.setdefault(f"{source}.{name}", module)
    return homes


def _imports(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    for node in tree.body:
        inner = (
            [*node.body, *(s for handler in node.handlers for s in handler.body)]
            if isinstance(node, ast.Try)
            else [node]
        )
        yield from (statement for statement in inner if isinstance(statement, ast.ImportFrom))


def _exported(tree: ast.Module) -> list[str]:
    """The literal __all__ of a module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            strings = getattr(node.value, "elts", [])
            return [e.value for e in strings if isinstance(e, ast.Constant) and isinstance(e.value, str)]
    return []


def definitions(path: str, text: str, homes: Mapping[str, str]) -> Iterator[Definition]:
    """Functions and classes at the top level of a module and methods of these classes, in its order.

    homes: see public_homes.
    """
    lines = text.split("\n")
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield _definition(path, node, "", lines, homes)
        elif isinstance(node, ast.ClassDef):
            yield _definition(path, node, "", lines, homes)
            for member in node.body:
                if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield _definition(path, member, node.name + ".", lines, homes)


def module_sentence(text: str) -> str:
    return first_sentence(ast.get_docstring(ast.parse(text)) or "")


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring on one line, with its full stop; "" if it has none worth the name."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = [line.strip() for line in paragraph.strip().split("\n")]
        while lines and SIGNATURE.fullmatch(lines[0]):
            del lines[0]
        if not lines:
            continue
        sentence = re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+", " ".join(lines))[0]
        sentence = re.sub(r":\w+:`~?([^`]*)`", r"\1", sentence).replace("``", "").replace("`", "")
        sentence = re.sub(r"\s+", " ", sentence).rstrip(":;,. ")
        words = len(re.findall(r"[A-Za-z]{2,}", sentence))
        if (
            len(sentence) + 1 not in SENTENCE_LENGTHS
            or words < 3
            or not sentence[0].isalpha()
            or ">>>" in sentence
        ):
            return ""
        return sentence[0].upper() + sentence[1:] + ("" if sentence[-1] in "!?" else ".")
    return ""


def has_body(code: str) -> bool:
    """Whether `code` parses and begins with a function that does something: more than a docstring."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if not tree.body or not isinstance(tree.body[0], (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    return len(tree.body[0].body) > (ast.get_docstring(tree.body[0]) is not None)


def name_and_parameters(code: str) -> tuple[str, list[str]]:
    """Of the function that `code` begins with; self and cls are not counted."""
    found = ast.parse(code).body[0]
    assert isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef)
    arguments = [*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs]
    return found.name, [a.arg for a in arguments if a.arg not in ("self", "cls")]


Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definition(path: str, node: Node, owner: str, lines: list[str], homes: Mapping[str, str]) -> Definition:
    docstring = ast.get_docstring(node) or ""
    is_class = isinstance(node, ast.ClassDef)
    module, name = module_name(path), owner + node.name
    return Definition(
        module=homes.get(f"{module}.{name.split('.')[0]}", PUBLIC_NAMES.get(module, module)),
        path=path,
        name=name,
        kind="class" if is_class else "method" if owner else "function",
        header=_header(node),
        docstring=docstring,
        sentence=first_sentence(docstring),
        body="" if is_class else _body(node, lines),
    )


def _header(node: Node) -> str:
    """The definition up to its colon, on one line and without decorators."""
    hollow = copy.copy(node)
    hollow.decorator_list, hollow.body = [], [ast.Pass()]
    return ast.unparse(hollow).split("\n")[0]


def _body(node: Node, lines: list[str]) -> str:
    """The source of the statements after the docstring; "" if none has a line of its own."""
    statements = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    if not statements:
        return ""
    start = statements[0].lineno
    if len(statements) < len(node.body):
        start = (node.body[0].end_lineno or 0) + 1  # comments in between belong to the body
    if start > statements[0].lineno or lines[start - 1 : start] == [] or _shares_line(statements[0], lines):
        return ""
    body = textwrap.dedent("\n".join(lines[start - 1 : node.end_lineno])).strip("\n")
    code = f"def f():\n{textwrap.indent(body, '    ')}"
    return textwrap.indent(body, "    ") if has_body(code) else ""


def _shares_line(statement: ast.stmt, lines: list[str]) -> bool:
    return bool(lines[statement.lineno - 1][: statement.col_offset].strip())
