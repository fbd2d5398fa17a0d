"""One model that answers MCP's tools by itself: calls take turns, one session remembers what they have in common."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from .. import engine
from ..drivers.batch import CachedSession
from ..drivers.reply import Event, Stats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..model import Model
    from .mcp import Ask

PIECE = 64  # tokens whose logits are computed at once: those of a whole text would take gigabytes
T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """How far a prompt is read, in tokens; or how many calls are before it."""

    stage: str
    position: int
    total: int
    processed: int


@dataclass(frozen=True)
class Update:
    """A token's event, or progress before the first."""

    event: Event | None = None
    progress: Reading | None = None


class Score(NamedTuple):
    """A token's log-probability in nats, and the most likely tokens in its place."""

    logprob: float
    top: list[tuple[int, float]]


class Alone:
    """One model as mcp.Backends and as mcp.Backend. context: positions of a call."""

    def __init__(self, model: Model, context: int | None = None) -> None:
        self.model = model
        self.names = [str(model.metadata["name"])]
        self._session = CachedSession(model, context)
        self.context = self._session.context
        self._turn = asyncio.Lock()
        self._n_waiting = 0

    async def get(self, name: str | None) -> Alone:
        return self

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        """function(*args), in a thread."""
        return await asyncio.to_thread(function, *args)

    def submit(self, ask: Ask) -> Replies:
        """The reply to a prompt. ValueError if it is too long, or an option is out of range."""
        return Replies(self, ask)

    async def embed(self, texts: Sequence[str], namespace: str) -> NDArray[np.float32]:
        """See Model.embed."""
        return await self._in_turn(self.model.embed, texts)

    async def rerank(
        self, query: str, documents: Sequence[str], instruction: str | None, namespace: str
    ) -> list[float]:
        """See Model.rerank."""
        return (await self._in_turn(self.model.rerank, query, documents, instruction)).tolist()

    async def score(self, ids: list[int], top: int, namespace: str) -> list[Score | None]:
        """Of every token; None for the first."""
        scores: list[Score | None] = [None]
        async with self._turn:
            session = self.model.session(max(len(ids), 1))
            for start in range(0, len(ids) - 1, PIECE):
                scores += await uninterrupted(self._score, session, ids, start, top)
        return scores

    def _score(self, session: engine.Session, ids: list[int], start: int, top: int) -> list[Score]:
        given, n = ids[start : start + PIECE], self.model.config.n_tokens
        given = given[: len(ids) - 1 - start]
        scores = []
        for row, id in zip(session.forward(given, logits="all")[:, :n], ids[start + 1 :], strict=False):
            total = engine.log_sum_exp(row)
            best = np.argsort(-row, kind="stable")[:top].tolist()
            scores.append(Score(float(row[id]) - total, [(i, float(row[i]) - total) for i in best]))
        return scores

    async def _in_turn(self, function: Callable[..., T], *args: Any) -> T:
        async with self._turn:
            return await uninterrupted(function, *args)


async def uninterrupted(function: Callable[..., T], *args: Any) -> T:
    """function(*args), in a thread. A cancellation waits for its end: the model is nobody else's before."""
    step = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(step)
    except asyncio.CancelledError:
        await asyncio.wait([step])
        raise


class Replies:
    """One reply on its way: its updates, in turn with other calls."""

    def __init__(self, alone: Alone, ask: Ask) -> None:
        self._alone = alone
        self._ask = ask
        self._cancelled = False
        self._updates: asyncio.Queue[Update | Exception | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._generation = alone.model.generate(
            ask.prompt, ask.max_tokens, session=alone._session, stop=ask.stop,
            cancel=lambda: self._cancelled, progress=self._progress, **ask.sampling,
        )  # fmt: skip
        self.stats: list[Stats] = [self._generation.stats]
        self._running = asyncio.ensure_future(self._run())

    def cancel(self) -> None:
        """End the reply: the engine is free after the pass at hand."""
        self._cancelled = True

    async def __aiter__(self) -> AsyncIterator[Update]:
        while (update := await self._updates.get()) is not None:
            if isinstance(update, Exception):
                raise update
            yield update

    def _progress(self, done: int, total: int) -> None:
        progress = Reading("reading", 0, total, done)
        self._loop.call_soon_threadsafe(self._updates.put_nowait, Update(progress=progress))

    async def _run(self) -> None:
        try:
            async with self._alone._turn:
                if not self._cancelled:
                    async for event in self._generation:
                        self._updates.put_nowait(Update(event))
            self._updates.put_nowait(None)
        except Exception as error:
            self._updates.put_nowait(error)
