"""The document of the API: it is valid, it is all that is served, and what it says of bodies is what the server does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import jsonschema
import pytest
from servers import Client, Server

from qwen3c.serve import openapi
from qwen3c.serve.app import create_app
from qwen3c.serve.catalogue import ANSWERS, DESCRIPTIONS, ENDPOINTS, ERRORS
from qwen3c.serve.errors import ApiError

Json = dict[str, Any]
REFUSED, IGNORED = "x-qwen3c-refused", "x-qwen3c-ignored"
KINDS = ("x", 1, 1.5, True, [], {}, [[]], [{}], -1, 1 << 70)


@pytest.fixture(scope="module")
def document(thinker: Client) -> Json:
    found: Json = thinker.http.get("/openapi.json").json()
    return found


@pytest.fixture(scope="module")
def reads(tiny: Server) -> Callable[[str, Json], None]:
    """Read a body as an endpoint does, up to where the engine would begin; ApiError if it is refused."""
    dry = replace(tiny.api, models=cast(Any, openapi._Unasked(tiny.served)))
    readers = {path: route.endpoint for route in create_app(dry).routes for _, path in openapi.addresses(route)}  # type: ignore[attr-defined]

    def read(path: str, body: Json) -> None:
        asyncio.run(openapi._noted(readers[path], path, body))

    return read


def bodies(document: Json) -> Iterator[tuple[str, Json, list[Json]]]:
    """(address, schema of its body, examples) of what takes a body."""
    for path, operations in document["paths"].items():
        if "requestBody" in operations.get("post", {}):
            content = operations["post"]["requestBody"]["content"]["application/json"]
            yield path, content["schema"], [one["value"] for one in content["examples"].values()]


def fields(schema: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    """All fields of a schema, by dotted path."""
    for one in (schema, *schema.get("anyOf", ())):
        for name, inner in one.get("properties", {}).items():
            where = f"{path}.{name}" if path else name
            yield where, inner
            yield from fields(inner, where)
        if "items" in one:
            yield from fields(one["items"], f"{path}[]")


def error_of(reads: Callable[[str, Json], None], path: str, body: Json) -> ApiError | None:
    """Why a body is refused; None if it is not."""
    try:
        reads(path, body)
    except ApiError as error:
        return error
    return None


def checked(document: Json, name: str, value: Any) -> None:
    """Fail if a value is none of the shape of that name."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def test_the_document_is_valid(document: Json) -> None:
    validator = pytest.importorskip("openapi_spec_validator", reason="knows what OpenAPI 3.1 is")
    validator.validate(document)


def test_every_route_is_in_the_document_and_nothing_else(tiny: Server, document: Json) -> None:
    served = {found for route in create_app(tiny.api).routes for found in openapi.addresses(route)}
    told = {(method.upper(), path) for path, found in document["paths"].items() for method in found}
    assert told == served
    assert told <= ENDPOINTS.keys()


def test_every_field_has_a_description_and_every_description_a_field(document: Json) -> None:
    described = set()
    for path, schema, _ in bodies(document):
        for where, inner in fields(schema):
            assert inner.get("description"), f"{path}: {where}"
            if f"{path} {where}" in DESCRIPTIONS:
                described.add(f"{path} {where}")
                continue
            names = where.split(".")
            ends = (".".join(names[i:]) for i in range(len(names)))
            found = next((end for end in ends if end in DESCRIPTIONS), None)
            if found is not None and inner["description"] == DESCRIPTIONS[found]:
                described.add(found)
    assert set(DESCRIPTIONS) == described


def test_every_shape_and_every_error_is_used(document: Json) -> None:
    text = json.dumps(document["paths"]) + json.dumps(ANSWERS)
    later = {found.answer for found in ENDPOINTS.values()}
    assert {name for name in ANSWERS if f'/schemas/{name}"' not in text} <= later | {"Error", "AnthropicError"}
    assert {status for found in ENDPOINTS.values() for status in found.errors} == set(ERRORS)


def test_every_example_is_accepted_and_answered_as_it_is_told(thinker: Client, document: Json) -> None:
    count = 0
    for path, schema, examples in bodies(document):
        assert len(examples) == len(ENDPOINTS["POST", path].examples)
        told = ENDPOINTS["POST", path]
        for example in examples:
            jsonschema.Draft202012Validator(schema).validate(example)
            answer = thinker.http.post(path, json=example)
            if path.endswith("rerank") and answer.status_code == 400:  # the model lacks the tokens
                assert "token" in answer.json()["error"]["message"]
                continue
            assert answer.status_code == 200, (path, example, answer.text)
            if not example.get("stream"):
                checked(document, told.answer, answer.json())
                count += 1
                continue
            *events, last = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
            assert told.events
            for event in events if last == "[DONE]" else [*events, last]:
                checked(document, told.events, json.loads(event))
    assert count > 40


def test_whatever_is_got_has_the_shape_that_is_told(thinker: Client, document: Json) -> None:
    for path, operations in document["paths"].items():
        told = ENDPOINTS.get(("GET", path))
        if "get" in operations and told is not None and "/" not in told.answer:
            checked(document, told.answer, thinker.http.get(path.replace("{name}", "tiny")).json())


def test_errors_have_the_shapes_that_are_told(client: Client, document: Json) -> None:
    checked(document, "Error", client.http.post("/v1/chat/completions", json={}).json())
    checked(document, "AnthropicError", client.http.post("/v1/messages", json={}).json())


def test_what_the_document_forbids_is_refused_by_name(
    document: Json, reads: Callable[[str, Json], None]
) -> None:
    tried = 0
    for path, schema, examples in bodies(document):
        validator = jsonschema.Draft202012Validator(schema)
        for name in schema["properties"]:
            for value in KINDS:
                body = examples[0] | {name: value}
                if validator.is_valid(body):
                    continue
                tried += 1
                refused = error_of(reads, path, body)
                assert refused is not None, (path, name, value)
                assert refused.status == 400, (path, name, value)
                assert (refused.param or "").startswith(name), (path, name, value, refused.param)
    assert tried > 1000


def test_what_is_required_is_asked_for(document: Json, reads: Callable[[str, Json], None]) -> None:
    for path, schema, examples in bodies(document):
        for name in schema.get("required", ()):
            with pytest.raises(ApiError) as refused:
                reads(path, {key: value for key, value in examples[0].items() if key != name})
            assert refused.value.param == name


def test_refused_fields_are_refused_and_ignored_ones_are_not(
    document: Json, reads: Callable[[str, Json], None]
) -> None:
    refused, ignored = set(), set()
    for path, schema, examples in bodies(document):
        for name, told in schema["properties"].items():
            if REFUSED in told:
                refused.add(name)
                error = error_of(reads, path, examples[0] | {name: "something"})
                assert error is not None and "is not supported" in error.message, (path, name)
            if IGNORED in told:
                ignored.add(name)
                for value in KINDS:
                    reads(path, examples[0] | {name: value})
    assert refused > {"functions", "suffix", "mirostat", "previous_response_id", "output_format"}
    assert ignored > {"user", "store", "betas"}


def test_an_example_that_the_model_cannot_obey_is_left_out(client: Client) -> None:
    """And the document still comes: of a model that thinks, as of one that does not."""
    answer = client.http.get("/openapi.json")
    assert answer.status_code == 200
    assert len(answer.json()["paths"]["/v1/chat/completions"]["post"]["requestBody"]) == 2
