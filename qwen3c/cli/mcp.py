"""-m mcp: the MCP server over stdin and stdout, of a model here or of a server that runs already.

Only the protocol goes to stdout: while it runs, descriptor 1 is stderr to everyone
else, and descriptor 0 is empty.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from ..serve.mcp import Local, Provider, new_proxy, new_server, require_mcp
from ..serve.models import Models, ServeOptions
from ..system import terminal
from .opening import context_of, open_model, say_what_was_chosen
from .signals import Ended, endings

if TYPE_CHECKING:
    from mcp.shared.message import SessionMessage

    from ..model import Model

KEY = "QWEN3C_API_KEY"  # the variable with the key of the server at --url
LARGEST_LINE = 4 << 20  # bytes of one message; a longer one is answered with an error
PIECE = 1 << 16
PARSE_ERROR, INVALID_REQUEST = -32700, -32600


def serve_over_stdio(args: argparse.Namespace) -> int:
    """Answer one MCP host until it closes stdin."""
    require_mcp()
    logging.getLogger("mcp").setLevel(logging.CRITICAL)  # it says with tracebacks what a host does wrong
    model = None
    if not args.url:
        model = open_model(args, chats=True)
        say_what_was_chosen(args, model, context_of(args, model), args.thinking is not False)
    number = asyncio.run(_serve(args, model))
    if number:
        raise Ended(number)
    return 0


async def _serve(args: argparse.Namespace, model: Model | None) -> int:
    """Serve to the end; the number of the signal that was it, 0 for the end of stdin."""
    async with AsyncExitStack() as stack:
        provider: Provider
        if model is None:
            provider = await stack.enter_async_context(new_proxy(args.url, os.environ.get(KEY)))
        else:
            alias, options = (
                str(model.metadata["name"]),
                ServeOptions(context=context_of(args, model), draft=args.drafts),
            )
            provider = Local(await stack.enter_async_context(Models({alias: lambda: model}, options).open()))
        terminal.note(f"MCP over stdin and stdout{f', of {args.url}' if args.url else ''}")
        return await serve(provider)


async def serve(provider: Provider) -> int:
    """Serve these tools until stdin ends, or a signal comes: its number, else 0."""
    server = new_server(provider)
    ended = asyncio.get_running_loop().create_future()
    with wire() as (received, sent), endings(ended):
        async with _streams(received, sent, ended) as (reading, writing):
            options = server.create_initialization_options()
            serving = asyncio.ensure_future(server.run(reading, writing, options))
            await asyncio.wait({serving, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                serving.result()
                return 0
            serving.cancel()
            await asyncio.wait(
                {serving}
            )  # what it says of being cancelled in the middle is nobody's business
    return ended.result()


@contextmanager
def wire() -> Iterator[tuple[int, int]]:
    """Descriptors that stand for stdin and stdout; within, 0 is empty and 1 is stderr,
    for whoever else uses them.
    """
    received, sent = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    os.close(nowhere)
    try:
        yield received, sent
    finally:
        os.dup2(received, 0)  # a thread may still wait for it: the copy stays open
        os.dup2(sent, 1)


@asynccontextmanager
async def _streams(received: int, sent: int, ended: asyncio.Future[int]) -> AsyncIterator[tuple[Any, Any]]:
    """The two streams that a server of the SDK runs on. `ended` is 0 once nobody reads stdout any more.

    Threads that may wait for ever are daemons: see Writer.
    """
    import anyio
    from mcp.shared.message import SessionMessage

    to_server, reading = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    writing, from_server = anyio.create_memory_object_stream[SessionMessage](0)
    writer = Writer(sent)

    async def write() -> None:
        try:
            async for message in from_server:
                await writer.write(message.message.model_dump_json(by_alias=True, exclude_unset=True))
        except OSError:
            if not ended.done():
                ended.set_result(0)

    async def read() -> None:
        async with to_server:
            async for line in _lines(received):
                message = _message(line)
                if isinstance(message, str):
                    await writer.write(message)
                elif message is not None:
                    await to_server.send(message)

    tasks = [asyncio.ensure_future(each) for each in (read(), write())]
    try:
        yield reading, writing
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in (to_server, reading, writing, from_server):
            stream.close()


def _message(line: bytes) -> SessionMessage | str | None:
    """What a line says: a message, the error that answers it, or None for nothing."""
    from mcp.shared.message import SessionMessage
    from mcp_types import jsonrpc_message_adapter

    if not line.strip():
        return None
    if len(line) > LARGEST_LINE:
        return _refusal(INVALID_REQUEST, f"a message of more than {LARGEST_LINE} bytes")
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError:
        pass
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return _refusal(PARSE_ERROR, "not JSON")
    id = value.get("id") if isinstance(value, dict) else None
    return _refusal(INVALID_REQUEST, "not a JSON-RPC message", id if isinstance(id, (int, str)) else None)


def _refusal(code: int, message: str, id: int | str | None = None) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}})


async def _lines(descriptor: int) -> AsyncIterator[bytes]:
    """The lines of a descriptor. Of one that is longer than LARGEST_LINE the
    beginning, longer than that, too.
    """
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[bytes] = asyncio.Queue()
    wanted = threading.Semaphore(2)  # pieces that are read ahead of the one at hand

    def read() -> None:
        piece = b"-"
        while piece:
            wanted.acquire()
            try:
                piece = os.read(descriptor, PIECE)
            except OSError:
                piece = b""
            try:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)
            except RuntimeError:
                return  # the loop has ended

    threading.Thread(target=read, daemon=True).start()
    line = bytearray()
    while piece := await pieces.get():
        wanted.release()
        *ends, rest = piece.split(b"\n")
        for end in ends:
            line += end
            yield bytes(line)
            line.clear()
        line += rest[: max(LARGEST_LINE + 1 - len(line), 0)]
    if line:
        yield bytes(line)


class Writer:
    """Lines to a descriptor, in a daemon thread: a host that no longer reads can hold
    up a line, but not our end.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: queue.SimpleQueue[tuple[bytes, asyncio.Future[None]]] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, daemon=True).start()

    async def write(self, line: str) -> None:
        """Return when the line is written. OSError if it cannot be."""
        written = self._loop.create_future()
        self._lines.put((line.encode() + b"\n", written))
        await written

    def _run(self) -> None:
        while True:
            data, written = self._lines.get()
            error = None
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError as failure:
                error = failure
            try:
                self._loop.call_soon_threadsafe(_settle, written, error)
            except RuntimeError:
                return  # the loop has ended


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
