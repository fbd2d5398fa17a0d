"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, which Claude Code and others speak.

The conversation becomes that of chat completions: text, tool_use and tool_result blocks are
messages with calls and results, `system` is a system message. Events come in Anthropic's order;
the errors are Anthropic's, too.
"""

from __future__ import annotations

import json
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
from ..streams import event
from ..talk import LARGEST, Answer, Format, Talk, answers, refuse_foreign_sampling, stops_of
from .chat import MOST_MESSAGES, function_of, joined

BILLING = (
    "x-anthropic-billing-header:"  # a system part that changes with every request and kills the prefix cache
)
IGNORED = (
    "metadata", "service_tier", "container", "context_management", "betas", "inference_geo",
    "cache_control", "anthropic_beta", "user_profile_id", "speed", "diagnostics", "fallbacks",
)  # fmt: skip
PATHS = {"tools": "tools", "messages": "messages", "tool_choice": "tool_choice"}


def routes(api: Api) -> list[Route]:
    """The endpoints."""

    async def create(request: Request) -> Response:
        fields = await api.fields(request)
        served = await api.models.get(fields.text("model"))
        talk = read(fields, served)
        talk.max_tokens = fields.whole("max_tokens", 1, LARGEST)
        if talk.max_tokens is None:
            raise fields.error("max_tokens", "is missing")
        streams = fields.flag("stream", False) or False
        client = api.client(request)
        ask = await talk.ask(served, client.name, api.priority(request, fields))
        headers = api.headers(served, fields.finish(), ask)
        stream = await served.submit(ask, client.limits)
        message = Message(f"msg_{api.request_id(request)}", served, stream)
        return await api.answer(request, served, message, streams, headers)

    async def count(request: Request) -> Response:
        fields = await api.fields(request)
        served = await api.models.get(fields.text("model"))
        talk = read(fields, served)
        fields.ignore("max_tokens", "stream")
        fields.finish()
        return json_answer({"input_tokens": len(await talk.prompt(served))})

    return [
        Route("/v1/messages", create, methods=["POST"]),
        Route("/v1/messages/count_tokens", count, methods=["POST"]),
    ]


# ----------------------------------------------------------------------------
# The request


def read(fields: Fields, served: Served) -> Talk:
    """What the fields ask for, the number of tokens aside."""
    found = fields.items("messages", MOST_MESSAGES)
    if not found:
        raise fields.error("messages", "is not a list of at least one message")
    system = _system(fields)
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(found):
        message = Fields(item, f"messages[{i}]")
        role = message.text("role", choices=("user", "assistant", "system"))
        if role is None:
            raise message.error("role", "is missing")
        if role == "system":  # Claude Code puts one after the user's message
            system += _texts(message, "content")
        else:
            messages += _messages(message, role)
    talk = Talk(joined(system, messages), paths=PATHS)
    talk.tools = _tools(fields)
    _choose_tool(fields, talk)
    talk.format = _format(fields)
    talk.thinking, talk.thinking_budget = _thinking(fields, served)
    talk.sampling = {
        "temperature": fields.number("temperature", 0, 100),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.whole("top_k", 0, 1 << 31),
    }
    talk.stop = stops_of(fields, "stop_sequences")
    fields.ignore(*IGNORED)
    fields.refuse("mcp_servers", "give the tools themselves", unless=([],))
    refuse_foreign_sampling(fields)
    return talk


def _system(fields: Fields) -> list[str]:
    if "system" not in fields:
        fields.raw("system")
        return []
    return [text for text in _texts(fields, "system") if not text.startswith(BILLING)]


def _texts(fields: Fields, name: str) -> list[str]:
    """The texts of a field that is a text or a list of text blocks."""
    value = fields.raw(name)
    if isinstance(value, str):
        return [value]
    texts = []
    for i, item in enumerate(fields.items(name, MOST_MESSAGES) or ()):
        block = Fields(item, fields.path(f"{name}[{i}]"))
        if block.text("type", "text") != "text":
            raise block.error("type", f"= {block.raw('type')!r} is not supported: the model reads text only")
        text = block.text("text")
        if text is None:
            raise block.error("text", "is missing")
        texts.append(text)
    return texts


def _messages(message: Fields, role: str) -> list[dict[str, Any]]:
    """A message of Anthropic's as those of a chat: results of tools are messages of
    their own, before what is said.
    """
    if isinstance(message.raw("content"), str):
        return [{"role": role, "content": message.raw("content")}]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    blocks = message.items("content", MOST_MESSAGES)
    if blocks is None:
        raise message.error("content", "is missing")
    for i, item in enumerate(blocks):
        block = Fields(item, message.path(f"content[{i}]"))
        kind = block.text("type")
        if kind == "text":
            texts += _texts_of_block(block)
        elif kind == "thinking" and role == "assistant":
            thoughts.append(block.text("thinking") or "")
        elif kind == "redacted_thinking" and role == "assistant":
            pass  # nobody but its provider can read it
        elif kind == "tool_use" and role == "assistant":
            calls.append(_call(block))
        elif kind == "tool_result" and role == "user":
            results.append(_result(block))
        else:
            raise block.error("type", f"= {kind!r} is not supported in a message of the {role}")
    said: dict[str, Any] = {"role": role, "content": "".join(texts)}
    if thoughts:
        said["reasoning_content"] = "\n".join(thoughts)
    if calls:
        said["tool_calls"] = calls
    return results + ([said] if texts or calls or thoughts or not results else [])


def _texts_of_block(block: Fields) -> list[str]:
    text = block.text("text")
    if text is None:
        raise block.error("text", "is missing")
    return [text]


def _call(block: Fields) -> dict[str, Any]:
    name = block.text("name")
    if not name:
        raise block.error("name", "is missing")
    arguments = block.raw("input")
    if not isinstance(arguments, (dict, type(None))):
        raise block.error("input", "is not an object")
    return {
        "type": "function", "id": block.text("id"), "function": {"name": name, "arguments": arguments or {}}
    }  # fmt: skip


def _result(block: Fields) -> dict[str, Any]:
    text = "".join(_texts(block, "content"))
    if block.flag("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "content": text, "tool_call_id": block.text("tool_use_id")}


def _tools(fields: Fields) -> list[dict[str, Any]]:
    """The tools as OpenAI has them; those that a provider runs itself are nothing a local model has."""
    tools = []
    for i, item in enumerate(fields.items("tools", 1024) or ()):
        tool = Fields(item, f"tools[{i}]")
        if tool.text("type", "custom") != "custom":
            continue
        if tool.object("input_schema") is None:
            raise tool.error("input_schema", "is missing")
        tools.append(function_of(tool, "input_schema"))
    return tools


def _choose_tool(fields: Fields, talk: Talk) -> None:
    choice = fields.object("tool_choice")
    if choice is None:
        return
    kind = choice.text("type", choices=("auto", "any", "tool", "none"))
    if kind is None:
        raise choice.error("type", "is missing")
    talk.parallel = not choice.flag("disable_parallel_tool_use", False)
    if kind in ("any", "tool") and not talk.tools:
        raise fields.error("tool_choice", f"= {kind} needs tools")
    if kind == "tool":
        name = choice.text("name")
        if name not in [tool["function"]["name"] for tool in talk.tools]:
            raise choice.error("name", f"= {name!r} is none of the tools")
        talk.tool_choice = str(name)
    else:
        talk.tool_choice = {"any": "required"}.get(kind, kind)


def _format(fields: Fields) -> Format | None:
    """The schema that the answer must follow: output_config.format, once output_format."""
    found = []
    config = fields.object("output_config")
    if config is not None:
        config.ignore("effort", "task_budget")
        found.append(config.object("format"))
        for name in config.finish():
            raise config.error(name, "is not supported: format alone is", "unsupported_parameter")
    found.append(fields.object("output_format"))
    formats = []
    for wanted in filter(None, found):
        if wanted.text("type", choices=("json_schema",)) is None:
            raise wanted.error("type", "is missing")
        if "schema" not in wanted:
            raise wanted.error("schema", "is missing")
        formats.append(Format("json_schema", wanted.raw("schema"), path=wanted.path("schema")))
    if len(formats) > 1:
        raise fields.error("output_format", "and output_config.format are two formats")
    return formats[0] if formats else None


def _thinking(fields: Fields, served: Served) -> tuple[bool | None, int | None]:
    """(whether to think, how many tokens of thought at most).

    As in Anthropic's API a reply does not think unless it is asked for; a model that always thinks does.
    """
    hybrid = served.model.metadata["thinking"] == "hybrid"
    thinking = fields.object("thinking")
    if thinking is None:
        return (False if hybrid else None), None
    kind = thinking.text("type", choices=("enabled", "disabled", "adaptive"))
    if kind is None:
        raise thinking.error("type", "is missing")
    budget = thinking.whole("budget_tokens", 0, LARGEST)
    thinking.ignore("display")
    thinking.finish()
    wanted = kind != "disabled" if hybrid else None
    return wanted, budget if kind == "enabled" and served.model.metadata["thinking"] != "none" else None


# ----------------------------------------------------------------------------
# The answer


@dataclass
class Message:
    """The answer to a request, whole or in events. id: of the answer."""

    id: str
    served: Served
    stream: Stream
    ping: str = event("ping", {"type": "ping"})
    _index: int = field(default=-1, init=False)  # of the content block that is open, or was last
    _open: str = field(default="", init=False)  # its type; "" if none is open

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is sent at once."""
        (answer,) = await answers(self.stream)
        reply = answer.reply
        content: list[dict[str, Any]] = []
        if reply.thinking:
            content.append({"type": "thinking", "thinking": reply.thinking, "signature": ""})
        if reply.text:
            content.append({"type": "text", "text": reply.text, "citations": None})
        content += [self._tool_use(i, call) for i, call in enumerate(reply.tool_calls)]
        reason, sequence = self._stop(answer)
        return self._head() | {
            "content": content, "stop_reason": reason, "stop_sequence": sequence,
            "usage": self._usage(answer),
        }  # fmt: skip

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer as events: the message, its blocks, why it ended."""
        answer = Answer()
        begun: dict[str, Any] = {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(answer),
        }
        start = self._head() | begun
        yield event("message_start", {"type": "message_start", "message": start})
        async for first in self.stream:
            texts = []
            for update in (first, *self.stream.ready()):
                if update.event is not None:
                    answer.add(update.event)
                    texts += self._deltas(answer, update.event)
            if texts:
                yield "".join(texts)
        reason, sequence = self._stop(answer)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield (
            self._close()
            + event("message_delta", {"type": "message_delta", "delta": delta, "usage": self._usage(answer)})
            + event("message_stop", {"type": "message_stop"})
        )

    def failed(self, error: ApiError) -> str:
        """The event of an answer that breaks off."""
        return event("error", error.anthropic())

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.served.name}

    def _usage(self, answer: Answer) -> dict[str, Any]:
        """Tokens, in Anthropic's words: input_tokens are those that were not found in the cache."""
        stats = self.stream.stats[0]
        return {
            "input_tokens": stats.prompt_tokens - stats.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": stats.cached_tokens,
            "output_tokens": answer.tokens,
        }

    def _stop(self, answer: Answer) -> tuple[str, str | None]:
        """(stop_reason, the stop sequence that came)."""
        sequence = self.stream.jobs[0].stop_string
        if answer.finish == "tool_calls":
            return "tool_use", None
        if answer.finish == "length":
            return "max_tokens", None
        return ("stop_sequence", sequence) if sequence is not None else ("end_turn", None)

    def _tool_use(self, i: int, call: dict[str, Any]) -> dict[str, Any]:
        arguments = call.get("arguments", {})
        return {
            "type": "tool_use",
            "id": f"toolu_{self.id[4:]}_{i}",
            "name": call["name"],
            "input": arguments,
        }

    def _deltas(self, answer: Answer, came: Event) -> list[str]:
        """The events that a token makes: the end of a block, the start of another, a piece of it."""
        texts = []
        if came.text:
            kind = "thinking" if came.thinking else "text"
            if self._open != kind:
                empty = (
                    {"thinking": "", "signature": ""} if came.thinking else {"text": "", "citations": None}
                )
                texts += [self._close(), self._start({"type": kind} | empty)]
                self._open = kind
            texts.append(self._delta({"type": f"{kind}_delta", kind: came.text}))
        for i, call in enumerate(came.tool_calls, len(answer.reply.tool_calls) - len(came.tool_calls)):
            block = self._tool_use(i, call)
            arguments = json.dumps(block["input"], ensure_ascii=False)
            texts += [self._close(), self._start(block | {"input": {}})]
            self._open = "tool_use"
            texts += [self._delta({"type": "input_json_delta", "partial_json": arguments}), self._close()]
        return texts

    def _start(self, block: dict[str, Any]) -> str:
        self._index += 1
        return event(
            "content_block_start",
            {"type": "content_block_start", "index": self._index, "content_block": block},
        )

    def _delta(self, delta: dict[str, Any]) -> str:
        return event(
            "content_block_delta", {"type": "content_block_delta", "index": self._index, "delta": delta}
        )

    def _close(self) -> str:
        """The end of the block that is open, if one is; thought ends with a
        signature, which SDKs wait for.
        """
        if not self._open:
            return ""
        signature = (
            self._delta({"type": "signature_delta", "signature": ""}) if self._open == "thinking" else ""
        )
        self._open = ""
        return signature + event("content_block_stop", {"type": "content_block_stop", "index": self._index})
