"""Bodies that the endpoints accept: they show in the document of the API, and tests send them.

They hold each object and list that a body may have, for openapi.py sees only so what may be inside.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

USER: Json = {"role": "user", "content": "Who are you?"}
WEATHER: Json = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOL: Json = {"type": "function", "function": WEATHER}
CALL: Json = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city":"Rome"}'},
}
SCHEMA: Json = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
CHAT: Json = {"messages": [USER], "max_tokens": 8}
KWARGS: Json = {"chat_template_kwargs": {"enable_thinking": False}}
CONVERSATIONS: tuple[Json, ...] = (
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ]
    },
    {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [CALL, CALL | {"function": {"name": "weather", "arguments": {}}}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        "tools": [TOOL],
    },
    {"messages": [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER]},
)
BLOCKS: tuple[Json, ...] = (  # of Anthropic's
    {"messages": [USER], "system": "Be brief.", "stop_sequences": ["."]},
    {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "system": [{"type": "text", "text": "Be brief."}],
        "thinking": {"type": "disabled"},
    },
    {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Rome?", "signature": ""},
                    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_1",
                        "content": [{"type": "text", "text": "sunny"}],
                        "is_error": False,
                    },
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"},
                ],
            },
        ],
        "tools": [{"name": "weather", "description": "The weather.", "input_schema": WEATHER["parameters"]}],
        "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    },
    {
        "messages": [USER],
        "tools": [{"name": "weather", "input_schema": WEATHER["parameters"]}],
        "tool_choice": {"type": "auto"},
    },
    {"messages": [USER], "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    {"messages": [USER], "output_format": {"type": "json_schema", "schema": SCHEMA}},
)


def _completions(*more: Json) -> tuple[Json, ...]:
    """Bodies of /v1/completions, the ways of saying what a text must look like among them."""
    formats: tuple[Json, ...] = (
        {"response_format": {"type": "json_object"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "number", "schema": SCHEMA, "strict": True},
            }
        },
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": {"type": "regex", "regex": "[0-9]+"}},
        {"response_format": {"type": "choice", "choice": ["yes", "no"]}},
        {"response_format": {"type": "lark", "lark": 'start: "yes" | "no"'}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": True}}},
        {"guided_json": SCHEMA},
        {"guided_json": True},
        {"json_schema": SCHEMA},
        {"json_schema": True},
        {"guided_regex": "[0-9]+"},
        {"guided_choice": ["yes", "no"]},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"logit_bias": {"5": -100}, "repeat_penalty": 1.1, "stop": ["."], "seed": 1},
    )
    return (*more, *formats)


CHATS: tuple[Json, ...] = tuple(
    CHAT | more
    for more in _completions(
        *CONVERSATIONS,
        {"temperature": 0.7, "seed": 1},
        {"tools": [TOOL], "tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        KWARGS,
    )
)

TEXTS: tuple[Json, ...] = tuple(
    {"prompt": "def add(a, b):", "max_tokens": 8} | more
    for more in _completions(
        {},
        {"prompt": ["import ", "from "], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0},
        {"prompt": [[5, 6, 7], [8, 9]]},
    )
)

RESPONSES: tuple[Json, ...] = tuple(
    {"max_output_tokens": 8} | more
    for more in (
        {"input": "Who are you?", "instructions": "Be brief."},
        {
            "input": [
                {"role": "developer", "content": "Be brief."},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
            ],
            "stream": True,
        },
        {
            "input": [
                USER,
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Rome?"}]},
                {
                    "type": "reasoning",
                    "content": [{"type": "reasoning_text", "text": "Rome?"}],
                    "summary": [],
                },
                {
                    "type": "function_call",
                    "call_id": "call_1",
                    "name": "weather",
                    "arguments": '{"city":"Rome"}',
                },
                {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
                {
                    "type": "function_call_output",
                    "call_id": "call_1",
                    "output": [{"type": "input_text", "text": "sunny"}],
                },
            ],
            "tools": [{"type": "function", **WEATHER, "strict": False}],
            "tool_choice": "auto",
        },
        {
            "input": "Rome?",
            "tools": [{"type": "function", **WEATHER}],
            "tool_choice": {"type": "function", "name": "weather"},
        },
        {
            "input": "A number.",
            "text": {"format": {"type": "json_schema", "name": "number", "schema": SCHEMA, "strict": True}},
        },
        {
            "input": "An object.",
            "text": {"format": {"type": "json_object"}},
            "stop": ["."],
            "include": ["message.output_text.logprobs"],
            "reasoning": {"effort": "none"},
        },
    )
)

MESSAGES: tuple[Json, ...] = tuple(
    {"max_tokens": 8} | more for more in (*BLOCKS, BLOCKS[0] | {"stream": True})
)

EMBEDDINGS: tuple[Json, ...] = (
    {"input": "a text"},
    {"input": ["a text", "another"], "encoding_format": "base64"},
    {"input": [5, 6, 7], "dimensions": 8},
    {"input": [[5, 6, 7], [8]]},
)

RERANKS: tuple[Json, ...] = (
    {"query": "import", "documents": ["one text", {"text": "another"}], "top_n": 1, "return_documents": True},
    {"query": "import", "texts": ["one text", "another"], "return_text": True, "raw_scores": True},
)

TOKENIZES: tuple[Json, ...] = (
    {"prompt": "a text"},
    {"content": "a text", "with_pieces": True},
    {"text": "a text", "return_token_strs": True},
    *CONVERSATIONS,
    CONVERSATIONS[0] | KWARGS,
)

TEMPLATES: tuple[Json, ...] = (*CONVERSATIONS, CONVERSATIONS[0] | KWARGS)
