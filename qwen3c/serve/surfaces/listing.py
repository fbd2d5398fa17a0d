"""GET /v1/models, /props, /health and /version: what is served, and whether it is well."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ... import __version__
from ...drivers.sampler import default_sampling
from ..api import FINGERPRINT, Api, json_answer
from ..errors import VERSION, ApiError
from ..models import Served
from .tokens import info_body

STUCK = 120.0  # seconds without a step of an engine that has work, after which something is wrong with it


def routes(api: Api) -> list[Route]:
    """The endpoints."""

    async def models(request: Request) -> Response:
        if VERSION in request.headers:
            found = [await anthropic_body(api, name) for name in api.models.names]
            ends = {"first_id": found[0]["id"], "last_id": found[-1]["id"], "has_more": False}
            return json_answer({"data": found} | ends)
        return json_answer(
            {"object": "list", "data": [await model_body(api, name) for name in api.models.names]}
        )

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in api.models.names:
            raise ApiError(404, f"there is no model {name!r}", param="model", code="model_not_found")
        body = anthropic_body if VERSION in request.headers else model_body
        return json_answer(await body(api, name))

    async def props(request: Request) -> Response:
        served = await api.models.get(request.query_params.get("model"))
        return json_answer(await served.work(props_body, api, served), headers=api.headers(served, []))

    async def health(request: Request) -> Response:
        body = health_body(api)
        return json_answer(body, 200 if body["status"] == "ok" else 503)

    async def version(request: Request) -> Response:
        return json_answer({"version": __version__})

    return [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/props", props, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/version", version, methods=["GET"]),
    ]


async def model_body(api: Api, name: str) -> dict[str, Any]:
    """A model in OpenAI's words, with what clients of local servers look for; null is not known yet."""
    card = await api.models.card(name)
    context = card.context if card is not None else None
    return {
        "id": name, "object": "model", "created": api.started, "owned_by": "qwen3c",
        "context_length": context, "max_model_len": context,
        "capabilities": list(card.capabilities) if card is not None else None,
        "loaded": any(served.name == name for served in api.models.loaded),
    }  # fmt: skip


async def anthropic_body(api: Api, name: str) -> dict[str, Any]:
    """A model in Anthropic's words, for clients that name a version of that API."""
    card = await api.models.card(name)
    context = card.context if card is not None else None
    created = datetime.fromtimestamp(api.started, timezone.utc).isoformat().replace("+00:00", "Z")
    return {
        "type": "model", "id": name, "display_name": name, "created_at": created, "lifecycle": "active",
        "max_input_tokens": context, "max_tokens": context, "capabilities": None,
    }  # fmt: skip


def props_body(api: Api, served: Served) -> dict[str, Any]:
    """What llama-server says of itself, by which clients know it, and what the page has to know."""
    model, info = served.model, info_body(served)
    kind = model.metadata["thinking"]
    sampling = default_sampling(model.metadata, kind != "none")
    return {
        "model_alias": served.name,
        "model_path": None,
        "n_ctx": served.context,
        "default_generation_settings": {"n_ctx": served.context, "params": sampling},
        "total_slots": served.scheduler.limits.running,
        "modalities": {"vision": False, "audio": False},
        "chat_template": info["chat_template"] or "",
        "thinking": kind,
        "bos_token": info["bos_token"] or "",
        "eos_token": info["eos_token"] or "",
        "build_info": FINGERPRINT,
        "upstream": api.provider.state() if api.provider is not None else None,
        "mcp": api.mcp,
        "needs_key": api.needs_key,
    }


def health_body(api: Api) -> dict[str, Any]:
    """Whether the engines do their work: "ok", "draining" while the server ends, "failed" if one is dead or
    stuck.
    """
    states, running, waiting = dict.fromkeys(api.models.names, "unloaded"), 0, 0
    for served in api.models.loaded:
        states[served.name] = "ok" if served.scheduler.is_alive(STUCK) else "failed"
        running += served.scheduler.n_running
        waiting += served.scheduler.n_waiting
    status = "draining" if api.draining else "failed" if "failed" in states.values() else "ok"
    body = {"status": status, "models": states, "queue": {"running": running, "waiting": waiting}}
    return body | ({"upstream": api.provider.state()} if api.provider is not None else {})
