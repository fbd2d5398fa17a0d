"""Tools a model may call: their definitions, and the calls in a reply's text, in the
two formats of Qwen's templates.

    hermes        {"name": NAME, "arguments": {...}}
    qwen3-coder   <function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n...</function>

Both stand between <tool_call> and </tool_call>, which models of the second kind forget now and then. A call
that is broken or unfinished is no error: its text stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["hermes", "qwen3-coder"]
Call = dict[str, Any]
"""{"name": ..., "arguments": {...}}"""

MAX_TOOLS = 512
TYPES = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})
MAX_SCHEMAS = 256  # that are looked at to learn a value's type; a schema beyond counts as any
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
VALUE_ENDS = ("\n" + END_PARAMETER, PARAMETER, END_FUNCTION)  # whichever comes first


def format_of(template: str) -> Format:
    """The format that a chat template asks the model to call tools in."""
    return "qwen3-coder" if FUNCTION in template else "hermes"


# ----------------------------------------------------------------------------
# Definitions


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    parameters: the JSON schema of its arguments, which are an object. strict: whether a schema that cannot be
    enforced wholly is refused. function: the definition as it came.
    """

    name: str
    parameters: dict[str, Any]
    strict: bool
    function: dict[str, Any]

    @property
    def properties(self) -> dict[str, Any]:
        """Parameter -> its schema."""
        found = self.parameters.get("properties")
        return found if isinstance(found, dict) else {}

    @property
    def required(self) -> list[str]:
        """Names of the parameters that a call must have."""
        found = self.parameters.get("required")
        return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


class ToolSet:
    """The tools of one request, in their order.

    tools: as OpenAI has them, {"type": "function", "function": {"name", "description", "parameters",
    "strict"}}, or the function alone. format: see format_of. longest: characters of a name. skipped: types of
    tools that are no functions, which are left out. definitions: what a chat template takes. ValueError,
    naming the field, if a definition is malformed or a name comes twice.
    """

    def __init__(self, tools: Sequence[Any], format: Format = "hermes", longest: int = 64) -> None:
        if not isinstance(tools, (list, tuple)):
            raise ValueError(f"tools is {type(tools).__name__}, not a list")
        if len(tools) > MAX_TOOLS:
            raise ValueError(f"tools are {len(tools)}, at most {MAX_TOOLS} are accepted")
        self.format: Format = format
        self.skipped: list[str] = []
        self._tools: dict[str, Tool] = {}
        for i, tool in enumerate(tools):
            if isinstance(tool, dict) and tool.get("type", "function") != "function":
                self.skipped.append(str(tool["type"]))
                continue
            found = _tool(tool, f"tools[{i}]", longest)
            if found.name in self._tools:
                raise ValueError(f"tools[{i}]: the name {found.name!r} comes twice")
            self._tools[found.name] = found

    def __len__(self) -> int:
        return len(self._tools)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    def __getitem__(self, name: str) -> Tool:
        return self._tools[name]

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """The tools as a chat template takes them."""
        return [{"type": "function", "function": tool.function} for tool in self]

    def calls(self, text: str, closed: bool = True) -> list[str | Call] | None:
        """What stands between <tool_call> and </tool_call>: calls, and text that is
        none; None if there is no call.

        closed: whether </tool_call> has come; without it only what has an end of its own is a call.
        """
        if self.format == "qwen3-coder":
            found = list(coder_calls(text, self, closed))
            if any(isinstance(part, dict) for part in found):
                return [part for part in found if isinstance(part, dict) or part.strip()]
        return hermes_calls(text) if closed else None


def _tool(tool: Any, where: str, longest: int) -> Tool:
    if not isinstance(tool, dict):
        raise ValueError(f"{where} is {type(tool).__name__}, not an object")
    if "function" in tool:
        tool, where = tool["function"], f"{where}.function"
        if not isinstance(tool, dict):
            raise ValueError(f"{where} is {type(tool).__name__}, not an object")
    name, description = tool.get("name"), tool.get("description")
    if not isinstance(name, str) or not re.fullmatch(rf"[a-zA-Z0-9_.-]{{1,{longest}}}", name):
        shown = repr(name)[:80]
        raise ValueError(f"{where}.name = {shown} is not 1 to {longest} letters, digits, _, - and dots")
    if description is not None and not isinstance(description, str):
        raise ValueError(f"{where}.description is {type(description).__name__}, not text")
    parameters = tool.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise ValueError(f"{where}.parameters is {type(parameters).__name__}, not a JSON schema")
    if parameters.get("type", "object") != "object":
        raise ValueError(f"{where}.parameters.type is {parameters['type']!r}: arguments are an object")
    strict = tool.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise ValueError(f"{where}.strict is {type(strict).__name__}, not true or false")
    return Tool(name, parameters, bool(strict), tool)


def types_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that a schema allows, as far as its form says. root: where its references point into."""
    return _types(schema, root, [MAX_SCHEMAS])


def _types(schema: Any, root: Mapping[str, Any], left: list[int]) -> frozenset[str]:
    left[0] -= 1
    if not isinstance(schema, dict) or left[0] < 0:
        return TYPES
    found = TYPES
    if isinstance(schema.get("$ref"), str):
        found &= _types(referred(schema["$ref"], root), root, left)
    if "type" in schema:
        stated = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        found &= _with_integers(name for name in stated if isinstance(name, str))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        found &= _with_integers(map(_type, values))
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list):
            found &= frozenset[str]().union(*(_types(each, root, left) for each in schema[name]))
    for each in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        found &= _types(each, root, left)
    return found


def _with_integers(types: Iterable[str]) -> frozenset[str]:
    """A schema that allows numbers allows whole ones."""
    found = frozenset(types)
    return found | {"integer"} if "number" in found else found


def referred(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference within `root` points to ("#/$defs/a"); None if there is nothing."""
    if not reference.startswith("#"):
        return None
    found: Any = root
    for name in reference.lstrip("#").split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _type(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


# ----------------------------------------------------------------------------
# Hermes: JSON


def hermes_calls(text: str) -> list[str | Call] | None:
    """The calls in `text`, one JSON object after the other; None if it is anything else."""
    decoder, calls, at = json.JSONDecoder(), list[str | Call](), 0
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        call = _hermes_call(value)
        if call is None:
            return None
        calls.append(call)
        at += len(text[at:]) - len(text[at:].lstrip())
    return calls or None


def _hermes_call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return None
    return _call(value["name"], {} if arguments is None else arguments)


def _call(name: str, arguments: Any) -> Call | None:
    """The call; None if the arguments are no object, or hold what JSON or UTF-8 cannot."""
    if not isinstance(arguments, dict):
        return None
    call = {"name": name, "arguments": arguments}
    try:
        json.dumps(call, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return call


# ----------------------------------------------------------------------------
# Qwen3-Coder: tags


def coder_calls(text: str, tools: ToolSet, closed: bool = False) -> Iterator[str | Call]:
    """The parts of `text` in their order: calls of known tools, and what is none. Nothing is left out.

    closed: whether an end of the text also ends a call whose values have all ended.
    """
    begin = at = 0  # of the text that is not yet out; of the search
    while (start := text.find(FUNCTION, at)) >= 0:
        found = _coder_call(text, start, tools, closed)
        if found is None:
            at = start + len(FUNCTION)
            continue
        call, end = found
        if start > begin:
            yield text[begin:start]
        yield call
        begin = at = end
    if begin < len(text):
        yield text[begin:]


def _coder_call(text: str, start: int, tools: ToolSet, closed: bool) -> tuple[Call, int] | None:
    """The call that begins at `start`, and where it ends; None if it is broken or unfinished."""
    at = text.find(">", start)
    name = text[start + len(FUNCTION) : at]
    if at < 0 or name not in tools:
        return None
    tool, arguments = tools[name], dict[str, Any]()
    at = _after_space(text, at + 1)
    while text.startswith(PARAMETER, at):
        start = text.find(">", at) + 1
        key = text[at + len(PARAMETER) : start - 1]
        found = _coder_value(text, start, tool, key) if start and "\n" not in key and "<" not in key else None
        if found is None or key in arguments:
            return None
        arguments[key], at = found
        at = _after_space(text, at)
    if text.startswith(END_FUNCTION, at):
        at += len(END_FUNCTION)
    elif not closed or at < len(text):
        return None
    call = _call(name, arguments)
    return None if call is None else (call, at)


def _coder_value(text: str, start: int, tool: Tool, key: str) -> tuple[Any, int] | None:
    """The value of a parameter that begins at `start`, and where what follows it
    begins; None if it has no end.
    """
    types = types_of(tool.properties.get(key, {"type": "string"}), tool.parameters)
    if "string" not in types:  # texts within JSON may hold what would end a text
        try:
            _, end = json.JSONDecoder().raw_decode(text, _after_space(text, start))
        except (ValueError, RecursionError):
            pass
        else:
            end = _after_space(text, end)
            if text.startswith(END_PARAMETER, end):
                return _value(text[start:end].strip(), types), end + len(END_PARAMETER)
    ends = [(i, mark) for mark in VALUE_ENDS if (i := text.find(mark, start)) >= 0]
    if not ends:
        return None
    end, mark = min(ends)
    value = text[start:end].removeprefix("\n")
    if mark == VALUE_ENDS[0]:
        return _value(value, types), end + len(mark)
    # its own end, or the newline before that, was forgotten
    return _value(value.removesuffix("\n").removesuffix(END_PARAMETER), types), end


def _after_space(text: str, at: int) -> int:
    found = re.compile(r"\s*").match(text, at)
    return found.end() if found else at


def _value(text: str, types: frozenset[str]) -> Any:
    """A parameter's value, of one of the types; text if it cannot be read as that."""
    stripped = text.strip()
    literal = stripped.lower()
    if literal in ("true", "false") and "boolean" in types:
        return literal == "true"
    if literal in ("null", "none") and "null" in types:
        return None
    if types == {"string"}:
        return text
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and "number" not in types and value.is_integer():
        value = int(value)
    return value if _type(value) in types and not isinstance(value, str) else text


class BareCalls:
    """Text in, text and calls out: finds calls of known tools that no <tool_call> precedes.

    What may be the beginning of one waits.
    """

    def __init__(self, tools: ToolSet) -> None:
        self._tools = tools
        self._openings = tuple(f"{FUNCTION}{tool.name}>" for tool in tools)
        self._held = ""

    def push(self, text: str) -> list[str | Call]:
        """What can go out, in its order."""
        text, parts = self._held + text, list[str | Call]()
        while (opening := self._opening(text)) >= 0 and (end := text.find(END_FUNCTION, opening)) >= 0:
            end += len(END_FUNCTION)
            parts += coder_calls(text[:end], self._tools)
            text = text[end:]
        kept = len(text) - self._may_open(text) if opening < 0 else opening
        self._held = text[kept:]
        return [*parts, text[:kept]] if kept else parts

    def flush(self, closed: bool = False) -> list[str | Call]:
        """What was held back. closed: whether </tool_call> has come."""
        held, self._held = self._held, ""
        return list(coder_calls(held, self._tools, closed))

    def _opening(self, text: str) -> int:
        """Where the first call of a known tool begins; -1 if none does."""
        if FUNCTION not in text:
            return -1
        return min((at for each in self._openings if (at := text.find(each)) >= 0), default=-1)

    def _may_open(self, text: str) -> int:
        """Length of the end of `text` that begins an opening."""
        at = text.rfind("<")
        return len(text) - at if at >= 0 and any(o.startswith(text[at:]) for o in self._openings) else 0
