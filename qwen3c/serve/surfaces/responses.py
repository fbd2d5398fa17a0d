"""POST /v1/responses and /v1/responses/input_tokens: OpenAI's newer API, stateless, which Codex speaks.

The input items become the conversation of chat completions: messages, function_call and
function_call_output; what was answered before has to be sent again, for nothing is stored. Events and ids
are those of the API reference.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...drivers.reply import Event
from ..api import Api, json_answer
from ..ask import Stream
from ..errors import ApiError
from ..fields import Fields
from ..models import Served
from ..streams import COMMENT, event
from ..talk import (
    LARGEST,
    MOST_TOP,
    Answer,
    Format,
    Talk,
    refuse_foreign_sampling,
    seed_of,
    stops_of,
)
from .chat import MOST_MESSAGES, content_of, function_of, joined, logprobs_of, thinking_wish

IGNORED = (
    "store",
    "metadata",
    "service_tier",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "client_metadata",
    "stream_options",
    "max_tool_calls",
    "context_management",
    "prompt_cache_options",
    "moderation",
)
LOGPROBS = "message.output_text.logprobs"
# beside those, what an answer would say more of if it had it: thought that is encrypted, and tools that
# OpenAI runs
INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
PATHS = {"messages": "input"}


def routes(api: Api) -> list[Route]:
    """The endpoints."""

    async def create(request: Request) -> Response:
        fields = await api.fields(request)
        served = await api.models.get(fields.text("model"))
        talk = read(fields, served)
        streams = fields.flag("stream", False) or False
        client = api.client(request)
        ask = await talk.ask(served, client.name, api.priority(request, fields))
        headers = api.headers(served, fields.finish(), ask)
        stream = await served.submit(ask, client.limits)
        made = Made(api.request_id(request), served, talk, stream, echoed(fields))
        return await api.answer(request, served, made, streams, headers)

    async def count(request: Request) -> Response:
        fields = await api.fields(request)
        served = await api.models.get(fields.text("model"))
        talk = read(fields, served)
        fields.ignore("stream")
        headers = api.headers(served, fields.finish())
        n = len(await talk.prompt(served))
        return json_answer({"object": "response.input_tokens", "input_tokens": n}, headers=headers)

    return [
        Route("/v1/responses", create, methods=["POST"]),
        Route("/v1/responses/input_tokens", count, methods=["POST"]),
    ]


# ----------------------------------------------------------------------------
# The request


def read(fields: Fields, served: Served) -> Talk:
    """What the fields ask for. ApiError 400 names a field that is wrong or not supported."""
    system, messages = _input(fields)
    instructions = fields.text("instructions")
    if instructions:
        system.insert(0, instructions)
    talk = Talk(joined(system, messages), paths=PATHS)
    talk.tools = _tools(fields)
    talk.tool_choice = _tool_choice(fields, talk)
    talk.parallel = fields.flag("parallel_tool_calls", True) is not False
    talk.format = _format(fields)
    reasoning = fields.object("reasoning")
    if reasoning is not None:
        talk.thinking = thinking_wish(reasoning, "effort", served)
        reasoning.ignore("summary", "generate_summary", "context")
        reasoning.finish()
    talk.max_tokens = fields.whole("max_output_tokens", 1, LARGEST)
    talk.sampling = {
        "temperature": fields.number("temperature", 0, 100),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.whole("top_k", 0, 1 << 31),
        "min_p": fields.number("min_p", 0, 1),
        "presence_penalty": fields.number("presence_penalty", -100, 100),
        "frequency_penalty": fields.number("frequency_penalty", -100, 100),
        "seed": seed_of(fields),
    }
    talk.stop = stops_of(fields)
    top = fields.whole("top_logprobs", 0, MOST_TOP)
    included = fields.texts("include", 32, []) or []
    for name in included:
        if name not in INCLUDABLE:
            raise fields.error(
                "include", f"holds {name!r}, which this server has not", "unsupported_parameter"
            )
    talk.logprobs = (top or 0) if LOGPROBS in included else None
    fields.refuse("previous_response_id", "nothing is stored: send the conversation with each request")
    fields.refuse("conversation", "nothing is stored: send the conversation with each request")
    fields.refuse("background", "every answer is waited for", unless=(False,))
    fields.refuse("prompt", "nothing is stored: send the text of the prompt")
    fields.refuse("truncation", "nothing is cut silently", unless=("disabled",))
    fields.ignore(*IGNORED)
    refuse_foreign_sampling(fields)
    return talk


def echoed(fields: Fields) -> dict[str, Any]:
    """Fields of the request that the answer repeats."""
    tool_choice = fields.raw("tool_choice")
    user = fields.raw("user")
    tools = [
        {"description": None, "parameters": {}, "strict": False} | tool
        if tool.get("type") == "function"
        else tool
        for tool in fields.raw("tools") or []
    ]
    return {
        "instructions": fields.raw("instructions"),
        "tools": tools,
        "tool_choice": "auto" if tool_choice is None else tool_choice,
        "parallel_tool_calls": fields.raw("parallel_tool_calls") is not False,
        "text": fields.raw("text") or {"format": {"type": "text"}},
        "reasoning": fields.raw("reasoning") or {"effort": None, "summary": None},
        "metadata": fields.raw("metadata") or {},
        "max_output_tokens": fields.raw("max_output_tokens"),
        "top_logprobs": fields.raw("top_logprobs") or 0,
        "safety_identifier": fields.raw("safety_identifier"),
        "prompt_cache_key": fields.raw("prompt_cache_key"),
    } | ({} if user is None else {"user": user})


def _input(fields: Fields) -> tuple[list[str], list[dict[str, Any]]]:
    """(what the system says, the messages after it)."""
    value = fields.raw("input")
    if isinstance(value, str):
        return [], [{"role": "user", "content": value}]
    items = fields.items("input", MOST_MESSAGES)
    if not items:
        raise fields.error("input", "is neither a text nor a list of at least one item")
    system: list[str] = []
    messages: list[dict[str, Any]] = []
    for i, found in enumerate(items):
        item = Fields(found, f"input[{i}]")
        kind = item.text("type", "message")
        if kind == "message":
            role = item.text("role", choices=("system", "developer", "user", "assistant"))
            if role is None:
                raise item.error("role", "is missing")
            text = content_of(item, role)
            if role in ("system", "developer"):
                system.append(text)
            else:
                _say(messages, role, content=text)
        elif kind == "reasoning":
            thoughts = _reasoning(item)
            if thoughts:
                _say(messages, "assistant", reasoning_content=thoughts)
        elif kind == "function_call":
            _say(messages, "assistant", tool_calls=[_call(item)])
        elif kind == "function_call_output":
            messages.append({"role": "tool", "content": _output(item), "tool_call_id": item.text("call_id")})
        else:
            raise item.error("type", f"= {kind!r} is not supported", "unsupported_content")
    return system, messages


def _say(messages: list[dict[str, Any]], role: str, **parts: Any) -> None:
    """Add a message; thought, text and calls of the assistant that follow each other are one message."""
    last = messages[-1] if messages else {}
    joins = role == "assistant" and last.get("role") == role
    if not joins or ("content" in parts and (last.get("content") or last.get("tool_calls"))):
        last = {"role": role, "content": ""}
        messages.append(last)
    for name, value in parts.items():
        last[name] = last.get(name, []) + value if name == "tool_calls" else value


def _reasoning(item: Fields) -> str:
    texts = []
    for name in ("content", "summary"):
        for i, part in enumerate(item.items(name, MOST_MESSAGES) or ()):
            texts.append(Fields(part, item.path(f"{name}[{i}]")).text("text") or "")
        if texts:
            break  # the summary says again what the content says
    return "\n".join(texts)


def _call(item: Fields) -> dict[str, Any]:
    name, arguments = item.text("name"), item.text("arguments")
    if not name:
        raise item.error("name", "is missing")
    return {
        "type": "function",
        "id": item.text("call_id"),
        "function": {"name": name, "arguments": arguments or {}},
    }


def _output(item: Fields) -> str:
    value = item.raw("output")
    if isinstance(value, str):
        return value
    texts = []
    for i, found in enumerate(item.items("output", MOST_MESSAGES) or ()):
        part = Fields(found, item.path(f"output[{i}]"))
        if part.text("type", "input_text") not in ("input_text", "output_text", "text"):
            raise part.error("type", f"= {part.raw('type')!r} is not supported: the model reads text only")
        texts.append(part.text("text") or "")
    return "".join(texts)


def _tools(fields: Fields) -> list[dict[str, Any]]:
    """The tools that are functions, as chat completions have them; agents offer other kinds beside them."""
    tools = []
    for i, item in enumerate(fields.items("tools", 1024) or ()):
        tool = Fields(item, f"tools[{i}]")
        if tool.text("type", "function") != "function":
            continue
        tool.object("parameters")
        tools.append(function_of(tool, "parameters"))
    return tools


def _tool_choice(fields: Fields, talk: Talk) -> str:
    choice = fields.raw("tool_choice")
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice not in ("auto", "required", "none"):
            raise fields.error("tool_choice", f"= {choice!r} is not one of auto, required, none")
        if choice == "required" and not talk.tools:
            raise fields.error("tool_choice", "= required needs tools")
        return choice
    wanted = Fields(choice, "tool_choice")
    if wanted.text("type") != "function":
        raise wanted.error("type", "is not supported: use function", "unsupported_parameter")
    name = wanted.text("name")
    if name not in [tool["function"]["name"] for tool in talk.tools]:
        raise wanted.error("name", f"= {name!r} is none of the tools")
    return str(name)


def _format(fields: Fields) -> Format | None:
    text = fields.object("text")
    if text is None:
        return None
    text.ignore("verbosity")
    wanted = text.object("format")
    text.finish()
    if wanted is None:
        return None
    kind = wanted.text("type", "text", choices=("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    if kind == "json_object":
        return Format("json_object", path="text.format")
    if "schema" not in wanted:
        raise wanted.error("schema", "is missing")
    wanted.ignore("name", "description")
    return Format(
        "json_schema", wanted.raw("schema"), wanted.flag("strict", False) or False, "text.format.schema"
    )


# ----------------------------------------------------------------------------
# The answer


@dataclass
class Made:
    """The answer to a request, whole or in events. id: of the request. echo: fields that the answer
    repeats.
    """

    id: str
    served: Served
    talk: Talk
    stream: Stream
    echo: dict[str, Any]
    ping: str = COMMENT
    _created: float = field(default_factory=time.time, init=False)
    _number: int = field(default=-1, init=False)  # of the last event
    _items: list[dict[str, Any]] = field(default_factory=list, init=False)  # those that have begun
    _open: str = field(default="", init=False)  # type of the last item, "" if it is done
    _logprobs: list[dict[str, Any]] = field(default_factory=list, init=False)  # whose text is held back
    _last: dict[str, Any] = field(default_factory=dict, init=False)  # the answer, once it has ended

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is sent at once: what the last of its events says."""
        async for _ in self.events():
            pass
        return self._last

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer as events, in the order of the API reference."""
        answer = Answer()
        begun = self._response("in_progress", [], None)
        yield self._event("response.created", response=begun) + self._event(
            "response.in_progress", response=begun
        )
        async for first in self.stream:
            texts = []
            for update in (first, *self.stream.ready()):
                if update.event is not None:
                    answer.add(update.event)
                    texts += self._deltas(update.event)
            if texts:
                yield "".join(texts)
        ended = self._ended(answer)
        opening = "" if self._items else self._begin("message") + self._text("")
        closing = opening + self._close(ended)
        self._last = self._response(ended, self._items, answer)
        yield closing + self._event(f"response.{ended}", response=self._last)

    def failed(self, error: ApiError) -> str:
        """The event of an answer that the engine could not finish."""
        response = self._response("failed", self._items, None)
        code = "invalid_prompt" if error.status < 500 else "server_error"  # of those that OpenAI has
        response["error"] = {"code": code, "message": error.message}
        return self._event("response.failed", response=response)

    # ---- objects

    def _ended(self, answer: Answer) -> str:
        return "incomplete" if answer.finish == "length" else "completed"

    def _response(self, status: str, items: list[dict[str, Any]], answer: Answer | None) -> dict[str, Any]:
        sampling = self.talk.sampling
        ended = status in ("completed", "incomplete")
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": int(self._created),
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.served.name,
            "output": items,
            "previous_response_id": None,
            "temperature": _or(sampling.get("temperature"), 1.0),
            "top_p": _or(sampling.get("top_p"), 1.0),
            "presence_penalty": _or(sampling.get("presence_penalty"), 0.0),
            "frequency_penalty": _or(sampling.get("frequency_penalty"), 0.0),
            "store": False,
            "background": False,
            "truncation": "disabled",
            "service_tier": "default",
            "max_tool_calls": None,
            "usage": self._usage(answer) if ended and answer is not None else None,
        } | self.echo

    def _usage(self, answer: Answer) -> dict[str, Any]:
        stats = self.stream.stats[0]
        return {
            "input_tokens": stats.prompt_tokens,
            "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": answer.tokens,
            "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
            "total_tokens": stats.prompt_tokens + answer.tokens,
        }

    def _item(
        self, kind: str, index: int, status: str, text: str = "", logprobs: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """A message or a reasoning item."""
        if kind == "reasoning":
            content = [{"type": "reasoning_text", "text": text}] if text else []
            item = {"id": f"rs_{self.id}_{index}", "type": kind, "summary": [], "content": content}
            return item | {"encrypted_content": None, "status": status}
        parts = [self._part(text, logprobs or [])] if status != "in_progress" else []
        message = {"id": f"msg_{self.id}_{index}", "type": kind, "status": status, "role": "assistant"}
        return message | {"content": parts}

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _call(self, index: int, call: dict[str, Any], status: str) -> dict[str, Any]:
        arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
        return {
            "id": f"fc_{self.id}_{index}", "type": "function_call", "call_id": f"call_{self.id}_{index}",
            "name": call["name"], "arguments": arguments, "status": status,
        }  # fmt: skip

    def _token_logprobs(self, events: list[Event]) -> list[dict[str, Any]]:
        return list(logprobs_of(self.served.model.tokenizer, events)["content"])

    # ---- events

    def _event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return event(kind, {"type": kind, "sequence_number": self._number} | fields)

    def _deltas(self, came: Event) -> list[str]:
        """The events that a token makes."""
        texts = []
        kind = "reasoning" if came.thinking else "message"
        if came.logprob is not None:
            self._logprobs += self._token_logprobs([came])
        if came.text or (self._logprobs and self._open == "message"):
            if self._open != kind:
                texts += [self._close("completed"), self._begin(kind)]
            texts.append(self._text(came.text))
        for call in came.tool_calls:
            texts += [self._close("completed"), self._whole_call(call)]
        return texts

    def _text(self, text: str) -> str:
        """More of the item of text that is open, with what is known of its tokens."""
        item, index = self._items[-1], len(self._items) - 1
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        part = item["content"][0]
        part["text"] += text
        if self._open == "reasoning":
            return self._event("response.reasoning_text.delta", **place, delta=text)
        logprobs, self._logprobs = self._logprobs, []
        part["logprobs"] += logprobs
        return self._event("response.output_text.delta", **place, delta=text, logprobs=logprobs)

    def _begin(self, kind: str) -> str:
        """An item of text begins, with its one part."""
        index = len(self._items)
        text = self._event(
            "response.output_item.added", output_index=index, item=self._item(kind, index, "in_progress")
        )
        item = self._item(kind, index, "completed")
        if kind == "reasoning":
            item["content"] = [{"type": "reasoning_text", "text": ""}]
        item["status"] = "in_progress"
        self._items.append(item)
        self._open = kind
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        return text + self._event("response.content_part.added", **place, part=dict(item["content"][0]))

    def _close(self, status: str) -> str:
        """The item of text that is open is done."""
        if not self._open:
            return ""
        item, index = self._items[-1], len(self._items) - 1
        item["status"] = status
        part = item["content"][0]
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        if self._open == "reasoning":
            text = self._event("response.reasoning_text.done", **place, text=part["text"])
        else:
            text = self._event(
                "response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"]
            )
        self._open = ""
        text += self._event("response.content_part.done", **place, part=part)
        return text + self._event("response.output_item.done", output_index=index, item=item)

    def _whole_call(self, call: dict[str, Any]) -> str:
        """A function call: it is known only when it is complete."""
        index = len(self._items)
        item = self._call(index, call, "completed")
        self._items.append(item)
        place = {"item_id": item["id"], "output_index": index}
        begun = item | {"arguments": "", "status": "in_progress"}
        return (
            self._event("response.output_item.added", output_index=index, item=begun)
            + self._event("response.function_call_arguments.delta", **place, delta=item["arguments"])
            + self._event(
                "response.function_call_arguments.done",
                **place,
                name=item["name"],
                arguments=item["arguments"],
            )
            + self._event("response.output_item.done", output_index=index, item=item)
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
