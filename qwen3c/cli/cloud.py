"""The provider's side of a chat: it is asked before the model, and what it says is
shown as the model's words are.

The event loop of the Upstream runs in a thread of its own, so that an open breaker probes while a person
types.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from ..conversation import Conversation
from ..drivers.reply import Event, Reply, Stats
from ..serve.errors import ApiError
from ..serve.upstream import ROUTES, Declined, Route, Settings, Upstream, read_key
from ..system.terminal import StatusLine, escaped, note
from .output import JsonWriter, ReplyWriter
from .signals import interruptible

POLL = 0.05  # seconds between two looks at Ctrl-C
SENT = ("max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop")


def upstream_settings(args: argparse.Namespace) -> Settings:
    """The provider that the options name. ValueError if it is none to be asked."""
    return Settings(
        args.upstream,
        args.upstream_model,
        read_key(),
        offline=args.offline,
        insecure=args.upstream_insecure,
        proxy_from_env=args.upstream_env_proxy,
        requests=args.upstream_requests,
        tokens=args.upstream_tokens,
        state=args.upstream_state,
    )


class Cloud:
    """A provider that replies to a conversation. route, one of `routes`: which
    backend is asked, auto for both.
    """

    routes = ROUTES

    def __init__(self, settings: Settings) -> None:
        self.route: Route = "auto"
        self.settings = settings
        self._upstream = Upstream(settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def set_route(self, name: str) -> None:
        """Change the backend that is asked; "default" is auto."""
        chosen = [route for route in ROUTES if route == ("auto" if name == "default" else name)]
        if not chosen:
            raise ValueError(f"backend = {name!r} is none of {', '.join(ROUTES)}")
        self.route = chosen[0]

    def describe(self) -> str:
        """What a person reads before the first question."""
        model = escaped(self.settings.model)
        if self.settings.offline:
            return f"offline: {model} is not asked"
        return f"cloud first: {model} at {self.settings.host}"

    def reply(
        self, conversation: Conversation, asked: list[dict[str, Any]], writer: ReplyWriter | JsonWriter
    ) -> CloudReply | str:
        """Show the provider's reply to `asked`; or why it does not reply: then
        nothing was shown. Ctrl-C ends it.

        ValueError: the provider refuses the question, or nobody else may be asked.
        """
        body: dict[str, Any] = {"messages": conversation.with_system(asked)}
        body |= {name: conversation.settings[name] for name in SENT if conversation.settings.get(name)}
        with interruptible() as interrupted:
            reply = CloudReply(self.settings.model, interrupted)
            future = asyncio.run_coroutine_threadsafe(self._tell(body, reply.said), self._loop)
            try:
                declined = reply.begin()
                if declined:
                    return declined.reason
                for event in reply:
                    writer.add(event)
            finally:
                future.cancel()
                if reply.begun:
                    writer.end(reply, reply.speaker)
        note(reply.speed_line())
        return reply

    def close(self) -> None:
        """Close the connections and end the thread."""
        closing: Future[None] = asyncio.run_coroutine_threadsafe(self._upstream.aclose(), self._loop)
        closing.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
        self._thread.join(1)

    async def _tell(self, body: dict[str, Any], said: queue.SimpleQueue[Any]) -> None:
        """Put chunks in the queue and None at their end; or Declined; or the exception that ended it."""
        try:
            answer = await self._upstream.open(body, self.route, stream=True)
            if isinstance(answer, Declined):
                said.put(answer)
                return
            try:
                async for chunk in answer:
                    said.put(chunk)
                said.put(answer.usage)
            finally:
                await answer.aclose()
            said.put(None)
        except Exception as error:
            said.put(error)


class CloudReply(Iterator[Event]):
    """A reply as it comes through `said`: what the loop's thread puts there. reply and stats fill meanwhile.

    broke_off: what ended it before its end.
    """

    def __init__(self, model: str, cancelled: Callable[[], bool]) -> None:
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stats = Stats()
        self.reply = Reply(stats=self.stats)
        self.begun = False
        self.broke_off = ""
        self._model = model
        self._cancelled = cancelled
        self._first: Any = None
        self._begin = self._first_at = time.monotonic()

    @property
    def speaker(self) -> str:
        return f"cloud: {escaped(self._model)}"

    def begin(self) -> Declined | None:
        """Wait for the first that is said."""
        self._first = self._next("asking")
        self._first_at = time.monotonic()
        if isinstance(self._first, Declined):
            return self._first
        if isinstance(self._first, ApiError):
            raise ValueError(f"{self._model}: {self._first}") from None
        if isinstance(self._first, Exception):
            raise self._first
        self.begun = True
        return None

    def __next__(self) -> Event:
        said, self._first = self._first, None
        said = said or self._next("waiting for")
        while isinstance(said, dict) and "choices" not in said:
            self._count(said)
            said = self._next("waiting for")
        if isinstance(said, ApiError):
            self.broke_off = str(said.extra.get("reason"))
        elif isinstance(said, Exception):
            raise said
        if not isinstance(said, dict):
            raise StopIteration
        self._model = said["model"]
        (choice,) = said["choices"]
        event = self._event(choice["delta"], choice["finish_reason"])
        self.reply.add(event)
        self.stats.finish_reason = event.finish_reason
        self.stats.decode_seconds = time.monotonic() - self._first_at
        return event

    def speed_line(self) -> str:
        """Who spoke, counts as the provider has them, how long the first word took, why the reply ended."""
        stats, parts = self.stats, [self.speaker]
        if stats.generated_tokens:
            rate = f" {stats.decode_rate:.1f} tok/s" if stats.generated_tokens > 1 else ""
            parts += [f"prompt {stats.prompt_tokens} tok", f"reply {stats.generated_tokens} tok{rate}"]
        if self.reply.text or self.reply.thinking:
            parts.append(f"first after {self._first_at - self._begin:.1f} s")
        if self.broke_off:
            parts.append(f"interrupted ({self.broke_off}); /regen asks again")
        elif self.reply.finish_reason == "length":
            parts.append("cut by the provider or at max tokens (-n)")
        elif self.reply.finish_reason == "cancelled":
            parts.append("stopped")
        return " | ".join(parts)

    def _next(self, doing: str) -> Any:
        """What is said next; None, and a reply that is cancelled, after Ctrl-C."""
        status = StatusLine()
        try:
            while not self._cancelled():
                try:
                    return self.said.get(timeout=POLL)
                except queue.Empty:
                    status.show(lambda: f"{doing} {escaped(self._model)}")
        finally:
            status.clear()
        self.reply.finish_reason = self.stats.finish_reason = "cancelled"
        return None

    def _event(self, delta: dict[str, Any], reason: str | None) -> Event:
        thought, text = delta.get("reasoning_content"), delta.get("content") or delta.get("refusal")
        finish = {None: None, "length": "length"}.get(reason, "stop")
        return Event(None, text or thought or "", not text and bool(thought), finish)  # type: ignore[arg-type]

    def _count(self, usage: dict[str, Any]) -> None:
        self.stats.prompt_tokens = usage["prompt_tokens"]
        self.stats.generated_tokens = usage["completion_tokens"]
