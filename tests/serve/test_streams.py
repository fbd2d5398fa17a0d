"""Streams end in order, whoever leaves and whenever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

import pytest

from qwen3c.serve.errors import ApiError
from qwen3c.serve.streams import COMMENT, EventStream


class Said:
    """Two events; what came of them."""

    ping = COMMENT

    def __init__(self) -> None:
        self.said: list[str] = []
        self.ended = 0

    async def events(self) -> AsyncGenerator[str, None]:
        for text in ("a", "b"):
            self.said.append(text)
            yield text
            await asyncio.sleep(0.01)

    def failed(self, error: ApiError) -> str:
        return error.message

    async def end(self) -> None:
        self.ended += 1


def sent(said: Said, leaves: bool, breaks_at: int | None = None) -> list[str]:
    """What goes out; leaves: the client is gone before anything does; breaks_at: the message that fails."""
    out: list[str] = []

    async def receive() -> MutableMapping[str, Any]:
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if len(out) == breaks_at:
            raise OSError
        out.append(message.get("body", b"").decode())

    asyncio.run(EventStream(said, said.end)({"type": "http"}, receive, send))
    return out


def test_a_stream_goes_out_and_is_ended_once() -> None:
    said = Said()
    assert sent(said, leaves=False) == ["", "a", "b", ""] and said.ended == 1


@pytest.mark.parametrize("breaks_at", [None, 0, 1, 2])
def test_what_nobody_hears_is_ended_even_if_it_never_began(breaks_at: int | None) -> None:
    said = Said()
    sent(said, leaves=breaks_at is None, breaks_at=breaks_at)
    assert said.ended == 1 and len(said.said) < 2 + (breaks_at == 2)
