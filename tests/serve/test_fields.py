"""A body that cannot be meant is an error that names the field, on every surface; no server fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from servers import Client

from qwen3c.serve.errors import ApiError
from qwen3c.serve.fields import Fields, parse_json

CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"


def refused(body: Any, take: Callable[[Fields], object]) -> ApiError:
    with pytest.raises(ApiError) as error:
        take(Fields(body))
    assert error.value.status == 400
    return error.value


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"stream": false, "a": 1, "stream": true}', "stream"),
        (b'{"messages": [{"role": "user", "content": "a", "role": "system"}]}', "role"),
        (b'{"tools": [{"x": {"' + b"y" * 100 + b'": 1, "' + b"y" * 100 + b'": 1}}]}', "y" * 59 + "…"),
    ],
)
def test_a_key_that_is_there_twice_is_refused_by_name(body: bytes, key: str) -> None:
    """Of two values one reader may take the first and another the last."""
    with pytest.raises(ApiError, match=f"the key '{key}' is twice in one object") as error:
        parse_json(body)
    assert (error.value.status, error.value.param, error.value.code) == (400, key, "duplicate_key")


# ----------------------------------------------------------------------------
# One field


@pytest.mark.parametrize(
    "value", [True, "5", [], {}, 5.5, -1, 11, 1 << 63, 1e300, float("nan"), float("inf")]
)
def test_a_whole_number_is_nothing_else_and_within_its_bounds(value: Any) -> None:
    assert refused({"n": value}, lambda fields: fields.whole("n", 0, 10)).param == "n"


@pytest.mark.parametrize("value", [True, "5", [], {}, -0.1, 10.1, 1 << 63, float("-inf")])
def test_a_number_is_nothing_else_and_within_its_bounds(value: Any) -> None:
    assert refused({"x": value}, lambda fields: fields.number("x", 0, 10)).param == "x"


def test_what_is_right_is_taken_and_null_is_absence() -> None:
    given: dict[str, Any] = {"n": 5.0, "x": 5, "t": "a", "f": False, "l": [1], "o": {"t": "b"}, "z": None}
    fields = Fields(given)
    assert fields.whole("n", 0, 10) == 5 and type(fields.whole("n", 0, 10)) is int
    assert fields.number("x", 0, 10) == 5.0 and type(fields.number("x", 0, 10)) is float
    assert fields.text("t", choices=("a",)) == "a" and fields.flag("f") is False
    assert fields.items("l", 1) == [1] and fields.texts("t", 1) == ["a"]
    inner = fields.object("o")
    assert inner is not None and inner.text("t") == "b"
    assert fields.whole("z", 0, 1, 7) == 7 and fields.flag("missing", True) is True
    assert "z" not in fields and "n" in fields
    assert fields.finish() == []


def test_an_error_names_the_whole_path() -> None:
    def inner(fields: Fields) -> None:
        inside = fields.object("a")
        assert inside is not None
        inside.whole("b", 0, 1)

    assert refused({"a": {"b": 5}}, inner).param == "a.b"
    assert refused({"l": ["a", 5]}, lambda fields: fields.texts("l", 5)).param == "l[1]"
    assert refused({"l": [1, 2]}, lambda fields: fields.items("l", 1)).param == "l"


def test_a_misspelt_name_is_an_error_and_a_foreign_one_is_not() -> None:
    def take(fields: Fields) -> list[str]:
        fields.whole("max_tokens", 0, 5)
        return fields.finish()

    assert "max_tokens" in refused({"max_tokns": 1}, take).message
    assert take(Fields({"zebra": 1})) == ["zebra"]


def test_what_is_refused_may_have_the_value_that_changes_nothing() -> None:
    for nothing in (0, None):
        Fields({"m": nothing}).refuse("m", "no", unless=(0,))
    for value in (1, False, "0"):
        error = refused({"m": value}, lambda fields: fields.refuse("m", "no", unless=(0,)))
        assert error.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"a": {"b": [float("nan")]}}, "a.b[0]"), ({"a": "\ud800"}, "a"), ({"\udfff": 1}, None), ([], None),
        (5, None),
        (float("nan"), None),
    ],
    ids=str,
)  # fmt: skip
def test_what_nobody_can_mean_is_found_wherever_it_is(body: Any, param: str | None) -> None:
    assert refused(body, lambda fields: fields).param == param


@pytest.mark.parametrize("body", [b"", b"{", b'{"a":1}x', b"\xff{}", b"'a'", b'{"a":01}', b"[" * 100_000])
def test_a_body_that_is_no_json_is_an_error(body: bytes) -> None:
    with pytest.raises(ApiError) as error:
        parse_json(body)
    assert (error.value.status, error.value.code) == (400, "invalid_json")


def test_huge_integers_cost_nothing() -> None:
    value = parse_json(b'{"n":' + b"9" * 2_000_000 + b"}")
    assert refused(value, lambda fields: fields).param == "n"


# ----------------------------------------------------------------------------
# Every field of every surface

MESSAGES = [{"role": "user", "content": "hi"}]
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "repeat_penalty", "seed", "priority", "logit_bias", "stop", "n",
)  # fmt: skip
FORMATS = ("response_format", "guided_json", "guided_regex", "guided_choice", "grammar", "structured_outputs")
OTHERS = ("mirostat", "min_tokens", "ignore_eos", "best_of", "prompt_logprobs", "stop_token_ids", "typical_p")
SURFACES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    CHAT: (
        {"messages": MESSAGES, "max_tokens": 1},
        (
            *SAMPLING, *FORMATS, *OTHERS, "model", "messages", "max_tokens", "max_completion_tokens",
            "logprobs",
            "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "stream_options",
            "return_progress",
            "reasoning_effort", "chat_template_kwargs", "thinking_budget", "modalities", "functions",
            "user", "metadata",
        ),
    ),
    TEXTS: (
        {"prompt": "a", "max_tokens": 1},
        (
            *SAMPLING, *FORMATS, *OTHERS, "model", "prompt", "max_tokens", "logprobs", "echo", "suffix",
            "stream_options", "return_token_ids", "return_tokens_as_token_ids", "parse_special",
            "add_special_tokens",
        ),
    ),
    "/v1/embeddings": ({"input": "a"},
     ("model", "input", "dimensions", "encoding_format", "normalize", "priority")),
    "/v1/rerank": (
        {"query": "a", "documents": ["b"]},
        ("model", "query", "documents", "texts", "top_n", "return_documents", "raw_scores", "instruction",
         "priority"),
    ),
    "/v1/responses": (
        {"input": "hi", "max_output_tokens": 1},
        (
            "model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "top_k", "min_p",
            "seed",
            "top_logprobs", "tools", "tool_choice", "text", "reasoning", "include", "truncation",
            "background",
            "parallel_tool_calls", "previous_response_id",
        ),
    ),
    "/v1/messages": (
        {"messages": MESSAGES, "max_tokens": 1},
        (
            "model", "messages", "max_tokens", "temperature", "top_p", "top_k", "stop_sequences", "system",
            "tools",
            "tool_choice", "thinking", "metadata",
        ),
    ),
    "/v1/messages/count_tokens": ({"messages": MESSAGES},
     ("model", "messages", "system", "tools", "thinking")),
    "/tokenize": (
        {"prompt": "a"},
        ("model", "prompt", "content", "messages", "add_special", "add_special_tokens", "with_pieces",
         "parse_special"),
    ),
    "/detokenize": ({"tokens": [5]}, ("model", "tokens")),
    "/apply-template": ({"messages": MESSAGES}, ("messages", "tools", "chat_template_kwargs")),
}  # fmt: skip
VALUES = (
    "-1", "0", "1", "2147483648", "9223372036854775808", "-9223372036854775809", "NaN", "Infinity", "1e999",
    "0.5", "true",
    "false", '"5"', '""', "null", "[]", "{}", "[[]]", "[null]", '[{}]', '{"type":5}', "9" * 400, '"\\ud800"',
)  # fmt: skip
DEEP = '{"a":' * 300 + "1" + "}" * 300


def bodies() -> list[tuple[str, str, bytes]]:
    """(path, field, body): every field with every value."""
    found = []
    for path, (base, names) in SURFACES.items():
        for name in names:
            for value in (*VALUES, DEEP):
                rest = {key: item for key, item in base.items() if key != name}
                text = json.dumps(rest)[:-1] + (", " if rest else "") + f'"{name}": {value}}}'
                found.append((path, name, text.encode()))
    return found


BODIES = bodies()


@pytest.mark.parametrize("path", SURFACES)
def test_every_field_with_every_value_is_answered_or_refused_by_name(
    client: Client, ranker: Client, path: str
) -> None:
    assert len(BODIES) > 2000
    mine = [(name, body) for where, name, body in BODIES if where == path]
    n_refused = 0
    for name, body in mine:
        answer = (ranker if path == "/v1/rerank" else client).post(path, body)
        assert answer.status in (200, 400), (body[:200], answer.body)
        if answer.status == 400:
            n_refused += 1
            error = answer.error
            assert name in (error.get("param") or "") or name in error["message"], (body[:200], error)
            assert "\n" not in error["message"] and len(error["message"]) < 500, error
            assert "Traceback" not in error["message"] and "/work" not in error["message"]
    assert n_refused > len(mine) // 4


def test_texts_with_control_characters_and_of_every_script_are_texts(client: Client) -> None:
    for text in ("\0", "\x7f\x1b[2J", "\u202e\ufdd0", "日本\U0001f600", "a" * 300):
        for path, fields in (
            (CHAT, {"messages": [{"role": "user", "content": text}]}),
            (TEXTS, {"prompt": text}),
        ):
            assert client.post(path, fields | {"max_tokens": 1}).status == 200


LOOPS = (
    {"guided_json": {"$ref": "#"}}, {"response_format": {"type": "lark", "lark": "start: start start"}},
    {"response_format": {"type": "lark", "lark": "start: a\na: b\nb: a"}},
)  # fmt: skip


@pytest.mark.parametrize("fields", LOOPS, ids=str)
def test_a_grammar_without_a_first_token_is_refused_before_anything_is_computed(
    client: Client, fields: dict[str, Any]
) -> None:
    for path, base in ((CHAT, {"messages": MESSAGES}), (TEXTS, {"prompt": "a"})):
        for stream in (False, True):
            answer = client.post(path, base | fields | {"stream": stream})
            assert (answer.status, answer.error["code"]) == (400, "unsupported_schema")
            assert next(iter(fields)) in answer.error["param"]


def test_thousands_of_choices_are_followed(client: Client) -> None:
    choices = [f"{i} is a number" for i in range(4096)]
    body = client.ok(TEXTS, prompt="a", guided_choice=choices, max_tokens=60)
    assert body["choices"][0]["text"] in choices


def test_fields_that_nobody_knows_are_not_compared_without_end(client: Client) -> None:
    unknown = {f"zebra{i}": 1 for i in range(101)}
    error = client.post(CHAT, {"messages": MESSAGES, "max_tokens": 1} | unknown).error
    assert (error["param"], error["code"]) == ("zebra0", "unknown_parameter") and "101" in error["message"]
    del unknown["zebra0"]
    assert client.post(CHAT, {"messages": MESSAGES, "max_tokens": 1} | unknown).status == 200
