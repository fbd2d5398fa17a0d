"""The application: which address is answered by which surface."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import openapi
from .api import Api, say_api_error, say_failure, say_http_error
from .errors import ApiError
from .streams import ClientLeftError
from .surfaces import chat, completions, embeddings, listing, messages, rerank, responses, tokens


def create_app(api: Api) -> Starlette:
    """The endpoints over the models of `api`. While the app lives, its default model is loaded."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with api.models.open():
            yield

    surfaces = (chat, responses, messages, completions, embeddings, rerank, tokens, listing)
    routes: list[Route] = [route for surface in surfaces for route in surface.routes(api)]
    routes += openapi.routes(api, surfaces)
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={
            ApiError: say_api_error,
            HTTPException: say_http_error,
            ClientLeftError: _nobody_listens,
            Exception: say_failure,
        },
    )


async def _nobody_listens(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
