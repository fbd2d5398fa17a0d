"""The document of the API: it is valid and complete, and the server does with bodies what it says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jsonschema
import openapi_spec_validator
import pytest
from api_tables import document as whole_document
from servers import BOX, Client, Server, running
from small_models import export_small_model
from small_server import serving
from starlette.routing import Route

from qwen3c.cli.serve import _application
from qwen3c.serve import openapi
from qwen3c.serve.app import create_app
from qwen3c.serve.catalogue import ANSWERS, DESCRIPTIONS, ENDPOINTS, ERRORS
from qwen3c.serve.config import ModelSettings, Settings
from qwen3c.serve.errors import ApiError
from qwen3c.serve.surfaces import chat

Json = dict[str, Any]
REFUSED, IGNORED = "x-qwen3c-refused", "x-qwen3c-ignored"
KINDS: tuple[Any, ...] = ("x", 1, 1.5, True, [], {}, [[]], [{}], -1, 1 << 70)


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a hybrid model that can call tools."""
    with running({"caller": export_small_model(tmp_path_factory.mktemp("caller"), context=1024)}) as server:
        yield server


@pytest.fixture(scope="module")
def asks(caller: Server) -> Client:
    return Client(caller.address)


@pytest.fixture(scope="module")
def document(asks: Client) -> Json:
    found: Json = asks.http.get("/openapi.json").json()
    return found


@pytest.fixture(scope="module")
def reads(caller: Server) -> Iterator[Callable[[str, Json], None]]:
    """Read a body as an endpoint does, up to where the engine would begin; ApiError if it is refused."""
    dry = replace(caller.api, models=cast(Any, openapi._Unasked(caller.served)))
    routes = [route for route in create_app(dry).routes if isinstance(route, Route)]
    readers = {path: route.endpoint for route in routes for _, path in openapi.addresses(route)}
    loop = asyncio.new_event_loop()

    def read(path: str, body: Json) -> None:
        loop.run_until_complete(openapi._noted(readers[path], path, body))

    yield read
    loop.close()


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
    openapi_spec_validator.validate(document)


def test_every_route_is_in_the_document_and_nothing_else(caller: Server, document: Json) -> None:
    served = {found for route in create_app(caller.api).routes for found in openapi.addresses(route)}
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
    assert {name for name in ANSWERS if f'/schemas/{name}"' not in text} <= later | {
        "Error",
        "AnthropicError",
    }
    assert {status for found in ENDPOINTS.values() for status in found.errors} == set(ERRORS)


def test_every_example_is_accepted_and_answered_as_it_is_told(
    asks: Client, ranker: Client, document: Json
) -> None:
    count = 0
    for path, schema, examples in bodies(document):
        assert len(examples) == len(ENDPOINTS["POST", path].examples)
        told = ENDPOINTS["POST", path]
        for example in examples:
            jsonschema.Draft202012Validator(schema).validate(example)
            answer = (ranker if path.endswith("rerank") else asks).http.post(path, json=example)
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


def test_whatever_is_got_has_the_shape_that_is_told(asks: Client, document: Json) -> None:
    for path, operations in document["paths"].items():
        told = ENDPOINTS.get(("GET", path))
        if "get" in operations and told is not None and "/" not in told.answer:
            checked(document, told.answer, asks.http.get(path.replace("{name}", "caller")).json())


def test_errors_have_the_shapes_that_are_told(client: Client, document: Json) -> None:
    checked(document, "Error", client.http.post("/v1/chat/completions", json={}).json())
    checked(document, "AnthropicError", client.http.post("/v1/messages", json={}).json())


def test_what_the_document_forbids_is_refused_by_name(
    asks: Client, document: Json, reads: Callable[[str, Json], None]
) -> None:
    tried = 0
    for path, schema, examples in bodies(document):
        validator = jsonschema.Draft202012Validator(schema)
        for name in schema["properties"]:
            for value in KINDS:
                body = next((e for e in examples if name in e), examples[0]) | {name: value}
                if validator.is_valid(body):
                    continue
                tried += 1
                # some fields are asked for only beside messages, which the last example has
                tries = (error_of(reads, path, b) for b in (body, examples[-1] | {name: value}))
                refused = next(filter(None, tries), None)
                if refused is None:  # it is seen only when the engine is to begin
                    answer = asks.http.post(path, json=body)
                    assert answer.status_code == 400, (path, name, value, answer.text)
                    assert answer.json()["error"]["param"].startswith(name), (path, name, value)
                    continue
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
                errors = [error_of(reads, path, example | {name: "something"}) for example in examples]
                assert any(e is not None and "is not supported" in e.message for e in errors), (path, name)
            if IGNORED in told:
                ignored.add(name)
                for value in KINDS[:6]:
                    reads(path, examples[0] | {name: value})
    assert refused > {"functions", "suffix", "mirostat", "previous_response_id", "mcp_servers"}
    assert ignored > {"user", "store", "betas"}


def test_an_example_that_the_model_cannot_obey_is_left_out(client: Client) -> None:
    """And the document still comes: of a model that thinks, as of one that does not."""
    answer = client.http.get("/openapi.json")
    assert answer.status_code == 200
    assert len(answer.json()["paths"]["/v1/chat/completions"]["post"]["requestBody"]) == 2


def test_a_server_with_everything_serves_all_that_the_catalogue_knows() -> None:
    """The page, the metrics, the MCP server and the tools of other servers among it."""
    found = whole_document()
    assert {(m.upper(), path) for path, told in found["paths"].items() for m in told} == ENDPOINTS.keys()


def test_keys_that_are_needed_are_told(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("me secret-key\n")
    app, _ = _application(Settings(models={"box": ModelSettings(str(BOX))}, cache_memory=64 << 20), True)
    with serving(app, api_keys_file=str(keys)) as server:
        assert server.get("/openapi.json").status == 401
        found = server.get("/openapi.json", x_api_key="secret-key").json
    needs = {path for path, told in found["paths"].items() for one in told.values() if "security" in one}
    assert needs == found["paths"].keys() - {"/", "/health"}


def test_no_provider_is_asked_for_the_document(caller: Server) -> None:
    api = replace(caller.api, provider=cast(Any, object()))  # whatever is asked of it fails
    made = asyncio.run(openapi.document(api, [chat], chat.routes(api)))
    assert made["paths"].keys() == {"/v1/chat/completions"}
