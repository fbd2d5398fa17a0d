"""Tools and their calls: what is a call is read as one, what is none stays text, whatever a model writes.

python -m pytest tests/text/test_tools.py
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from small_models import tokenizer_json

from qwen3c.text.chat import Piece, ReplyStream
from qwen3c.text.tokenizer import Tokenizer
from qwen3c.text.tools import BareCalls, Format, ToolSet, coder_calls, format_of, types_of

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "exact": {"type": "boolean"},
        "factor": {"type": "number"},
        "places": {"type": "array", "items": {"type": "string"}},
        "more": {"type": "object"},
        "unit": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}]},
        "any": {},
    },
    "required": ["city"],
    "$defs": {"Unit": {"type": "string", "enum": ["C", "F"]}},
}
DEFINITIONS = [
    {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "ping"}},
]
CODER = ToolSet(DEFINITIONS, "qwen3-coder")
HERMES = ToolSet(DEFINITIONS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_json().encode())


def reply(tokenizer: Tokenizer, text: str, tools: ToolSet | None, thinking: bool = False) -> Piece:
    """What a reply of the tokens of `text`, tags as tokens, comes out as."""
    stream = ReplyStream(tokenizer, thinking, (), tools)
    pieces = [*map(stream.push, tokenizer.encode(text, special=True)), stream.finish()]
    assert not stream.in_call
    calls = tuple(call for piece in pieces for call in piece.tool_calls)
    return Piece("".join(piece.text for piece in pieces), False, calls)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


# ----------------------------------------------------------------------------
# Definitions


def test_a_tool_set_holds_functions_in_their_order() -> None:
    tools = ToolSet([*DEFINITIONS, {"type": "web_search"}, {"name": "bare.name-1", "parameters": None}])
    assert [tool.name for tool in tools] == ["get_weather", "ping", "bare.name-1"]
    assert tools.skipped == ["web_search"] and len(tools) == 3 and "ping" in tools and "x" not in tools
    assert tools["ping"].parameters == {"type": "object", "properties": {}}
    assert tools.definitions[:2] == DEFINITIONS
    assert [tool.strict for tool in ToolSet([{"name": "a", "strict": True}, {"name": "b"}])] == [True, False]


@pytest.mark.parametrize(
    ("tools", "complaint"),
    [
        ({}, "tools is dict, not a list"),
        (["x"], r"tools\[0\] is str, not an object"),
        ([{"type": "function", "function": 5}], r"tools\[0\]\.function is int"),
        ([{"type": "function", "function": {}}], r"tools\[0\]\.function\.name = None is not 1 to 64 letters"),
        ([{"name": "a b"}], r"tools\[0\]\.name = 'a b'"),
        ([{"name": "x" * 65}], "64 letters"),
        ([{"name": "ä"}], "name = 'ä'"),
        ([{"name": "a\n"}], "name = "),
        ([{"name": "a"}, {"name": "a"}], r"tools\[1\]: the name 'a' comes twice"),
        ([{"name": "a", "description": 5}], "description is int, not text"),
        ([{"name": "a", "parameters": []}], "parameters is list, not a JSON schema"),
        ([{"name": "a", "parameters": {"type": "string"}}], "parameters.type is 'string'"),
        ([{"name": "a", "strict": 1}], "strict is int, not true or false"),
        ([{"name": f"a{i}"} for i in range(513)], "tools are 513, at most 512"),
    ],
)
def test_malformed_tools_are_named(tools: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ToolSet(tools)


def test_longer_names_are_taken_where_a_caller_says_so() -> None:
    assert "x" * 128 in ToolSet([{"name": "x" * 128}], longest=128)


def test_the_template_says_the_format() -> None:
    assert format_of("... <function=example_function_name> ...") == "qwen3-coder"
    assert format_of('{"name": <function-name>, "arguments": <args-json-object>}') == "hermes"


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, "string"),
        ({"type": ["string", "null"]}, "string null"),
        ({"type": "number"}, "number integer"),
        ({"type": "number", "enum": [1, 2]}, "integer"),
        ({"enum": ["a", None, 1.5]}, "string null number integer"),
        ({"const": True}, "boolean"),
        ({"anyOf": [{"type": "array"}, {"$ref": "#/$defs/Unit"}]}, "array string"),
        ({"allOf": [{"type": ["string", "null"]}, {"type": "string"}]}, "string"),
        ({"oneOf": [{"type": "object"}, {"type": "integer"}]}, "object integer"),
        ({"$ref": "#/$defs/Unit"}, "string"),
    ],
)
def test_the_types_of_a_schema(schema: dict[str, Any], types: str) -> None:
    assert types_of(schema, WEATHER) == set(types.split())


@pytest.mark.parametrize(
    "schema", [True, {}, 5, {"$ref": "#/nowhere"}, {"$ref": "http://a/b"}, {"anyOf": 5}, {"$ref": "#/$defs/Loop"}]
)  # fmt: skip
def test_a_schema_that_says_no_type_allows_every_type(schema: Any) -> None:
    root = {"$defs": {"Loop": {"allOf": [{"$ref": "#/$defs/Loop"}]}}}
    assert len(types_of(schema, root)) == 7


# ----------------------------------------------------------------------------
# Hermes


@pytest.mark.parametrize("tools", [None, HERMES])
@pytest.mark.parametrize(
    ("inner", "calls"),
    [
        ('\n{"name": "ping", "arguments": {}}\n', [call("ping")]),
        ('{"name":"ping","arguments":{}}', [call("ping")]),
        (' \n\n {"name": "f", "arguments": {"a": [1, {"b": null}]}} \n ', [call("f", a=[1, {"b": None}])]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [call("f", a=1)]),
        ('{"name": "f", "arguments": ""}', [call("f")]),
        ('{"name": "f", "arguments": null}', [call("f")]),
        ('{"name": "f"}', [call("f")]),
        ('{"name": "f", "arguments": {}, "id": 5}', [call("f")]),
        ('\n{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {"a": "é"}}\n',
         [call("f"), call("g", a="é")]),
        ('{"name": "f", "arguments": {}}{"name": "g"}', [call("f"), call("g")]),
        ('{"name": "f", "arguments": {"a": "</tool_call>x"}}', None),  # cut by a tag
    ],
)  # fmt: skip
def test_hermes_calls_are_read(
    tokenizer: Tokenizer, tools: ToolSet | None, inner: str, calls: list[dict[str, Any]] | None
) -> None:
    piece = reply(tokenizer, f"a<tool_call>{inner}</tool_call>", tools)
    if calls is not None:
        assert piece == Piece("a", False, tuple(calls))
    else:
        assert not piece.tool_calls and "</tool_call>" in piece.text


BROKEN_HERMES = [
    "",
    "\n",
    "null",
    "[]",
    "{}",
    "5",
    '"f"',
    '{"name": 5}',
    '{"name": null, "arguments": {}}',
    "{'name': 'f'}",
    '{"name": "f", "arguments": []}',
    '{"name": "f", "arguments": 5}',
    '{"name": "f", "arguments": "x"}',
    '{"name": "f", "arguments": "[1]"}',
    '{"name": "f", "arguments": {"a": NaN}}',
    "{" * 3000,
    "[" * 20000,
    '{"name": "f", "arguments": {"a": 1e999}}',
    '{"name": "f", "arguments": {"a": "\\ud800"}}',
    '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
    '{"name": "f", "arguments": {}} and',
    'call {"name": "f"}',
    '{"name": "f"} {"name"',
    '{"name": "f", "arguments": {}}]',
    '{"name": "f", "arguments": {"a": 1,}}',
    "ping()",
    '{"arguments": {}}',
    '{"name": "f", "arguments": "' + "[" * 20000 + '"}',
    '{"name": "f" "arguments": {}}',
    '```json\n{"name": "f"}\n```',
    "<function=ping>\n</function>",
    '{"name": "f", "arguments": "{\\"a\\": Infinity}"}',
]


@pytest.mark.parametrize("inner", BROKEN_HERMES, ids=range(len(BROKEN_HERMES)))
def test_what_is_no_hermes_call_comes_out_as_it_was(tokenizer: Tokenizer, inner: str) -> None:
    for tools in (None, HERMES):
        for text in (f"<tool_call>{inner}</tool_call>", f"<tool_call>{inner}"):
            assert reply(tokenizer, text, tools) == Piece(text)


def test_an_unfinished_hermes_call_is_text(tokenizer: Tokenizer) -> None:
    text = '<tool_call>\n{"name": "ping", "arguments": {}}\n'
    assert reply(tokenizer, text, HERMES) == Piece(text)


# ----------------------------------------------------------------------------
# Qwen3-Coder


def parameter(key: str, value: str) -> str:
    return f"<parameter={key}>\n{value}\n</parameter>\n"


GOOD = "<function=get_weather>\n" + parameter("city", "Paris") + "</function>"
PARIS = call("get_weather", city="Paris")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"<tool_call>\n{GOOD}\n</tool_call>", Piece("", False, (PARIS,))),
        (f"Let me.\n\n{GOOD}\n</tool_call>", Piece("Let me.", False, (PARIS,))),  # no opening tag
        (GOOD, Piece("", False, (PARIS,))),  # neither
        (f"<tool_call>\n{GOOD}", Piece("", False, (PARIS,))),  # no closing tag
        (f"{GOOD}\nDone.", Piece("Done.", False, (PARIS,))),
        (f"{GOOD}{GOOD}", Piece("", False, (PARIS, PARIS))),
        (f"<tool_call>\n{GOOD}\n{GOOD}\n</tool_call>", Piece("", False, (PARIS, PARIS))),
        (f"<tool_call>\n{GOOD}\n</tool_call>\n<tool_call>\n{GOOD}\n</tool_call>", Piece("", False, (PARIS, PARIS))),
        ("<tool_call>\n<function=ping>\n</function>\n</tool_call>", Piece("", False, (call("ping"),))),
        ("<function=ping></function>", Piece("", False, (call("ping"),))),
        # ends that were forgotten
        ("<function=get_weather>\n<parameter=city>\nParis\n</function>", Piece("", False, (PARIS,))),
        ("<function=get_weather>\n<parameter=city>\nParis\n<parameter=days>\n3\n</parameter>\n</function>",
         Piece("", False, (call("get_weather", city="Paris", days=3),))),
        ("<function=get_weather><parameter=city>Paris</parameter></function>", Piece("", False, (PARIS,))),
        ("<tool_call>\n<function=get_weather>\n" + parameter("city", "Paris") + "</tool_call>",
         Piece("", False, (PARIS,))),
        ("<function=get_weather>\n" + parameter("city", "Paris") + "</tool_call>", Piece("", False, (PARIS,))),
        # one call is good, the other is not
        (f"<tool_call>\n{GOOD}\n<function=get_weather>\n<parameter=city>\nRo",
         Piece("\n<function=get_weather>\n<parameter=city>\nRo", False, (PARIS,))),
        # Hermes from a model that should not
        ('<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>', Piece("", False, (call("ping"),))),
    ],
)  # fmt: skip
def test_coder_calls_are_read_with_tags_and_without(tokenizer: Tokenizer, text: str, expected: Piece) -> None:
    assert reply(tokenizer, text, CODER) == expected


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "3", "3"),
        ("city", "null", "null"),
        ("city", "", ""),
        ("city", "\n a \n\n", "\n a \n\n"),
        ("city", "a <b> </parameter> c", "a <b> </parameter> c"),
        ("city", '{"a": 1}', '{"a": 1}'),
        ("days", "3", 3),
        ("days", " 3 ", 3),
        ("days", "3.0", 3),
        ("days", "3.5", "3.5"),
        ("days", "three", "three"),
        ("days", "true", "true"),
        ("exact", "true", True),
        ("exact", "False", False),
        ("exact", "yes", "yes"),
        ("factor", "1e3", 1000.0),
        ("factor", "2", 2),
        ("places", '["a", "</function>", "\\n</parameter>"]', ["a", "</function>", "\n</parameter>"]),
        ("places", "a, b", "a, b"),
        ("more", '{\n  "a": {"b": [1]}\n}', {"a": {"b": [1]}}),
        ("unit", "C", "C"),
        ("unit", "null", None),
        ("unit", "None", None),
        ("any", "5", 5),
        ("any", "five", "five"),
        ("any", '"five"', '"five"'),
        ("unknown", "5", "5"),
    ],
)
def test_values_are_of_the_type_that_the_schema_wants(key: str, text: str, value: Any) -> None:
    found = CODER.calls(f"<function=get_weather>\n{parameter(key, text)}</function>")
    assert found == [call("get_weather", **{key: value})]
    assert type(found[0]["arguments"][key]) is type(value)  # type: ignore[index]


BROKEN_CODER = [
    "",
    "x",
    "<function",
    "<function=",
    "<function=>",
    "<function=ping",
    "<function=ping>",
    "<function=ping>\n",
    "<function=pong>\n</function>",
    "<function=pong>\n" + parameter("a", "1") + "</function>",
    "<function = ping></function>",
    "<function=ping >\n</function>",
    "<FUNCTION=ping></FUNCTION>",
    "<function=\nping>",
    "<function=ping>junk</function>",
    "<function=ping>\n<parameter=a>\n1",
    "<function=ping>\n<parameter=a>\n1\n</parameter>",
    "<function=ping>\n<parameter=a",
    "<function=ping>\n<parameter=",
    "<function=ping>\n<parameter",
    "<function=ping>\n<",
    "<function=ping>\n<parameter=a\nb>\n1\n</parameter>\n</function>",
    "<function=ping><parameter=</function>",
    "<function=ping>\n" + parameter("a", "1") + parameter("a", "2") + "</function>",
    "<function=ping>\n" + parameter("a", "1") + "junk</function>",
    "<function=ping>\n" + parameter("a", "1") + "</function",
    "<function=ping>\n" + parameter("a", "1") + "</functio",
    "<function=ping>\n" + parameter("a", "1") + "<parameter=b>\n2",
    "</function>",
    "</function></function>",
    "<parameter=a>\n1\n</parameter>\n</function>",
    "</parameter>",
    "<function=ping>\n<parameter=a>\n1\n</parameter>\n<parameter=</function>",
    "<function=ping/>",
    "<function=ping></ function>",
    '<function=get_weather>\n<parameter=more>\n{"a": 1e999}\n</parameter>\n</function>',
    "&lt;function=ping&gt;",
    "<function=ping>\n" * 50,
    "<function=ping>" + "<parameter=a>" * 50,
    "<" * 500,
    "<function=" * 50,
    "</parameter>" * 50,
    "<function=get_weather>\n<parameter=city>\n" + "x" * 20000,
    "<function=ping>\n<parameter=>a",
    "<function=ping><![CDATA[",
    '<invoke name="ping"></invoke>',
    "<function=ping>\n<param=a>1</param>\n</function>",
    "ping()",
    "<ping></ping>",
    '<function=get_weather>\n{"city": "Paris"}\n</function>',
    "<function=ping>\n\n\n",
    "<function=ping>é🎉",
    "\n\n<function=ping>",
    "text <function=pong> text",
    "`<function=ping>` opens a call",
    "a < b and <function=x>",
    "<function=ping>\n</parameter>\n</function>",
    "<function=ping>\n<function=ping>\n",
    "<function=pin",
    "<function=pingg></function>",
    "<function=Ping></function>",
    '{"name": "ping"',
]


def test_the_corpus_is_large_enough() -> None:
    assert len(BROKEN_CODER) >= 60


@pytest.mark.parametrize("inner", BROKEN_CODER, ids=range(len(BROKEN_CODER)))
def test_what_is_no_coder_call_comes_out_as_it_was(tokenizer: Tokenizer, inner: str) -> None:
    closed = CODER.calls(inner)
    if closed is None:  # some are whole once a tag ends them
        assert reply(tokenizer, f"<tool_call>{inner}</tool_call>", CODER) == Piece(
            f"<tool_call>{inner}</tool_call>"
        )
    for text in (inner, f"a{inner}", f"<tool_call>{inner}", f"<tool_call>\n{inner}"):
        assert reply(tokenizer, text, CODER) == Piece(text)
    assert "".join(map(str, coder_calls(inner, CODER))) == inner


def test_without_tools_of_this_format_its_calls_are_text(tokenizer: Tokenizer) -> None:
    for tools in (None, HERMES, ToolSet([], "qwen3-coder")):
        for text in (GOOD, f"<tool_call>{GOOD}</tool_call>"):
            assert reply(tokenizer, text, tools) == Piece(text)


def test_a_thought_about_a_call_is_none(tokenizer: Tokenizer) -> None:
    piece = reply(tokenizer, f"I could {GOOD}</think>\n\nno", CODER, thinking=True)
    assert piece == Piece(f"I could {GOOD}no")


FRAGMENTS = [
    "<function=ping>",
    "<function=pong>",
    "</function>",
    "<parameter=a>",
    "\n</parameter>",
    "\n",
    "x",
    "<",
    "<function=get_weather>",
    "<parameter=city>",
    "</parameter>",
    ">",
    "1",
    "é",
]


Part = str | dict[str, Any]  # text, or a call


def test_calls_do_not_depend_on_how_the_text_is_cut() -> None:
    r, n_calls = random.Random(5), 0
    for _ in range(3000):
        text = "".join(r.choices(FRAGMENTS, k=r.randrange(1, 12)))
        whole = BareCalls(CODER)
        expected = _merged([*whole.push(text), *whole.flush()])
        stream, parts, rest = BareCalls(CODER), list[Part](), text
        while rest:
            n = r.randrange(1, 9)
            parts += stream.push(rest[:n])
            rest = rest[n:]
        assert _merged([*parts, *stream.flush()]) == expected, text
        n_calls += sum(isinstance(part, dict) for part in expected)
        texts = [part for part in expected if isinstance(part, str)]
        if len(texts) == len(expected):
            assert "".join(texts) == text
    assert n_calls > 100


def _merged(parts: list[Part]) -> list[Part]:
    found: list[Part] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part:
            found.append(part)
    return found


@pytest.mark.parametrize("format", ["hermes", "qwen3-coder"])
def test_random_replies_raise_nothing_and_lose_no_text(tokenizer: Tokenizer, format: Format) -> None:
    r, tools = random.Random(6), ToolSet(DEFINITIONS, format)
    fragments = [*FRAGMENTS, "<tool_call>", "</tool_call>", '{"name": "ping", "arguments": {}}', "{"]
    for _ in range(700):
        text = "".join(r.choices(fragments, k=r.randrange(1, 12)))
        piece = reply(tokenizer, text, tools)
        json.dumps(piece.tool_calls, allow_nan=False)
        if not piece.tool_calls:
            shown = re.sub(r"\n*</?tool_call>\n*", "", piece.text)
            assert shown.replace("\n", "") == re.sub(r"</?tool_call>", "", text).replace("\n", "")


def test_text_goes_out_as_soon_as_it_can_be_no_call(tokenizer: Tokenizer) -> None:
    stream = BareCalls(CODER)
    pushed = ["a <func", "tion=pi", "e> b", " <function=ping", ">", "x"]
    assert [stream.push(text) for text in pushed] == [["a "], [], ["<function=pie> b"], [" "], [], []]
    assert stream.flush() == ["<function=ping>x"]
