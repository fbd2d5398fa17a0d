"""OpenAI's schemas of its answers (openai_schemas.json), and the checks of bodies and chunks against them.

Three things are otherwise here, on purpose: the first token of an echoed prompt has no log-probability (null,
as lm-eval and OpenAI's own server have it), embeddings may be base64 (what openai-python asks for), and a
chunk of a completion has no finish_reason before the last (as OpenAI's own server has it).
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

_FILE = Path(__file__).with_name("openai_schemas.json")


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


@cache
def _definitions() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_FILE.read_text())["$defs"]
    choice = found["CreateCompletionResponse"]["properties"]["choices"]["items"]
    logprobs = choice["properties"]["logprobs"]["anyOf"][0]["properties"]
    for name in ("token_logprobs", "top_logprobs"):
        logprobs[name]["items"] = _or_null(logprobs[name]["items"])
    chunk = copy.deepcopy(found["CreateCompletionResponse"])
    properties = chunk["properties"]["choices"]["items"]["properties"]
    properties["finish_reason"] = _or_null(properties["finish_reason"])
    vector = found["Embedding"]["properties"]
    vector["embedding"] = {"anyOf": [vector["embedding"], {"type": "string"}]}
    return found | {"CompletionChunk": chunk}


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": _definitions()})


def check(name: str, value: Any) -> None:
    """AssertionError if the value does not fit OpenAI's schema of this name."""
    errors = [f"{error.json_path}: {error.message}" for error in _validator(name).iter_errors(value)]
    assert not errors, (name, errors, value)


BODIES = {
    "/v1/chat/completions": "CreateChatCompletionResponse",
    "/v1/completions": "CreateCompletionResponse",
    "/v1/embeddings": "CreateEmbeddingResponse",
    "/v1/models": "ListModelsResponse",
}
CHUNKS = {
    "/v1/chat/completions": "CreateChatCompletionStreamResponse",
    "/v1/completions": "CompletionChunk",
}


def check_body(path: str, status: int, body: Any) -> None:
    """Check a whole answer to a request at `path`."""
    if path.startswith("/v1/messages"):  # Anthropic's
        assert status < 400 or body["error"].keys() == {"type", "message"}
    elif status >= 400 and path != "/health":
        check("ErrorResponse", body)
    elif path in BODIES:
        check(BODIES[path], body)
    elif path.startswith("/v1/models/"):
        check("Model", body)


def check_chunk(path: str, chunk: Any) -> None:
    """Check the data of one event of a stream from `path`."""
    check("ErrorResponse" if "error" in chunk else CHUNKS[path], chunk)
