"""A reply as its caller sees it: an iterator of events, for code with and without an event loop.

It runs batch.py's loop with one sequence; reply.py turns logits into tokens and text.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from typing import Any, NoReturn

from ..text.tools import ToolSet
from .batch import Batch, CachedSession, Member
from .draft import Drafting
from .grammar import Grammar
from .reply import Event, Mask, Reply, ReplyState, Stats
from .sampler import SamplingOptions


class AnswerOptions(SamplingOptions, total=False):
    """The keywords of Model.generate and Model.generate_many beside their own. None counts as not given.

    Of the first four one may be given; each is what an answer, after the thinking,
    has to be (drivers/grammar.py).
    """

    schema: dict[str, Any] | str | None  # JSON that a JSON schema allows
    regex: str | None  # text that a pattern matches as a whole
    choice: Sequence[str] | None  # one of the texts
    grammar: str | Grammar | None  # what a grammar in Lark allows, or one that is compiled already
    thinking_budget: int | None  # after so many tokens of thought </think> comes
    toolset: ToolSet | None  # the tools whose calls are looked for in the reply


class ReplyOptions(AnswerOptions, total=False):
    """The keywords that Model.chat and Model.complete hand on to Model.generate, which says what they are."""

    session: CachedSession | None
    stop: str | Sequence[str]
    mask: Mask | None
    cancel: Callable[[], bool] | None
    progress: Callable[[int, int], None] | None
    draft: bool


class Generation(Iterator[Event], AsyncIterator[Event]):
    """One reply on its way, made by Model.generate. Nothing is computed before the first event is asked for.

    for event in generation          the events, as they come
    async for event in generation    the events, each computed in a thread so that the event loop runs on;
                                     cancelling the task ends the reply
    generation.result()              run to the end: the whole Reply
    with generation: ...             close() at the end of the block: the reply ends there, if it has not

    `reply`, `tokens` (the sampled ones) and `stats` grow with every event. The iteration may be left at any
    time.
    """

    def __init__(
        self,
        session: CachedSession,
        prompt: list[int],
        state: ReplyState,
        *,
        owns_session: bool = False,
        cancel: Callable[[], bool] | None = None,
        progress: Callable[[int, int], None] | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        """owns_session: the session was made for this reply; close() releases its memory. drafting: see
        Batch.
        """
        self.session = session
        self._prompt = prompt
        self._state = state
        self._owns_session = owns_session
        self._asked_to_stop = cancel or (lambda: False)
        self._progress = progress or (lambda done, total: None)
        self._drafting = drafting
        self.stats = Stats(seed=state.seed, prompt_tokens=len(prompt))
        self.reply = Reply(stats=self.stats)
        self._closed = False
        self._lock = threading.RLock()  # threads that ask for events take turns
        self._events = self._run()

    @property
    def tokens(self) -> list[int]:
        """The tokens sampled so far."""
        return self._state.tokens

    def __next__(self) -> Event:
        with self._lock:
            event = next(self._events)
            self.reply.add(event)
            return event

    async def __anext__(self) -> Event:
        import asyncio  # here, because it is slow to import and only `async for` needs it

        # no asyncio.to_thread: a loop that shuts down cancels that task while its thread still runs the step
        step = asyncio.get_running_loop().run_in_executor(None, next, self, None)
        try:
            await asyncio.wait([step])
        except asyncio.CancelledError:
            self._closed = True
            while not step.done():  # until then the thread uses the session
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([step])
            step.exception()  # retrieve the step's error, if any: the task is told of the cancellation alone
            self.close()
            raise
        event = step.result()
        if event is None:
            raise StopAsyncIteration
        return event

    def result(self) -> Reply:
        """Run to the end and return the whole reply. ValueError if an error has ended it before."""
        for _ in self:
            pass
        if self.reply.finish_reason is None:
            raise ValueError(f"an error ended this reply after {len(self.tokens)} tokens; `reply` holds them")
        return self.reply

    def close(self) -> None:
        """End the reply here: what has come stays, and there are no more events.

        The finish_reason of a reply that had not ended is "cancelled". The memory of a session that was made
        for this reply alone is released.
        """
        self._closed = True
        with self._lock:
            if inspect.getgeneratorstate(self._events) == inspect.GEN_RUNNING:
                return  # called by `cancel` or `progress`, inside a step: that step ends the reply
            for _ in self:  # at most one event, and nothing is computed for it
                pass
            if self._owns_session:
                self.session.rewind(0)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if inspect.getgeneratorstate(self._events) == inspect.GEN_CREATED:
            return f"<Generation, not begun: {len(self._prompt)} tokens of prompt; iterate, or call result()>"
        return f"<Generation of {self.reply!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Generation cannot be pickled or copied: it is a reply on its way; its `reply` can")

    def _cancelled(self) -> bool:
        return self._closed or self._asked_to_stop()

    def _run(self) -> Generator[Event, None, None]:
        if self._closed or not self._state.max_tokens:
            yield self._told(self._state.end("cancelled" if self._closed else "length"))
            return
        cached = self.stats.cached_tokens = self.session.reuse(self._prompt)
        member = Member(
            0, self._state, self.session, self._prompt[cached:], self.stats,
            cancelled=self._cancelled, progress=self._progress,
        )  # fmt: skip
        if self._drafting is not None:
            member.drafter = self._drafting.drafter(self._prompt, self._state.forced)
        batch: Batch[Event] = Batch(self.session.model, drafting=self._drafting)
        batch.running.append(member)
        while batch.running:
            for _, event in batch.step():
                yield self._told(event)

    def _told(self, event: Event) -> Event:
        self.stats.finish_reason = event.finish_reason
        return event
