"""The tables of docs/SERVING.md: every endpoint, every field, of the document that a server gives of itself.

python tests/serve/api_tables.py    writes them anew; tests/serve/test_documents.py compares
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from small_server import serving

from qwen3c.cli.serve import _application
from qwen3c.serve.catalogue import ERRORS, HEADERS
from qwen3c.serve.config import ModelSettings, Settings
from qwen3c.serve.metrics import Metrics

Json = dict[str, Any]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "SERVING.md"
BOX = ROOT / "qwen3c" / "data" / "model.bin"
FIRST = "/v1/chat/completions"
UNBOUNDED = 1 << 31  # a limit from here on is none that anybody meets
NOT_HERE = "this server does not do that"
ORDER = ("string", "boolean", "integer", "number", "object", "array")
WORDS = {"string": "text", "boolean": "true or false", "integer": "whole number", "number": "number"}


def document() -> Json:
    """What a server of the model in the box with everything else says that it serves."""
    models = {"box": ModelSettings(str(BOX))}
    with TemporaryDirectory() as folder:
        servers = Path(folder, "servers.json")
        servers.write_text('{"mcpServers": {}}')
        settings = Settings(models=models, cache_memory=64 << 20, mcp_servers=str(servers))
        app, _ = _application(settings, False)
    with serving(app) as server:
        found: Json = server.get("/openapi.json").json
    return found


def sections(found: Json) -> dict[str, str]:
    """What stands between `<!-- NAME -->` and `<!-- end of NAME -->`, in Markdown, by name."""
    errors = [f"| {status} | {why} |" for status, why in ERRORS.items()]
    headers = [f"| `{name}` | {why} |" for name, why in HEADERS.items()]
    return {
        "api": _endpoints(found),
        "headers": _table(headers),
        "errors": _table(errors),
        "metrics": _table(_metrics()),
    }


def _table(rows: list[str]) -> str:
    return "\n".join(["| | |", "|---|---|", *rows]) + "\n"


def _metrics() -> list[str]:
    metrics = Metrics(list)
    metrics.of("any")
    helped = re.findall(r"^# HELP (\S+) (.*)$", metrics.render().decode(), re.MULTILINE)
    return [f"| `{name}` | {what} |" for name, what in helped if name[0] == "q" and name[-8:] != "_created"]


def _endpoints(found: Json) -> str:
    """All endpoints of a document."""
    parts = ["\n".join(_overview(found))]
    known: dict[str, str] = {}
    for path, operations in sorted(found["paths"].items(), key=lambda item: item[0] != FIRST):
        body = operations.get("post", {}).get("requestBody")
        if body is not None and path != "/rerank":
            schema = body["content"]["application/json"]["schema"]
            parts.append("\n".join(_endpoint(path, schema, known)))
    return "\n\n".join(parts) + "\n"


def _overview(found: Json) -> Iterator[str]:
    yield "| address | |"
    yield "|---|---|"
    for path, operations in found["paths"].items():
        for method, told in operations.items():
            yield f"| `{method.upper()} {path}` | {told['summary']} |"


def _endpoint(path: str, schema: Json, known: dict[str, str]) -> Iterator[str]:
    rows, same, ignored, refused, foreign = [], [], [], [], []
    for name, told, required in _fields(schema):
        if "x-qwen3c-ignored" in told:
            ignored.append(f"`{name}`")
        elif told.get("description") == NOT_HERE:
            foreign.append(f"`{name}`")
        elif "x-qwen3c-refused" in told:
            refused.append(f"`{name}`{_unless(told)}: {told['description']}")
        else:
            row = f"| `{name}`{' (required)' if required else ''} | {_type(told)} | {told['description']} |"
            if known.get(name) == row and path != FIRST:
                same.append(f"`{name}`")
                continue
            if path == FIRST:
                known[name] = row
            rows.append(row)
    yield f"### `POST {path}`\n"
    yield "| field | | |"
    yield "|---|---|---|"
    yield from rows
    for what, names in (
        (f"As in `{FIRST}`", same),
        ("Ignored", ignored),
        ("Refused", refused),
        (f"Refused, for {NOT_HERE}", foreign),
    ):
        if names:
            yield f"\n{what}: {'; '.join(names) if names is refused else ', '.join(names)}."


def _fields(schema: Json, path: str = "") -> Iterator[tuple[str, Json, bool]]:
    for one in (schema, *schema.get("anyOf", ())):
        for name, inner in one.get("properties", {}).items():
            where = f"{path}.{name}" if path else name
            yield where, inner, name in one.get("required", ())
            yield from _fields(inner, where)
        if "items" in one:
            yield from _fields(one["items"], f"{path}[]")


def _unless(told: Json) -> str:
    """The values with which a refused field is none."""
    allowed = [value for value in told["enum"] if value is not None]
    return f" (but {', '.join(map(_shown, allowed))})" if allowed else ""


def _shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
    return f"`{text}`"


def _type(told: Json) -> str:
    if "enum" in told:
        return ", ".join(_shown(value)[1:-1].strip('"') for value in told["enum"] if value is not None)
    kinds = [one for one in told.get("anyOf", [told]) if one.get("type") != "null"]
    kinds.sort(key=lambda kind: ORDER.index(kind["type"]))
    return " or ".join(_kind(kind) for kind in kinds)


def _kind(kind: Json) -> str:
    word = WORDS.get(kind["type"]) or str(kind["type"])
    low, high = kind.get("minimum", -2 * UNBOUNDED), kind.get("maximum", UNBOUNDED)
    if kind["type"] == "array":
        most = kind.get("maxItems", UNBOUNDED)
        return "list" if most >= UNBOUNDED else f"list, at most {most}"
    if low < -UNBOUNDED:
        return word
    return f"{word}, {low:g} to {high:g}" if high < UNBOUNDED else f"{word}, {low:g} or more"


def replaced(page: str, made: dict[str, str]) -> str:
    """The page with these sections in place of its own."""
    for name, text in made.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        pattern = re.escape(begin) + r".*?" + re.escape(end)
        page, n = re.subn(pattern, lambda _, t=f"{begin}\n{text}\n{end}": t, page, flags=re.DOTALL)  # type: ignore[misc]
        if n != 1:
            raise ValueError(f"{PAGE} has {n} places for {name}")
    return page


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text(), sections(document())))
