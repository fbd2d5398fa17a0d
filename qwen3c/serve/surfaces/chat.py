"""POST /v1/chat/completions: OpenAI's chat, which most clients speak.

Beside OpenAI's fields it has those of local servers: top_k, min_p, repetition_penalty, chat_template_kwargs,
thinking_budget, return_progress, priority. docs/SERVING.md lists what is taken, ignored and refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...drivers.reply import Event
from ...text.tokenizer import Tokenizer
from ..api import FINGERPRINT, Api
from ..ask import Progress, Stream
from ..errors import ApiError
from ..fields import Fields
from ..models import Served
from ..streams import COMMENT, DONE, data
from ..talk import (
    LARGEST,
    MOST_REPLIES,
    MOST_TOP,
    Answer,
    Talk,
    answers,
    format_of,
    progress_of,
    refuse_foreign_sampling,
    sampling_of,
    stops_of,
    stream_of,
    timings,
    usage,
)  # fmt: skip
from .cloud import model_here, offered

IGNORED = (
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "verbosity",
    "prediction",
    "cache_prompt",
    "id_slot",
    "timings_per_token",
    "keep_alive",
    "moderation",
    "include_reasoning",
)
MOST_MESSAGES = 16384


def routes(api: Api) -> list[Route]:
    """The endpoint."""

    async def complete(request: Request) -> Response:
        fields = await api.fields(request)
        served = await api.models.get(model_here(api, request, fields))
        wanted = read(fields, served)
        client, priority, ignored = api.client(request), api.priority(request, fields), fields.finish()
        cloud = await offered(api, request, fields, wanted.streams)
        if isinstance(cloud, Response):
            return cloud
        served = await api.models.get(served.name)  # the provider may have taken long
        ask = await wanted.talk.ask(served, client.name, priority)
        headers = api.headers(served, ignored, ask, cloud)
        api.told(request, fallback=cloud)
        stream = await served.submit(ask, client.limits)
        chat = Chat(f"chatcmpl-{api.request_id(request)}", served, wanted, stream)
        return await api.answer(request, served, chat, wanted.streams, headers)

    return [Route("/v1/chat/completions", complete, methods=["POST"])]


# ----------------------------------------------------------------------------
# The request


@dataclass
class Wanted:
    """The request. logprobs: None, or how many of the most likely tokens to list beside each."""

    talk: Talk
    streams: bool
    usage: bool
    progress: bool


def read(fields: Fields, served: Served) -> Wanted:
    """What the fields ask for. ApiError 400 names a field that is wrong or not supported."""
    messages = messages_of(fields, "messages")
    thinking, budget = thinking_of(fields, served)
    logprobs = fields.flag("logprobs", False)
    top = fields.whole("top_logprobs", 0, MOST_TOP)
    if top and not logprobs:
        raise fields.error("top_logprobs", "needs logprobs to be true")
    max_tokens = fields.whole("max_completion_tokens", 0, LARGEST)
    older = fields.whole("max_tokens", 0, LARGEST)
    talk = Talk(
        messages,
        tools=tools_of(fields),
        parallel=fields.flag("parallel_tool_calls", True) is not False,
        thinking=thinking,
        thinking_budget=budget,
        format=format_of(fields),
        max_tokens=older if max_tokens is None else max_tokens,
        sampling=sampling_of(fields, served.model.config.n_tokens),
        stop=stops_of(fields),
        logprobs=(top or 0) if logprobs else None,
        n=fields.whole("n", 1, MOST_REPLIES, 1) or 1,
    )
    talk.tool_choice = tool_choice_of(fields, talk)
    talk.continues = continues(fields, messages)
    streams, wants_usage = stream_of(fields)
    wanted = Wanted(talk, streams, wants_usage, fields.flag("return_progress", False) or False)
    refuse_others(fields)
    return wanted


def continues(fields: Fields, messages: list[dict[str, Any]]) -> bool:
    """Whether the reply goes on with the last message, in vLLM's words; ApiError 400 if that cannot be."""
    wanted = fields.flag("continue_final_message", False) or False
    begins = fields.flag("add_generation_prompt", not wanted)
    if wanted == begins:
        raise fields.error(
            "add_generation_prompt", "is true where continue_final_message is not, and the other way round"
        )
    if wanted and (messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1] or len(messages) < 2):
        raise fields.error(
            "continue_final_message", "needs a last message of the assistant, without tool calls"
        )
    return wanted


def refuse_others(fields: Fields) -> None:
    """Fields that change nothing, and those that would change the meaning and cannot be done."""
    fields.ignore(*IGNORED)
    fields.refuse("functions", "use tools")
    fields.refuse("function_call", "use tool_choice")
    fields.refuse("web_search_options", "this server does not search the web")
    modalities = fields.items("modalities", 8)
    if modalities is not None and modalities != ["text"]:
        raise fields.error("modalities", "holds something other than text", "unsupported_parameter")
    fields.ignore("audio")  # says how audio would sound, which modalities alone can ask for
    fields.refuse("chat_template", "the model's own template is used")
    fields.refuse("documents", "put them into a message")
    refuse_foreign_sampling(fields)


def messages_of(fields: Fields, name: str) -> list[dict[str, Any]]:
    """The conversation in the shape that chat templates are written for.

    developer is OpenAI's newer word for system. All system messages join into the first: templates know one,
    at the beginning, and agents send several.
    """
    found = fields.items(name, MOST_MESSAGES)
    if not found:
        raise fields.error(name, "is not a list of at least one message")
    system: list[str] = []
    messages = []
    for i, item in enumerate(found):
        message = Fields(item, fields.path(f"{name}[{i}]"))
        role = message.text("role")
        if role == "function":
            raise message.error("role", "= function is not supported: use tool")
        if role not in ("system", "developer", "user", "assistant", "tool"):
            raise message.error("role", f"= {role!r} is not one of system, developer, user, assistant, tool")
        content = content_of(message, role)
        if role in ("system", "developer"):
            system.append(content)
            continue
        known = {"role": role, "content": content}
        for key in ("reasoning_content", "reasoning", "thinking", "name", "tool_call_id"):
            text = message.text(key)
            if text is not None:
                known[key] = text
        if role == "assistant":
            known |= calls_of(message)
        messages.append(known)
    return joined(system, messages)


def joined(system: list[str], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after one that says what all system messages say. There may be
    nothing else: as with OpenAI.
    """
    first = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return first + messages


def content_of(message: Fields, role: str) -> str:
    """The text of a message: itself, or the text parts of a list."""
    content = message.raw("content")
    if content is None:
        if role in ("assistant", "tool"):
            return message.text("refusal") or ""
        raise message.error("content", "is missing")
    if isinstance(content, str):
        return content
    texts = []
    for i, item in enumerate(message.items("content", MOST_MESSAGES) or ()):
        if isinstance(item, str):
            texts.append(item)
            continue
        part = Fields(item, message.path(f"content[{i}]"))
        kind = part.text("type", "text")
        if kind not in ("text", "refusal", "input_text", "output_text"):
            raise part.error(
                "type", f"= {kind!r} is not supported: the model reads text only", "unsupported_content"
            )
        text = part.text("refusal" if kind == "refusal" else "text")
        if text is None:
            raise part.error("text", "is missing")
        texts.append(text)
    return "".join(texts)


def calls_of(message: Fields) -> dict[str, Any]:
    """The tool calls of an assistant's message, as templates take them."""
    message.refuse("function_call", "use tool_calls")
    found = message.items("tool_calls", 1024)
    if not found:
        return {}
    calls = []
    for i, item in enumerate(found):
        call = Fields(item, message.path(f"tool_calls[{i}]"))
        kind = call.text("type", "function")
        function = call.object("function")
        if kind != "function" or function is None:
            raise call.error("type", f"= {kind!r} is not a function call")
        name = function.text("name")
        if not name:
            raise function.error("name", "is missing")
        arguments = function.raw("arguments")
        if not isinstance(arguments, (str, dict, type(None))):
            raise function.error("arguments", "is neither a text nor an object")
        called = {"name": name, "arguments": arguments if arguments else {}}
        calls.append({"type": "function", "id": call.text("id"), "function": called})
    return {"tool_calls": calls}


def tools_of(fields: Fields) -> list[dict[str, Any]]:
    """The tools that are functions; other kinds, which agents offer beside them, are nothing a local model
    has.
    """
    found = fields.items("tools", 1024) or []
    for i, item in enumerate(found):
        if not isinstance(item, dict):
            raise fields.error(f"tools[{i}]", "is not an object")
    return [tool for tool in found if tool.get("type", "function") == "function"]


def function_of(tool: Fields, schema: str) -> dict[str, Any]:
    """A tool of another API as it is one here. schema: the field with that of its arguments."""
    name = tool.text("name")
    if not name:
        raise tool.error("name", "is missing")
    function = {
        "name": name,
        "description": tool.text("description") or "",
        "parameters": tool.raw(schema) or {},
        "strict": tool.flag("strict", False),
    }
    return {"type": "function", "function": function}


def tool_choice_of(fields: Fields, talk: Talk) -> str:
    """ "auto", "required", "none", or the name of the function that must be called."""
    choice = fields.raw("tool_choice")
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice not in ("auto", "required", "none", "any"):
            raise fields.error("tool_choice", f"= {choice!r} is not one of auto, required, none")
        if choice in ("required", "any") and not talk.tools:
            raise fields.error("tool_choice", f"= {choice} needs tools")
        return "required" if choice == "any" else choice
    wanted = Fields(choice, "tool_choice")
    if wanted.text("type", "function") != "function":
        raise wanted.error("type", "is not supported: use function", "unsupported_parameter")
    function = wanted.object("function")
    name = function.text("name") if function is not None else wanted.text("name")
    names = [str((tool.get("function") or tool).get("name")) for tool in talk.tools]
    if name not in names:
        raise fields.error("tool_choice", f"names {name!r}, which is none of the tools")
    return str(name)


def thinking_of(fields: Fields, served: Served) -> tuple[bool | None, int | None]:
    """(whether to think, None for what the model does; how many tokens of thought at most).

    chat_template_kwargs.enable_thinking is an order, which a model that cannot obey
    refuses; reasoning_effort is a wish.
    """
    kind = served.model.metadata["thinking"]
    thinking = thinking_wish(fields, "reasoning_effort", served)
    options = fields.object("chat_template_kwargs")
    if options is not None:
        ordered = options.flag("enable_thinking")
        for name in options.finish():
            raise options.error(name, "is not supported: enable_thinking alone is", "unsupported_parameter")
        if ordered is not None:
            thinking = ordered
            if ordered != {"always": True, "none": False}.get(kind, ordered):
                what = "always thinks" if kind == "always" else "does not think"
                raise options.error("enable_thinking", f"cannot be {str(ordered).lower()}: this model {what}")
            if kind != "hybrid":
                thinking = None
    budget = fields.whole("thinking_budget", 0, LARGEST)
    return thinking, budget


def thinking_wish(fields: Fields, name: str, served: Served) -> bool | None:
    """Whether a hybrid model should think, by how much effort is wished for; None
    where nothing can be chosen.
    """
    effort = fields.text(name, choices=("none", "minimal", "low", "medium", "high", "xhigh", "max"))
    if effort is None or served.model.metadata["thinking"] != "hybrid":
        return None
    return effort not in ("none", "minimal")


# ----------------------------------------------------------------------------
# The answer


@dataclass
class Chat:
    """The answer to a request, whole or in chunks. id: of the answer."""

    id: str
    served: Served
    wanted: Wanted
    stream: Stream
    ping: str = COMMENT

    def __post_init__(self) -> None:
        self._created = int(time.time())
        self._tokenizer = self.served.model.tokenizer

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is sent at once."""
        found = await answers(self.stream)
        choices = [self._choice(i, answer) for i, answer in enumerate(found)]
        tokens = usage(self.stream, found, self.wanted.talk.n)
        return self._head("chat.completion") | {
            "choices": choices, "usage": tokens, "timings": timings(self.stream)
        }  # fmt: skip

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer in chunks: roles, what comes, why each reply ended, the usage if it is wanted,
        [DONE].
        """
        talk = self.wanted.talk
        found = [Answer() for _ in range(talk.n)]
        yield "".join(self._chunk(i, {"role": "assistant", "content": ""}) for i in range(talk.n))
        async for first in self.stream:
            texts = []
            for update in (first, *self.stream.ready()):
                if update.progress is not None and self.wanted.progress:
                    texts.append(self._progress(update.index, update.progress))
                if update.event is not None:
                    answer = found[update.index]
                    answer.add(update.event)
                    texts += self._deltas(update.index, answer, update.event)
            if texts:
                yield "".join(texts)
        if self.wanted.usage:
            tokens = usage(self.stream, found, talk.n)
            yield data(
                self._head("chat.completion.chunk")
                | {"choices": [], "usage": tokens, "timings": timings(self.stream)}
            )
        yield DONE

    def failed(self, error: ApiError) -> str:
        """The chunk of an answer that breaks off."""
        return data(error.openai())

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self._created, "model": self.served.name,
            "system_fingerprint": FINGERPRINT,
        }  # fmt: skip

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        reply = answer.reply
        calls = [call_object(self.id, index, i, call) for i, call in enumerate(reply.tool_calls)]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not reply.text else reply.text,
            "refusal": None,
        }
        if reply.thinking:
            message["reasoning_content"] = reply.thinking
        if calls:
            message["tool_calls"] = calls
        logprobs = None
        if self.wanted.talk.logprobs is not None:
            logprobs = logprobs_of(self._tokenizer, answer.events)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish}

    def _deltas(self, index: int, answer: Answer, event: Event) -> list[str]:
        """The chunks that an event makes."""
        logprobs = None
        if event.logprob is not None:
            logprobs = logprobs_of(self._tokenizer, [event])
        texts = []
        if event.text or (logprobs and logprobs["content"]):
            name = "reasoning_content" if event.thinking else "content"
            texts.append(self._chunk(index, {name: event.text}, logprobs=logprobs))
        for i, called in enumerate(event.tool_calls, len(answer.reply.tool_calls) - len(event.tool_calls)):
            call = call_object(self.id, index, i, called)
            texts.append(self._chunk(index, {"tool_calls": [{"index": i} | call]}))
        if event.finish_reason is not None:
            texts.append(self._chunk(index, {}, finish=answer.finish))
        return texts

    def _chunk(
        self, index: int, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        if self.wanted.usage:
            chunk["usage"] = None
        return data(chunk)

    def _progress(self, index: int, progress: Progress) -> str:
        """Where a reply is before its first token."""
        choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": None}
        found = {"choices": [choice], "prompt_progress": progress_of(progress)}
        return data(self._head("chat.completion.chunk") | found)


def call_object(id: str, index: int, i: int, call: dict[str, Any]) -> dict[str, Any]:
    """A tool call in OpenAI's words. Its id follows from that of the answer and its place in it."""
    arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": f"call_{id.partition('-')[2]}_{index}_{i}", "type": "function", "function": function}


def logprobs_of(tokenizer: Tokenizer, events: Sequence[Event]) -> dict[str, Any]:
    """The log-probabilities of the answer's tokens: not of thought, and not of control tokens."""
    content = []
    for event in events:
        if (
            event.token is None
            or event.logprob is None
            or event.thinking
            or tokenizer.is_control(event.token)
        ):
            continue
        top = [_token(tokenizer, id, logprob) for id, logprob in event.top_logprobs or ()]
        content.append(_token(tokenizer, event.token, event.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _token(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(id)
    # -9999 is OpenAI's word for a token that cannot come
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}
