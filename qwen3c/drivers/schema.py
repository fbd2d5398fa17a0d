"""JSON schemas before they are compiled: the limits they are held to, and what a
schema loses that is not strict.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from ..text.tools import referred

Part = dict[str, Any]
"""One of llguidance's grammars, {"name", "json_schema"} or {"lark_grammar"}; rules refer to it as @name."""

# between the tokens of JSON: bounded, or a weak model would never end it. Strict is on one line, as what
# programs write; else lines and their indentation as llama.cpp allows them
SPACE, SPACES = " ", r" |\n{1,2}[ \t]{0,20}"
MAX_SCHEMA = 1 << 18  # characters of JSON
MAX_REFERENCES = 1000  # llguidance follows them recursively
MAX_MEETING = 8  # patterns that one text has to meet: what llguidance takes to combine them doubles with each
MAX_CHAIN = 200  # schemas that refer to each other, one after the other
ROUNDS = 16  # of dropping what a refusal is about

# keywords whose value is a schema, a list of schemas, or schemas by name
_ONE = (
    "items",
    "additionalItems",
    "additionalProperties",
    "contains",
    "propertyNames",
    "not",
    "if",
    "then",
    "else",
    "unevaluatedItems",
    "unevaluatedProperties",
    "contentSchema",
)
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


class GrammarError(ValueError):
    """A grammar cannot be enforced, or became too complex in the middle of a reply. One line."""


def named(name: str, schema: dict[str, Any], strict: bool) -> Part:
    """The grammar of JSON that a schema allows. strict: refuse a oneOf whose schemas may overlap, not read it
    as anyOf; and one blank at most between two tokens.
    """
    space = SPACE if strict else SPACES
    options = {"coerce_one_of": not strict, "lenient": False, "whitespace_pattern": space}
    return {"name": name, "json_schema": {**schema, "x-guidance": options}}


def parsed(schema: Any) -> dict[str, Any]:
    """A schema as plain JSON, within the limits."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        found = json.loads(text, parse_constant=_no_number)
    except (ValueError, TypeError, RecursionError) as error:
        raise GrammarError(f"schema is not JSON: {' '.join(str(error).split())}") from None
    if found is True:
        found = {}
    if not isinstance(found, dict):
        raise GrammarError(f"schema is {text[:40]}, not an object")
    if len(text) > MAX_SCHEMA:
        raise GrammarError(f"schema has {len(text)} characters, at most {MAX_SCHEMA} are accepted")
    if text.count('"$ref"') + text.count('"$dynamicRef"') > MAX_REFERENCES:
        raise GrammarError(f"schema has more than {MAX_REFERENCES} references")
    known: dict[int, int] = {}
    if any(_meeting(holder, found, known) > MAX_MEETING for _, holder, _ in _keywords(found)):
        raise GrammarError(f"schema: more than {MAX_MEETING} patterns have to be met at once")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def enforceable(
    schema: dict[str, Any], refusal: Callable[[dict[str, Any]], str | None] | None
) -> tuple[dict[str, Any], list[str]]:
    """(what can be enforced of `schema`, the places of the keywords that were dropped from it).

    refusal: what llguidance says against a schema, None if it takes it. Without it nothing is dropped. What
    cannot be dropped stays, and will be refused.
    """
    dropped: list[str] = []
    if "x-guidance" in schema:
        if refusal is None:
            raise GrammarError("schema: x-guidance is not accepted")
        del schema["x-guidance"]
        dropped.append("x-guidance")
    if refusal is None:
        return schema, dropped
    known: dict[tuple[str, str], bool] = {}

    def is_refused(keyword: str, value: Any) -> bool:
        """Whether a keyword of a text's schema is refused even alone."""
        if not isinstance(value, str):
            return True
        if (keyword, value) not in known:
            known[keyword, value] = refusal({"type": "string", keyword: value}) is not None
        return known[keyword, value]

    for _ in range(ROUNDS):
        refused = refusal(schema)
        if refused is None:
            break
        for place, holder, keyword in list(_keywords(schema)):
            if _is_culprit(refused, holder, keyword, schema, is_refused):
                dropped.append(place)
                del holder[keyword]
    return schema, dropped


def _is_culprit(
    refused: str,
    holder: dict[str, Any],
    keyword: str,
    root: dict[str, Any],
    is_refused: Callable[[str, Any], bool],
) -> bool:
    """Whether a refusal is about this keyword of the schema `holder`."""
    value = holder[keyword]
    if refused.startswith("Unimplemented keys"):
        return json.dumps(keyword) in refused
    if refused.startswith("min/maxProperties"):
        return keyword in ("minProperties", "maxProperties")
    if refused.startswith("patternProperty regexes"):
        return keyword == "patternProperties"
    if refused.startswith(("Resource", "Pointer", "Anchor")):
        return keyword == "$ref" and (not isinstance(value, str) or referred(value, root) is None)
    if refused.startswith("Unable to determine if regex is empty"):
        return keyword == "pattern"
    if keyword == "patternProperties" and isinstance(value, dict):
        return any(is_refused("pattern", pattern) for pattern in value)
    return keyword in ("format", "pattern") and is_refused(keyword, value)


def _keywords(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every keyword within a schema: (its place, the schema it is in, its name).
    Names of properties are none.
    """
    waiting: list[tuple[str, Any]] = [("", schema)]
    while waiting:
        where, one = waiting.pop()
        if not isinstance(one, dict):
            continue
        for keyword, value in list(one.items()):
            place = f"{where}.{keyword}".lstrip(".")
            yield place, one, keyword
            if keyword in _NAMED and isinstance(value, dict):
                waiting += ((f"{place}.{name}", each) for name, each in value.items())
            elif keyword in _LISTS and isinstance(value, list):
                waiting += ((f"{place}[{i}]", each) for i, each in enumerate(value))
            elif keyword in _ONE:
                waiting.append((place, value))


def _meeting(schema: Any, root: dict[str, Any], known: dict[int, int], depth: int = 0) -> int:
    """How many patterns and formats one text has to meet, as far as the schema's form says."""
    if not isinstance(schema, dict):
        return 0
    if id(schema) in known:
        return known[id(schema)]
    if depth > MAX_CHAIN:
        raise GrammarError(f"schema: more than {MAX_CHAIN} references and combinations follow each other")
    known[id(schema)] = 0  # where it refers to itself
    both = list(_list(schema, "allOf"))
    if isinstance(schema.get("$ref"), str):
        both.append(referred(schema["$ref"], root))
    either = [each for name in ("anyOf", "oneOf") for each in _list(schema, name)]
    found = ("pattern" in schema) + ("format" in schema)
    found += sum(_meeting(each, root, known, depth + 1) for each in both)
    found += max((_meeting(each, root, known, depth + 1) for each in either), default=0)
    known[id(schema)] = found
    return found


def _list(schema: dict[str, Any], name: str) -> list[Any]:
    return schema[name] if isinstance(schema.get(name), list) else []
