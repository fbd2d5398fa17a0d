"""Answers fit OpenAI's schemas, and where they do not, on purpose, the schemas would say so.

The client of these tests (servers.py) holds every body and every chunk that it sees against the schemas, so
that every test of a surface is a test of them, too.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openai_schema import check, check_body, check_chunk
from servers import Client

CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
PUBLISHED = json.loads(Path(__file__).with_name("openai_schemas.json").read_text())["$defs"]


def faults(name: str, value: Any) -> list[str]:
    """Where the schema as OpenAI has published it finds a fault."""
    validator = Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": PUBLISHED})
    return sorted({error.json_path for error in validator.iter_errors(value)})


def without(value: Any, *path: Any) -> Any:
    """A copy that lacks what is at the path."""
    found = inner = copy.deepcopy(value)
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return found


def test_answers_fit_the_schemas_as_they_are_published(client: Client) -> None:
    fields: dict[str, Any] = {
        "messages": MESSAGES,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 3,
        "n": 2,
    }
    assert faults("CreateChatCompletionResponse", client.ok(CHAT, **fields)) == []
    for chunk in client.events(CHAT, stream_options={"include_usage": True}, **fields):
        assert faults("CreateChatCompletionStreamResponse", chunk) == []
    assert faults("CreateCompletionResponse", client.ok(TEXTS, prompt="a", logprobs=2, echo=False)) == []
    assert faults("CreateEmbeddingResponse", client.ok("/v1/embeddings", input=["a", "b"])) == []
    assert faults("ListModelsResponse", client.get("/v1/models").body) == []
    assert faults("ErrorResponse", client.post(CHAT, {}).body) == []


def test_the_three_deviations_are_where_they_are_said_to_be(client: Client) -> None:
    echoed = client.ok(TEXTS, prompt="a", echo=True, logprobs=1, max_tokens=1)
    assert faults("CreateCompletionResponse", echoed) == ["$.choices[0].logprobs"]
    vectors = client.ok("/v1/embeddings", input="a", encoding_format="base64")
    assert faults("CreateEmbeddingResponse", vectors) == ["$.data[0].embedding"]
    for chunk in client.events(TEXTS, prompt="a", max_tokens=4):
        ends = chunk["choices"][0]["finish_reason"] is not None
        assert faults("CreateCompletionResponse", chunk) == ([] if ends else ["$.choices[0].finish_reason"])


@pytest.mark.parametrize(
    "path",
    [
        ("id",), ("usage", "total_tokens"), ("choices", 0, "logprobs"), ("choices", 0, "finish_reason"),
        ("choices", 0, "message", "refusal"), ("choices", 0, "message", "content"),
    ],
    ids=str,
)  # fmt: skip
def test_a_body_that_lacks_something_is_found(client: Client, path: tuple[Any, ...]) -> None:
    body = client.ok(CHAT, messages=MESSAGES, max_tokens=1)
    check_body(CHAT, 200, body)
    with pytest.raises(AssertionError):
        check_body(CHAT, 200, without(body, *path))


def test_a_chunk_or_an_error_that_is_wrong_is_found(client: Client) -> None:
    chunk = client.events(CHAT, messages=MESSAGES, max_tokens=1)[0]
    check_chunk(CHAT, chunk)
    with pytest.raises(AssertionError):
        check_chunk(CHAT, without(chunk, "choices", 0, "finish_reason"))
    with pytest.raises(AssertionError):
        check_chunk(CHAT, {"error": {"message": "a", "type": "b", "code": None}})
    with pytest.raises(AssertionError):
        check("ErrorResponse", {"error": "a"})
