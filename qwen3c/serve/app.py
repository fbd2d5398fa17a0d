"""The application: which address is answered by which surface."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from . import openapi
from .api import Api, say_api_error, say_failure, say_http_error
from .errors import ApiError
from .page import page
from .streams import ClientLeftError
from .surfaces import chat, completions, embeddings, listing, messages, rerank, responses, tokens

# llama-server answers here, too, and clients whose base URL lacks /v1 ask here
UNVERSIONED = (
    "/chat/completions",
    "/completions",
    "/embeddings",
    "/responses",
    "/models",
    "/models/{name:path}",
)
Running = Callable[[], AbstractAsyncContextManager[Any]]


def create_app(api: Api, more: Sequence[BaseRoute] = (), running: Sequence[Running] = ()) -> Starlette:
    """The page and the endpoints over the models of `api`. While the app lives, its default model is loaded.

    more: routes beside those of the surfaces. running: what has to be entered for as long as the app lives.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(api.models.open())
            for context in running:
                await stack.enter_async_context(context())
            if api.provider is not None:
                stack.push_async_callback(api.provider.aclose)
            yield

    surfaces = (chat, responses, messages, completions, embeddings, rerank, tokens, listing)
    routes: list[BaseRoute] = [route for surface in surfaces for route in surface.routes(api)]
    shorter = [route for route in routes if isinstance(route, Route) and route.path[3:] in UNVERSIONED]
    routes += [
        Route(route.path[3:], route.endpoint, methods=sorted(route.methods or ()), include_in_schema=False)
        for route in shorter
    ]
    routes += openapi.routes(api, surfaces)
    return Starlette(
        routes=[Route("/", page, methods=["GET"]), *routes, *more],
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
