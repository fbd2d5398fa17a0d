"""What a provider says: bytes -> events -> chat.completion.chunk objects that no client trips over.

A provider is not trusted: lengths are bounded, every type is checked, what nobody asked for is left out.

    Events    server-sent events out of pieces of bytes
    Shape     events -> chunks; knows what has come: a delta, every finish_reason, the usage
    joined    chunks -> one chat.completion
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from .failures import Failure

LONGEST_LINE = 4 << 20  # bytes of an event
LONGEST_ANSWER = 64 << 20  # bytes of a whole answer
FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter", "function_call")
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
DETAILS = ("prompt_tokens_details", "completion_tokens_details")
REASONING = ("reasoning_content", "reasoning")  # DeepSeek's and vLLM's word, OpenRouter's
Chunk = dict[str, Any]


def not_json() -> Failure:
    """The failure of an answer that is not what an API of this kind says."""
    return Failure("not_json", opens=True)


def parsed(data: bytes) -> dict[str, Any]:
    """A JSON object; Failure if `data` is none. Halves of surrogate pairs, which no
    UTF-8 can carry, become U+FFFD.
    """
    try:
        value = json.loads(data)
        if b"\\ud" in data or b"\\uD" in data:
            text = json.dumps(value, ensure_ascii=False)
            value = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise not_json()
    return value


class Events(AsyncIterator[dict[str, Any]]):
    """The events of a stream, each a JSON object. Failure: one is none, or says that there was an error.

    said_done: the stream ended with [DONE]. Comments and fields other than data and event are skipped.
    """

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer that hold no newline
        self._read = 0
        self.said_done = False

    async def __anext__(self) -> dict[str, Any]:
        data, kind = b"", b""
        while (line := await self._line()) is not None:
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data":
                data += (b"\n" if data else b"") + value
                if len(data) > LONGEST_LINE:
                    raise not_json()
            elif name == b"event":
                kind = value
            if line or not data:
                continue
            if data.strip() == b"[DONE]":
                self.said_done = True
                raise StopAsyncIteration
            event = parsed(data)
            if event.get("error") or kind == b"error":
                raise Failure("error_event")
            return event
        if data.strip() == b"[DONE]":
            self.said_done = True
        raise StopAsyncIteration

    async def drain(self) -> None:
        """Read what the transfer still brings."""
        with contextlib.suppress(Exception):  # the answer is whole
            async for _ in self._pieces:
                pass

    async def _line(self) -> bytes | None:
        """The next whole line without its end; None after the last. A line that was cut is none."""
        while (end := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            if self._searched > LONGEST_LINE:
                raise not_json()
            piece = await anext(self._pieces, None)
            if piece is None:
                return None
            self._buffer += piece
            self._read += len(piece)
            if self._read > LONGEST_ANSWER:
                raise Failure("too_long")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        if len(line) > LONGEST_LINE:
            raise not_json()
        return line.removesuffix(b"\r")


async def _once(event: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield event


class Whole(AsyncIterator[dict[str, Any]]):
    """The one event that a chat.completion comes to, of a provider that does not stream."""

    said_done = True

    def __init__(self, body: bytes) -> None:
        completion = parsed(body)
        if completion.get("error"):
            raise Failure("error_event")
        for choice in _dicts(completion.get("choices")):
            message = choice["delta"] = choice.pop("message", None)
            if isinstance(message, dict):
                for index, call in enumerate(_dicts(message.get("tool_calls"))):
                    call["index"] = index
        self._events = _once(completion)

    async def __anext__(self) -> dict[str, Any]:
        return await anext(self._events)

    async def drain(self) -> None:
        """There is no more."""


class Shape:
    """Events in, chunks out: role chunks first and in the order of choices, ids of calls once, usage last.

    model: what the provider is asked for; what it says itself is who spoke. n: how many choices were asked
    for. with_usage: whether the client asked for the usage chunk.
    """

    def __init__(self, model: str, n: int, with_usage: bool) -> None:
        self.model = model
        self.usage: dict[str, Any] | None = None
        self.size = 0  # characters of what came
        self._n, self._with_usage = n, with_usage
        self._id, self._created = "", int(time.time())
        self._begun = 0  # choices whose role was told
        self._finished: set[int] = set()
        self._calls: dict[tuple[int, int | str], int] = {}  # (choice, the provider's index) -> index

    def take(self, event: dict[str, Any]) -> list[Chunk]:
        """The chunks of an event: none before the first delta, or while nothing is in it."""
        if not self._id:
            self._id = _text(event.get("id")) or f"chatcmpl-{secrets.token_hex(12)}"
            self.model = _text(event.get("model"))[:256] or self.model
            if isinstance(event.get("created"), int):
                self._created = event["created"]
        if event.get("usage"):
            self.usage = _usage(event["usage"])
        return [chunk for choice in _dicts(event.get("choices")) for chunk in self._choice(choice)]

    def end(self, said_done: bool) -> list[Chunk]:
        """What comes after the last event. Failure if something is missing:
        truncated work is not taken as done.
        """
        whole = self._begun == len(self._finished) > 0 and (said_done or self._begun >= self._n)
        if not whole:
            raise Failure("cut")
        usage = self.usage if self._with_usage else None
        return [] if usage is None else [self._chunk([]) | {"usage": usage}]

    def _choice(self, choice: dict[str, Any]) -> list[Chunk]:
        index = choice.get("index", 0)
        if not isinstance(index, int) or not 0 <= index < self._n:
            raise not_json()
        if index in self._finished:
            return []
        delta, reason = self._delta(index, choice.get("delta") or {}), choice.get("finish_reason")
        if reason == "error":
            raise Failure("error_event")
        if not delta and not reason:
            return []
        chunks = [
            self._chunk([_choice(i, {"role": "assistant", "content": ""})])
            for i in range(self._begun, index + 1)
        ]
        self._begun = max(self._begun, index + 1)
        if reason:
            self._finished.add(index)
            reason = reason if reason in FINISH_REASONS else "stop"
        told = _choice(index, delta, reason or None, _logprobs(choice.get("logprobs")))
        return [*chunks, self._chunk([told])]

    def _delta(self, index: int, delta: Any) -> dict[str, Any]:
        if not isinstance(delta, dict):
            raise not_json()
        texts = {
            "content": delta.get("content"),
            "reasoning_content": next((delta[name] for name in REASONING if delta.get(name)), None),
            "refusal": delta.get("refusal"),
        }
        told: dict[str, Any] = {name: text for name, text in texts.items() if text}
        if not all(isinstance(text, str) for text in told.values()):
            raise not_json()
        calls = [self._call(index, call) for call in _dicts(delta.get("tool_calls"))]
        if calls:
            told["tool_calls"] = calls
        self.size += sum(len(text) for text in texts.values() if text)
        return told

    def _call(self, choice: int, call: dict[str, Any]) -> dict[str, Any]:
        """A piece of a tool call. Its id and name are told once: SDKs add up what comes again."""
        function, mark = call.get("function") or {}, call.get("index", call.get("id"))
        if not isinstance(function, dict) or not isinstance(mark, (int, str)):
            raise not_json()
        name, arguments = _text(function.get("name")), function.get("arguments") or ""
        if not isinstance(arguments, str):
            raise not_json()
        key = (choice, mark)
        known = key in self._calls
        if not known:
            self._calls[key] = sum(1 for other, _ in self._calls if other == choice)
        index = self._calls[key]
        self.size += len(arguments)
        if known:
            return {"index": index, "function": {"arguments": arguments}}
        id = _text(call.get("id")) or f"call_{choice}_{index}"
        return {
            "index": index,
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> Chunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self.model,
            "choices": choices,
        }


def _choice(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> Chunk:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _dicts(value: Any) -> list[dict[str, Any]]:
    """A list of objects, null counting as an empty one; Failure if it is none."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise not_json()
    return value


def _logprobs(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    return {name: value.get(name) for name in ("content", "refusal")}


def _usage(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise not_json()
    counts = [value.get(name) for name in COUNTS]
    prompt, completion, total = (
        n if isinstance(n, int) and not isinstance(n, bool) and n >= 0 else 0 for n in counts
    )
    usage: dict[str, Any] = dict(zip(COUNTS, (prompt, completion, total or prompt + completion), strict=True))
    return usage | {name: value[name] for name in DETAILS if isinstance(value.get(name), dict)}


def joined(chunks: list[Chunk], usage: dict[str, Any] | None) -> dict[str, Any]:
    """The chat.completion that the chunks of a whole answer come to."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for told in chunk["choices"]:
            choice = choices.setdefault(
                told["index"],
                {"index": told["index"], "message": {"role": "assistant", "content": None, "refusal": None},
                 "logprobs": None, "finish_reason": None},
            )  # fmt: skip
            _add(choice["message"], told["delta"])
            if told["logprobs"]:
                _add_logprobs(choice, told["logprobs"])
            choice["finish_reason"] = told["finish_reason"] or choice["finish_reason"]
    for choice in choices.values():
        if "tool_calls" not in choice["message"]:
            choice["message"]["content"] = choice["message"]["content"] or ""
    first = chunks[0]
    return {
        "id": first["id"],
        "object": "chat.completion",
        "created": first["created"],
        "model": first["model"],
        "choices": [choices[index] for index in sorted(choices)],
        **({} if usage is None else {"usage": usage}),
    }


def _add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name in ("content", "reasoning_content", "refusal"):
        if delta.get(name):
            message[name] = (message.get(name) or "") + delta[name]
    for piece in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if piece["index"] == len(calls):
            calls.append({"id": piece["id"], "type": "function", "function": dict(piece["function"])})
        else:
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]


def _add_logprobs(choice: dict[str, Any], logprobs: dict[str, Any]) -> None:
    total = choice["logprobs"] = choice["logprobs"] or {"content": None, "refusal": None}
    for name, tokens in logprobs.items():
        if isinstance(tokens, list):
            total[name] = [*(total[name] or ()), *tokens]
