"""GET /openapi.json: the OpenAPI document of what is really served.

The fields of a body are those that its endpoint asks for: each example is read by the endpoint itself, up to
where the engine would begin, while Fields note what they are asked for. A field without which the endpoint
refuses the examples is required. So the code says once what it takes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Message

from .. import __version__
from .api import Api, json_answer
from .catalogue import ANSWERS, DESCRIPTIONS, ENDPOINTS, ERRORS, HEADERS, Endpoint
from .errors import ApiError
from .examples import Json
from .fields import recorded
from .models import Models, Served

Read = Callable[[Request], Awaitable[Response]]
SUMMARY = (
    "Every body is a JSON object; a null field counts as absent. A field that would change the meaning and "
    "cannot be obeyed is a 400 that names it (x-qwen3c-refused); one that changes nothing is taken "
    "(x-qwen3c-ignored); what nobody knows is named in the header x-qwen3c-ignored, unless it is nearly a "
    "known name: that is a 400, too."
)


class Surface(Protocol):
    """A file of surfaces/."""

    def routes(self, api: Api) -> list[Route]: ...


def routes(api: Api, surfaces: Sequence[Surface]) -> list[Route]:
    """The endpoint. surfaces: those whose endpoints read bodies."""
    made: list[Json] = []

    async def openapi(request: Request) -> Response:
        if not made:
            made.append(await document(api, surfaces, request.app.routes))
        return json_answer(made[0])

    return [Route("/openapi.json", openapi, methods=["GET"])]


async def document(api: Api, surfaces: Sequence[Surface], served: Iterable[BaseRoute]) -> Json:
    """The document of the routes of an app."""
    dry = replace(api, models=cast(Models, _Unasked(await api.models.get())), provider=None)
    readers = {
        (method, path): cast(Read, route.endpoint)
        for surface in surfaces
        for route in surface.routes(dry)
        for method, path in addresses(route)
    }
    paths: dict[str, Json] = {}
    for route in served:
        for method, path in addresses(route):
            endpoint = ENDPOINTS.get((method, path), Endpoint(path, "application/json"))
            operation = _operation(path, method, endpoint, api.needs_key)
            if endpoint.examples:
                operation["requestBody"] = await _body(readers[method, path], path, endpoint.examples)
            paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "qwen3c", "version": __version__, "description": SUMMARY},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": _components(),
    }


def addresses(route: BaseRoute) -> Iterator[tuple[str, str]]:
    """(method, path) of what a route answers, HEAD aside; none of a route that only repeats another."""
    if isinstance(route, Route) and route.include_in_schema:
        path = route.path.replace(":path}", "}")
        for method in sorted((route.methods or {"POST"}) - {"HEAD"}):
            yield method, path


# ----------------------------------------------------------------------------
# Operations


def _operation(path: str, method: str, endpoint: Endpoint, keyed: bool) -> Json:
    anthropic = "-anthropic" if path.startswith("/v1/messages") else ""
    answers: Json = {"200": _answer(endpoint)}
    for status in endpoint.errors:
        answers[str(status)] = {"$ref": f"#/components/responses/{status}{anthropic}"}
    name = f"{method.lower()}{path}".replace("/", "_").replace("{", "").replace("}", "").strip("_")
    operation: Json = {"operationId": name, "summary": endpoint.summary, "responses": answers}
    parameters: list[Json] = [
        {"name": name, "in": "query", "schema": {"type": "string"}, "description": DESCRIPTIONS[name]}
        for name in endpoint.query
    ]
    parameters += [
        {"name": name, "in": "header", "schema": {"enum": list(choices)}, "description": why}
        for name, (why, choices) in endpoint.headers.items()
    ]
    if "{name}" in path:
        parameters.append({"name": "name", "in": "path", "required": True, "schema": {"type": "string"}})
    if parameters:
        operation["parameters"] = parameters
    if keyed and not endpoint.open:
        operation["security"] = [{"bearer": []}, {"x-api-key": []}]
    return operation


def _answer(endpoint: Endpoint) -> Json:
    if "/" in endpoint.answer:
        return {"description": "the answer", "content": {endpoint.answer: {}}}
    content: Json = {"application/json": {"schema": _reference(endpoint.answer)}}
    if endpoint.events is not None:
        content["text/event-stream"] = {"schema": _reference(endpoint.events)}
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in HEADERS}
    return {"description": "the answer", "content": content, "headers": headers}


def _reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _components() -> Json:
    responses = {}
    for status, why in ERRORS.items():
        for end, name in (("", "Error"), ("-anthropic", "AnthropicError")):
            content = {"application/json": {"schema": _reference(name)}}
            responses[f"{status}{end}"] = {"description": why, "content": content}
    return {
        "schemas": ANSWERS,
        "responses": responses,
        "headers": {
            name: {"description": why, "schema": {"type": "string"}} for name, why in HEADERS.items()
        },
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        },
    }


# ----------------------------------------------------------------------------
# Bodies


class _WouldBeginError(Exception):
    """The body has been read and is accepted; now the engine would begin."""


class _Unasked:
    """In place of Models and of Served: what the default model is, but nothing is asked of it."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def __getattr__(self, name: str) -> Any:
        return getattr(self._served, name)

    async def get(self, name: str | None = None) -> _Unasked:
        return self

    async def work(self, *arguments: Any) -> Any:
        raise _WouldBeginError

    submit = rows = score = work


async def _body(read: Read, path: str, examples: Sequence[Json]) -> Json:
    """The requestBody of an endpoint."""
    root, accepted = Node(), []
    for example in examples:
        try:
            noted = await _noted(read, path, example)
        except ApiError:
            continue  # this model cannot do that
        accepted.append(example)
        for where, schemas in noted.items():
            root.at(where).take(schemas)
        root.see(example)
    for where, node in root.walk():
        node.required = bool(where) and all([await _needs(read, path, e, where) for e in accepted])
    shown = {str(i): {"value": example} for i, example in enumerate(accepted, 1)}
    schema = root.schema("")
    for name, own in schema.get("properties", {}).items():
        own["description"] = DESCRIPTIONS.get(f"{path} {name}", own["description"])
    return {"required": True, "content": {"application/json": {"schema": schema, "examples": shown}}}


async def _noted(read: Read, path: str, body: Json) -> dict[str, list[Json]]:
    """The fields that an endpoint asks for when this body comes. ApiError if it is refused."""
    await asyncio.sleep(0)  # replies go out meanwhile
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "state": {}}

    async def receive() -> Message:
        return {"type": "http.request", "body": json_answer(body).body, "more_body": False}

    request = Request(scope, receive)
    with recorded() as noted:
        try:
            await read(request)
        except _WouldBeginError:
            pass
    return noted


async def _needs(read: Read, path: str, example: Json, where: str) -> bool:
    """Whether an example has no object that could hold the field, or is refused without it, by its name."""
    bare = json.loads(json.dumps(example))  # no two objects of it are the same, which deepcopy would keep
    holders = list(_holders(bare, where.split(".")))
    name = where.rpartition(".")[2].removesuffix("[]")
    for holder, found in holders:
        if name not in holder:
            return False
        taken = holder.pop(name)
        try:
            await _noted(read, path, bare)
            return False
        except ApiError as error:
            if error.param is None or error.param != found:
                return False
        holder[name] = taken
    return bool(holders) or "." in where


def _holders(value: Any, names: list[str], path: str = "") -> Iterator[tuple[Json, str]]:
    """(an object that may hold the field, the path of the field in it), for each in the body."""
    name, rest = names[0], names[1:]
    if not isinstance(value, dict):
        return
    plain = name.removesuffix("[]")
    path = f"{path}.{plain}" if path else plain
    if not rest:
        yield value, path
    elif not name.endswith("[]"):
        yield from _holders(value.get(plain), rest, path)
    elif isinstance(value.get(plain), list):
        for i, item in enumerate(value[plain]):
            yield from _holders(item, rest, f"{path}[{i}]")


@dataclass
class Node:
    """A field: how the code describes it, kinds of values that examples have there, and what is inside."""

    noted: list[Json] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    fields: dict[str, Node] = field(default_factory=dict)
    item: Node | None = None
    required: bool = False

    def at(self, path: str) -> Node:
        """The field at a dotted path; [] is what a list holds."""
        node = self
        for name in path.split("."):
            node = node.fields.setdefault(name.removesuffix("[]"), Node())
            if name.endswith("[]"):
                node.item = node = node.item or Node()
        return node

    def take(self, schemas: Iterable[Json]) -> None:
        """Take in how the code describes the field."""
        self.noted += [schema for schema in schemas if schema not in self.noted]

    def see(self, value: Any) -> None:
        """Take in a value that is accepted."""
        self.kinds.add(_kind(value))
        if isinstance(value, dict):
            for name, inner in value.items():
                if name in self.fields:
                    self.fields[name].see(inner)
        if isinstance(value, list):
            self.item = self.item or Node()
            for inner in value:
                self.item.see(inner)

    def walk(self, path: str = "") -> Iterator[tuple[str, Node]]:
        """All fields with their paths."""
        yield path, self
        for name, node in self.fields.items():
            yield from node.walk(f"{path}.{name}" if path else name)
        if self.item is not None:
            for name, node in self.item.fields.items():
                yield from node.walk(f"{path}[].{name}")

    def schema(self, path: str) -> Json:
        """The JSON schema of the field."""
        made = self._described(path)
        kinds = [self._of_kind(kind, made, path) for kind in self._kinds(made)]
        if kinds and not self.required and path and not path.endswith("[]"):
            kinds.append({"type": "null"})
        for name in ("type", "minimum", "maximum", "maxItems", "items", "anyOf"):
            made.pop(name, None)
        return (made | kinds[0]) if len(kinds) == 1 else made | ({"anyOf": kinds} if kinds else {})

    def _described(self, path: str) -> Json:
        """What the code says of the field: that it is refused or ignored, if it never is anything else."""
        marked = [one for one in self.noted if "x-qwen3c-refused" in one or "x-qwen3c-ignored" in one]
        taken = [one for one in self.noted if one not in marked]
        made = dict(next(filter(None, taken), {}) if taken else marked[0] if marked else {})
        if path and not path.endswith("[]") and "description" not in made:
            made["description"] = description_of(path)
        if "enum" in made and None not in made["enum"] and not self.required:
            made["enum"] = [*made["enum"], None]
        return made

    def _kinds(self, made: Json) -> list[str]:
        """Names of the types that a value may have; none if it may have any."""
        if "x-qwen3c-refused" in made or "x-qwen3c-ignored" in made:
            return []
        told = {str(one["type"]) for one in (made, *made.get("anyOf", ())) if "type" in one}
        seen = self.kinds - ({"integer"} if "number" in told else set())
        if self.fields:
            seen = seen | {"object"}
        return sorted(told | seen - {"null"})

    def _of_kind(self, kind: str, made: Json, path: str) -> Json:
        found: Json = {"type": kind}
        if kind in ("integer", "number"):
            found |= {name: made[name] for name in ("minimum", "maximum") if name in made}
        if kind == "array":
            listed: Json = next((one for one in made.get("anyOf", ()) if one.get("type") == "array"), made)
            found |= {name: listed[name] for name in ("maxItems", "items") if name in listed}
            if self.item is not None and "items" not in found:
                found["items"] = self.item.schema(f"{path}[]")
        if kind == "object":
            found |= self._inside(path)
        return found

    def _inside(self, path: str) -> Json:
        """What an object holds; a field whose name is a number stands for all of them."""
        named = {name: node for name, node in self.fields.items() if not name.isdigit()}
        numbered = [node for name, node in self.fields.items() if name.isdigit()]
        inside: Json = {}
        if named:
            inside["properties"] = {
                name: node.schema(f"{path}.{name}" if path else name) for name, node in named.items()
            }
        required = [name for name, node in named.items() if node.required]
        if required:
            inside["required"] = required
        if numbered:
            inside["additionalProperties"] = {"type": "number", **_bounds(numbered[0])}
        return inside


def _bounds(node: Node) -> Json:
    return {name: one[name] for one in node.noted for name in ("minimum", "maximum") if name in one}


def _kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def description_of(path: str) -> str:
    """What the catalogue says of a field: of the longest end of its path that it knows; "" for nothing."""
    names = path.split(".")
    for i in range(len(names)):
        found = DESCRIPTIONS.get(".".join(names[i:]))
        if found is not None:
            return found
    return ""
