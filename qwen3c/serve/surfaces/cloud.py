"""A chat that a provider is offered first: its answer in our stream, or why the model here answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from ..api import Api, header_text, json_answer
from ..errors import ApiError
from ..fields import Fields
from ..streams import COMMENT, DONE, EventStream, data, unless_left

if TYPE_CHECKING:
    from ..upstream import Answer

ROUTE = "x-qwen3c-route"  # header of a request: auto, local or cloud


async def offered(api: Api, request: Request, fields: Fields, streams: bool) -> Response | str | None:
    """The provider's answer; or the reason why it gives none; or None where it is not asked at all.

    fields: of a request that was read and found right. ApiError if the provider refuses the
    request, or has to answer and cannot.
    """
    provider = api.provider
    if provider is None:
        return None
    from ..upstream import Declined

    route, _ = provider.route(request.headers.get(ROUTE), fields.text("model"))
    got = await unless_left(request.receive, provider.open(fields.value, route, stream=streams))
    if isinstance(got, Declined):
        return None if got.reason == "route_local" else got.reason
    api.told(request, backend="cloud", model=got.model)
    headers = {"x-qwen3c-backend": "cloud", "x-qwen3c-model": header_text(got.model)}
    if not streams:
        return json_answer(got.completion(), headers=headers)
    return EventStream(_Said(got), got.aclose, headers=headers, ping=api.ping)


def model_here(api: Api, request: Request, fields: Fields) -> str | None:
    """The alias of the model that answers here; `cloud/...` and `local/...` say who is to answer first."""
    name = fields.text("model")
    if api.provider is None:
        return name
    return api.provider.route(request.headers.get(ROUTE), name)[1]


@dataclass
class _Said:
    """A provider's answer as server-sent events."""

    answer: Answer
    ping: str = COMMENT

    async def events(self) -> AsyncGenerator[str, None]:
        async for chunk in self.answer:
            yield data(chunk)
        yield DONE

    def failed(self, error: ApiError) -> str:
        return data(error.openai())
