"""The models that answer, by alias: loaded when asked for, let go of when memory is short.

Models    aliases -> files; which of them are loaded
Served    a loaded model with its scheduler; what a surface may ask of it
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..drivers.batch import LastRow
from ..drivers.reply import ContextFullError, ReplySettings, ReplyState, Vocabulary, token_budget, token_ids
from ..drivers.retrieval import RECIPE
from ..drivers.sampler import SamplingOptions
from ..drivers.score import PromptScores, TokenScore
from ..engine import Logits
from ..format import ModelFile
from ..memory import available, gib
from ..model import Model
from ..text.chat import TOOL_CALL
from .ask import Ask, Job, KeyLimits, Stream, Update
from .errors import ApiError, context_error
from .pace import Pace
from .scheduler import Limits, Scheduler

T = TypeVar("T")
ROWS_AT_ONCE = 16  # prompts without a reply that one request has in the queue
ROWS_RETRY = 0.05  # seconds until a request that is half done looks for room in the queue again
SHARE_OF_MEMORY = 4  # without --cache-memory the KV cache gets this part of what is available at the start


@dataclass(frozen=True)
class ServeOptions:
    """How models are served. kv_bytes: None for a part of what is available. context: None for what fits.

    idle_unload: seconds without a request after which a model is released; None for never. draft: see
    Scheduler. offline: nobody waits for the next token, and the event loop may be kept waiting: what is done
    between passes is less.
    """

    running: int = 64
    queue: int = 128
    kv_bytes: int | None = None
    max_gap: float | None = None
    context: int | None = None
    idle_unload: float | None = None
    draft: bool = True
    offline: bool = False


@dataclass(frozen=True)
class Card:
    """What is said of a model. context: positions that one request can have.
    capabilities: what it can be asked for.
    """

    context: int
    capabilities: tuple[str, ...]


def card_of(file: ModelFile, context: int) -> Card:
    """The card of a model, from its file alone."""
    template, thinks = file.template, file.metadata["thinking"] != "none"
    calls = "tools" in template and TOOL_CALL in template  # a form that is read here
    able = {"completion": True, "chat": bool(template), "tools": calls, "thinking": thinks, "embedding": True}
    able["rerank"] = all(json.dumps(token).encode() in file.tokenizer for token in RECIPE)
    return Card(context, tuple(name for name, has in able.items() if has))


class Served:
    """A model that answers. name: its alias. created: when it was loaded, in seconds since 1970."""

    def __init__(
        self,
        name: str,
        model: Model,
        options: ServeOptions,
        turn: threading.Lock,
        worked: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """turn: see Scheduler. worked: told how many seconds a worker thread was busy."""
        self.name = name
        self.model = model
        self._worked = worked
        self._working = 0  # functions that a worker thread runs or will run
        self.created = int(time.time())
        self.used = time.monotonic()
        kv_bytes = options.kv_bytes
        if kv_bytes is None:
            kv_bytes = (available() or 4 << 30) // SHARE_OF_MEMORY
        limits = Limits(options.running, options.queue, max(kv_bytes, 2 * model.kv_block_bytes))
        self.scheduler = Scheduler(model, limits, Pace(options.max_gap), turn, options.draft)
        self.context = min(self.scheduler.context, options.context or model.config.context)
        self.card = card_of(model.file, self.context)
        self._offline = options.offline
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="text")

    async def work(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function returns that takes too long for the event loop: templates, tokens, large JSON.

        One thread does all of it, so that the engine's threads keep their processors.
        """
        if self._offline:
            return function(*arguments)

        def timed() -> T:
            begin = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self._worked(time.perf_counter() - begin)

        self._working += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, timed)
        finally:
            self._working -= 1

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits for it."""
        return bool(self._working or self.scheduler.n_running or self.scheduler.n_waiting)

    async def submit(self, ask: Ask, limits: KeyLimits | None = None) -> Stream:
        """The updates of what is asked. ApiError 400 if it cannot be, 429 if the queue is full."""
        stream = Stream(len(ask.prompts), whole=self._offline)
        try:
            stream.jobs = await self.work(self._jobs, ask, stream, limits or KeyLimits())
        except ContextFullError:
            raise context_error(max(map(len, ask.prompts)), self.context, ask.origin) from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        self.used = time.monotonic()
        self.scheduler.submit(stream.jobs)
        return stream

    def _jobs(self, ask: Ask, stream: Stream, limits: KeyLimits) -> list[Job]:
        jobs = []
        for i, prompt in enumerate(ask.prompts):
            ids = token_ids(prompt, self.model.config.n_tokens)  # the others have no log-probability
            budget = token_budget(ask.max_tokens, len(ids), self.context, self.context)
            state = LastRow() if ask.vectors or ask.rows else self._state(ask, i, ids, budget)
            kind: Logits = "hidden" if ask.vectors else "last" if ask.echo is None else "all"
            job = Job(stream, i, ids, state, kind, ask.namespace, ask.priority, limits)
            job.stats.prompt_tokens = len(ids)
            if isinstance(state, ReplyState):
                job.stats.seed = state.seed
            if ask.echo is not None:
                job.scores = PromptScores(self.model.vocabulary, ids, ask.echo)
            jobs.append(job)
        return jobs

    def _state(self, ask: Ask, i: int, ids: list[int], budget: int) -> ReplyState:
        own: SamplingOptions = {**ask.sampling}
        if ask.seeds is not None:
            own["seed"] = ask.seeds[i]
        sampling = self.model.sampling(self.model.may_think(ids), **own)
        mask = ask.grammar.mask(ids) if ask.grammar is not None else None
        vocabulary = self.bare_vocabulary if ask.bare else self.model.vocabulary
        settings = ReplySettings(ask.stop, ask.logprobs, mask, ask.tools, ask.thinking_budget)
        return ReplyState(vocabulary, ids, sampling, budget, settings)

    @cached_property
    def bare_vocabulary(self) -> Vocabulary:
        """For replies that are text alone."""
        return replace(self.model.vocabulary, bare=True)

    async def rows(
        self, ask: Ask, limits: KeyLimits | None = None
    ) -> tuple[list[NDArray[np.float32]], list[Stream]]:
        """The row of each prompt of an Ask with `vectors` or `rows`, and the streams they came by.

        However many they are, they take few places of the queue at once. ApiError 429
        if there is none at the start.
        """
        rows: list[NDArray[np.float32]] = []
        streams: list[Stream] = []
        at_once = min(ROWS_AT_ONCE, self.scheduler.most(limits or KeyLimits()))
        while len(rows) < len(ask.prompts):
            some = replace(ask, prompts=ask.prompts[len(rows) : len(rows) + at_once])
            try:
                stream = await self.submit(some, limits)
            except ApiError as error:
                if error.status != 429 or not streams:
                    raise
                await asyncio.sleep(ROWS_RETRY)
                continue
            streams.append(stream)
            rows += await _each(stream, lambda update: update.row)
        return rows, streams

    async def score(self, prompts: Sequence[list[int]], top: int, **ask: Any) -> list[list[TokenScore]]:
        """The score of every token of each prompt; top: how many of the most likely tokens each lists."""
        stream = await self.submit(Ask(prompts, max_tokens=0, echo=top, **ask))
        return await _each(stream, lambda update: update.scores)

    def close(self) -> None:
        """End every reply, then release the model."""
        self.scheduler.close()
        self._worker.shutdown(wait=True)
        self.model.close()


async def _each(stream: Stream, of: Callable[[Update], T | None]) -> list[T]:
    """What `of` finds in the updates of each sequence of a stream."""
    found: dict[int, T] = {}
    try:
        async for update in stream:
            one = of(update)
            if one is not None:
                found[update.index] = one
    finally:
        stream.cancel()
    return [found[i] for i in range(len(stream.jobs))]


class Models:
    """Models by alias.

    openers: alias -> what opens the model when it is first asked for; the first alias is the default.
    sizes: bytes that each takes. files: where each lies, so that something can be said of it before it is
    opened. own: options of single models. worked: told how many seconds a worker thread was busy. A model
    that is asked for and does not fit beside the others takes the place of the least recently used one that
    nobody waits for.
    """

    def __init__(
        self,
        openers: Mapping[str, Callable[[], Model]],
        options: ServeOptions | None = None,
        sizes: Mapping[str, int] | None = None,
        files: Mapping[str, str | os.PathLike[str]] | None = None,
        own: Mapping[str, ServeOptions] | None = None,
    ) -> None:
        self.options = options or ServeOptions()
        self.worked: Callable[[float], None] = lambda seconds: None
        self._own = dict(own or {})
        self._openers = dict(openers)
        self._sizes = dict(sizes or {})
        self._files = dict(files or {})
        self._cards: dict[str, Card | None] = {}
        self._served: dict[str, Served] = {}
        self._loading = asyncio.Lock()
        self._turn = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The aliases, the default first."""
        return list(self._openers)

    @property
    def loaded(self) -> list[Served]:
        """The models that are in memory."""
        return list(self._served.values())

    def resolve(self, name: str | None) -> str:
        """The alias that a request means. With one model every name means it; else
        ApiError 404 for an unknown one.
        """
        if name in self._openers:
            return str(name)
        if len(self._openers) == 1 or not name:
            return self.names[0]
        message = f"there is no model {name!r}; there are {', '.join(self.names)}"
        raise ApiError(404, message, param="model", code="model_not_found")

    async def card(self, alias: str) -> Card | None:
        """What is known of a model, which need not be in memory; None if that is nothing."""
        if alias in self._served:
            self._cards[alias] = self._served[alias].card
        if alias not in self._cards:
            self._cards[alias] = await asyncio.to_thread(self._read_card, alias)
        return self._cards[alias]

    def _read_card(self, alias: str) -> Card | None:
        if alias not in self._files:
            return None
        try:
            file = ModelFile(self._files[alias])
        except (ValueError, OSError, MemoryError):
            return None
        context: int = file.config.context
        return card_of(file, min(context, self._options(alias).context or context))

    def _options(self, alias: str) -> ServeOptions:
        """How a model is served."""
        return self._own.get(alias, self.options)

    async def get(self, name: str | None = None) -> Served:
        """The model that a request names, loaded if it is not. ApiError 503 if it cannot be."""
        alias = self.resolve(name)
        served = self._served.get(alias)
        if served is not None:
            served.used = time.monotonic()
            return served
        async with self._loading:
            if alias not in self._served:
                self._make_room(self._sizes.get(alias, 0))
                try:
                    model = await asyncio.to_thread(self._openers[alias])
                except (ValueError, OSError, MemoryError) as error:
                    message = f"model {alias!r} cannot be loaded: {_without_paths(error)}"
                    raise ApiError(503, message, type="server_error", code="model_unavailable") from error
                self._served[alias] = Served(alias, model, self._options(alias), self._turn, self.worked)
            return self._served[alias]

    def _make_room(self, needed: int) -> None:
        """Let idle models go, the least recently used first, until `needed` bytes are available."""
        for served in sorted(self._served.values(), key=lambda one: one.used):
            free = available()
            if free is None or free >= needed:
                return
            if not served.is_busy:
                self.unload(served.name)
        free = available()
        if free is not None and free < needed:
            raise ApiError(
                503, f"the model takes {gib(needed)}, {gib(free)} are available while the others are busy",
                type="server_error", code="model_unavailable", retry_after=10,
            )  # fmt: skip

    def unload(self, name: str) -> None:
        """Release a model; it is loaded again when it is asked for."""
        self._served.pop(name).close()

    def close(self) -> None:
        """End every reply and release all models."""
        for name in list(self._served):
            self.unload(name)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Models]:
        """Within, the default model is loaded, and what nobody asks for is released when its time is over."""
        await self.get()
        watching = asyncio.create_task(self._unload_idle())
        try:
            yield self
        finally:
            watching.cancel()
            await asyncio.to_thread(self.close)

    async def _unload_idle(self) -> None:
        longest = self.options.idle_unload
        while longest is not None:
            await asyncio.sleep(min(longest / 4, 10))
            for served in self.loaded:
                if served.is_busy:
                    served.used = time.monotonic()
                elif time.monotonic() - served.used > longest:
                    self.unload(served.name)


def _without_paths(error: Exception) -> str:
    """What went wrong, without saying where files lie."""
    if isinstance(error, OSError):
        return error.strerror or "it cannot be read"
    return "it is damaged or of another version" if isinstance(error, ValueError) else "out of memory"
