"""Tool calls as rules of llguidance's Lark: what a model writes to call a tool, in the
two formats of text/tools.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..text.tools import END_FUNCTION, END_PARAMETER, FUNCTION, PARAMETER, Format, Tool, referred, types_of
from .schema import GrammarError, Part, named

PLAIN = {"type", "title", "description", "default", "examples", "nullable", "anyOf", "deprecated", "$comment",
         "readOnly", "writeOnly"}  # fmt: skip
"""Keywords that a parameter of text may have, whose value then is any text."""
WHOLE = {
    "type",
    "title",
    "description",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "$comment",
    "examples",
    "default",
}
"""Keywords of all parameters together that the rules enforce, or that say nothing of them."""
ROOTS = ("$defs", "definitions")  # what references point into


class CallRules:
    """The calls of some tools. enforceable: (tool, schema) -> what can be enforced
    of it, keywords dropped from it.

    parts: grammars that the rules name. dropped: keywords that are not enforced, as "tool.path.keyword".
    GrammarError if a strict tool has such a keyword.
    """

    def __init__(
        self, format: Format, enforceable: Callable[[Tool, dict[str, Any]], tuple[dict[str, Any], list[str]]]
    ) -> None:
        self.parts: list[Part] = []
        self.dropped: list[str] = []
        self._format = format
        self._enforceable = enforceable
        self._rules: list[str] = []
        self._names: list[str] = []

    def lark(self) -> str:
        """The rule `body`, a call of any of the tools, and those that it names."""
        return "\n".join([f"body: {' | '.join(self._names)}", *self._rules])

    def add(self, tool: Tool) -> None:
        """One more tool that may be called."""
        name = f"call_{len(self._names)}"
        self._names.append(name)
        if self._format == "hermes":
            begin = _text(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
            arguments = self._json(tool, f"{name}_arguments", {"type": "object", **tool.parameters})
            self._rules.append(f'{name}: {begin} {arguments} "}}"')
            return
        if len(self._names) == 1:
            marks = [PARAMETER, END_FUNCTION, "\n" + END_PARAMETER]
            inner = "|".join(re.escape(mark).replace("/", r"\/").replace("\n", "n") for mark in marks)
            self._rules.append(f"TEXT: (/(?s:.*)/ & ~/(?s:.*)({inner})(?s:.*)/) {_END}")
        self._refuse_or_drop(tool, "", tool.parameters.keys() - WHOLE)
        properties = {**dict.fromkeys(tool.required, True), **tool.properties}
        places = []
        for i, (key, schema) in enumerate(properties.items()):
            rule = f"{name}_{i}"
            places.append(rule if key in tool.required else f"{rule}?")
            self._rules.append(
                f"{rule}: {_text(f'{PARAMETER}{key}>' + chr(10))} {self._value(tool, rule, key, schema)}"
            )
        begin = _text(f"{FUNCTION}{tool.name}>\n")
        self._rules.append(f"{name}: {begin} {' '.join(places)} {_text(END_FUNCTION)}")

    def _value(self, tool: Tool, rule: str, key: str, schema: Any) -> str:
        """What may stand between a parameter's tags, and its end tag."""
        if not re.fullmatch(r"[^<>\n]+", key):
            raise GrammarError(f"tool {tool.name}: the name of parameter {key[:64]!r} cannot stand in a tag")
        if "string" not in types_of(schema, tool.parameters):
            root: dict[str, Any] = {n: tool.parameters[n] for n in ROOTS if n in tool.parameters}
            return f"{self._json(tool, f'{rule}_value', {**root, **schema}, key)} {_END}"
        texts = _texts(schema, tool.parameters)
        if texts:
            return f"({one_of(texts)}) {_END}"
        self._refuse_or_drop(tool, f"{key}.", _beyond_plain(schema, tool.parameters))
        return "TEXT"

    def _json(self, tool: Tool, name: str, schema: dict[str, Any], where: str = "") -> str:
        checked, dropped = self._enforceable(tool, schema)
        self.parts.append(named(name, checked, tool.strict))
        self.dropped += [".".join(filter(None, (tool.name, where, place))) for place in dropped]
        return f"@{name}"

    def _refuse_or_drop(self, tool: Tool, where: str, keywords: set[str]) -> None:
        for keyword in sorted(keywords):
            if tool.strict:
                raise GrammarError(
                    f"tool {tool.name}: {where}{keyword} cannot be enforced in this model's format"
                )
            self.dropped.append(f"{tool.name}.{where}{keyword}")


def one_of(texts: Sequence[str]) -> str:
    """A rule for one of the texts."""
    return " | ".join(map(_text, texts))


def _text(text: str) -> str:
    """A text as Lark has it, whose strings have no escapes for control characters."""
    if re.search(r"[\x00-\x08\x0b-\x1f]", text):
        return "/" + "".join(f"\\x{{{ord(character):x}}}" for character in text) + "/"
    return json.dumps(text, ensure_ascii=False)


_END = _text(f"\n{END_PARAMETER}\n")


def _texts(schema: Any, root: dict[str, Any], depth: int = 0) -> list[str]:
    """The texts a parameter is limited to, as they stand between its tags; none if
    there are too many to list.
    """
    if not isinstance(schema, dict) or depth > 8:
        return []
    if isinstance(schema.get("$ref"), str):
        return _texts(referred(schema["$ref"], root), root, depth + 1)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return [value if isinstance(value, str) else json.dumps(value) for value in values]
    if isinstance(schema.get("anyOf"), list):
        branches = [_texts(each, root, depth + 1) for each in schema["anyOf"]]
        return [text for texts in branches for text in texts] if all(branches) else []
    return {"null": ["null"], "boolean": ["true", "false"]}.get(str(schema.get("type")), [])


def _beyond_plain(schema: Any, root: dict[str, Any]) -> set[str]:
    """Keywords of a parameter that may be text which say more than its type."""
    found, waiting = set[str](), [schema]
    for _ in range(64):
        if not waiting:
            return found
        one = waiting.pop()
        if isinstance(one, dict):
            if isinstance(one.get("$ref"), str):
                waiting.append(referred(one["$ref"], root))
            found |= one.keys() - PLAIN - {"$ref"}
            waiting += one["anyOf"] if isinstance(one.get("anyOf"), list) else []
    return found | {"anyOf"}
