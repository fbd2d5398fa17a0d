"""Conversations <-> tokens: messages become a prompt, a reply's tokens become text without tags.

    messages -> normalised -> control tokens in them escaped -> template -> prompt tokens
    reply tokens -> whole characters -> stop strings -> thinking | answer | tool calls

Tags are recognised by token id, never by their text: a model that writes about <think> does not think.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .template import ChatTemplateError, Renderer
from .tokenizer import Tokenizer
from .tools import BareCalls, Call, ToolSet, hermes_calls

__all__ = ["ChatTemplate", "ChatTemplateError", "Piece", "ReplyStream", "StopStrings", "normalized"]

ROLES = ("system", "user", "assistant", "tool")
THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TAGS = (THINK, END_THINK, TOOL_CALL, END_TOOL_CALL)  # the reply format of Qwen3


# ----------------------------------------------------------------------------
# Messages -> prompt


class ChatTemplate:
    """The template of a model and what it can be asked for.

    thinking: the model's kind. A "hybrid" model thinks unless told not to; "always" and "none" have no
    switch.
    special_tokens: texts a template may refer to by name, such as {"bos_token": "..."}.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        thinking: str,
        special_tokens: dict[str, str] | None = None,
        renderer: Renderer | None = None,
    ) -> None:
        self.source = source
        self.thinking = thinking
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens or {}
        self._renderer = renderer or Renderer()

    def prompt(
        self,
        messages: Sequence[dict[str, Any]],
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        most: int | None = None,
    ) -> list[int]:
        """Token ids of the conversation, ending where the assistant speaks (see Model.chat_prompt)."""
        if not self.source:
            raise ValueError("this model has no chat template: it completes text, it does not chat")
        self.check_thinking(thinking)
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": [self._escaped_message(m) for m in normalized(messages)],
            "tools": self._escaped(list(tools)) if tools else None,
            "add_generation_prompt": True,
        }
        if thinking is not None:
            variables["enable_thinking"] = thinking
        return self._tokenizer.encode_escaped(self._renderer.render(self.source, variables), most)

    def check_thinking(self, thinking: bool | None) -> None:
        """Raise ValueError if the model cannot do what the switch asks for."""
        if thinking is False and self.thinking == "always":
            raise ValueError("this model always thinks: thinking cannot be switched off")
        if thinking is True and self.thinking == "none":
            raise ValueError("this model does not think: thinking cannot be switched on")

    def _escaped_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message, control tokens in its texts escaped, but for the assistant's own reply tags (TAGS)."""
        own = TAGS if message["role"] == "assistant" else ()
        return {
            key: self._tokenizer.escape(value, keep=own)
            if key in ("content", "reasoning_content")
            else self._escaped(value)
            for key, value in message.items()
        }

    def _escaped(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._tokenizer.escape(value)
        if isinstance(value, dict):
            return {self._escaped(key): self._escaped(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._escaped(item) for item in value]
        return value


def may_think(kind: str, switch: bool | None) -> bool:
    """Whether replies may think. kind: of the model; switch: what a hybrid one was told, None for nothing."""
    return kind == "always" or (kind == "hybrid" and switch is not False)


def normalized(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the one shape templates are written for; ValueError names the message and the field.

    content: None becomes "", a list of text parts is joined. reasoning_content may also be called
    thinking or reasoning. tool_calls: arguments given as JSON text become objects. Any other field that is
    None is left out.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages is not a list of at least one message")
    return [_normalized(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _normalized(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {type(message).__name__}, not a dict with role and content")
    if message.get("role") not in ROLES:
        raise ValueError(f"{where}.role is {message.get('role')!r}, not one of {', '.join(ROLES)}")
    result = {key: value for key, value in message.items() if value is not None}
    result["content"] = _text_of(message.get("content"), f"{where}.content")
    for name in ("reasoning", "thinking", "reasoning_content"):
        if name in result:
            result["reasoning_content"] = _text_of(result[name], f"{where}.{name}")
    if "tool_calls" in result:
        calls = result["tool_calls"]
        if not isinstance(calls, (list, tuple)) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(f"{where}.tool_calls is not a list of dicts")
        result["tool_calls"] = [_normalized_call(call) for call in calls]
    return result


def _text_of(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where} is {type(content).__name__}, not text or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where}[{i}] is of type {kind!r}; this model takes text only")
        texts.append(text)
    return "".join(texts)


def _normalized_call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _normalized_call(call["function"])}
    if isinstance(call.get("arguments"), str):
        try:
            arguments = json.loads(call["arguments"])
        except (ValueError, RecursionError):
            return call  # arguments that are no JSON stay text, which templates accept too
        if isinstance(arguments, dict):
            return {**call, "arguments": arguments}
    return call


# ----------------------------------------------------------------------------
# Reply -> text


@dataclass(frozen=True, slots=True)
class Piece:
    """What a token added to the reply: text of one channel, and finished tool calls."""

    text: str = ""
    thinking: bool = False  # whether `text` is thought, not answer
    tool_calls: tuple[Call, ...] = ()


def last_control_token(tokenizer: Tokenizer, prompt: Sequence[int]) -> int | None:
    """The id of a prompt's last control token: <think> there means that the reply starts with thought."""
    return next((id for id in reversed(prompt) if tokenizer.is_control(id)), None)


class StopStrings:
    """Text in, text out up to the first stop string, which is then `found`; what may be the start of one
    waits.

    If several match, the one that ends first wins, the longest of those; so the result does not depend on how
    the text arrives.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = list(strings)
        if not all(isinstance(s, str) and s for s in self._strings):
            raise ValueError(f"stop = {self._strings!r} holds something other than non-empty strings")
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """(the text that can go out, whether a stop string follows it)."""
        if not self._strings:
            return text, False
        text = self._held + text
        found = [(at + len(s), at) for s in self._strings if (at := text.find(s)) >= 0]
        if found:
            self._held = ""
            end, at = min(found)
            self.found = text[at:end]
            return text[:at], True
        start = len(text) - self._may_start(text)
        self._held = text[start:]
        return text[:start], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _may_start(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._strings)), 0)


class ReplyStream:
    """Tokens of a reply in, pieces of text out, without tags and stop strings.

    thinking: whether the reply starts inside <think>, then whether it is there now. in_call: whether a tool
    call has begun and not ended. `stopped` is set once a stop string has come. tools: those that may be
    called, in whose format; without them calls are Hermes calls of any name. tags: those that mean something;
    others are text. Newlines next to a tag belong to the tag, as they do in the template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        thinking: bool = False,
        stop: Iterable[str] = (),
        tools: ToolSet | None = None,
        tags: Collection[str] = TAGS,
    ) -> None:
        self._tags = {tokenizer.control_id(tag): tag for tag in tags}
        self._decoder = tokenizer.stream()
        self._stops = StopStrings(stop)
        self.thinking = thinking
        self._tools = tools
        self._bare = BareCalls(tools) if tools is not None and tools.format == "qwen3-coder" else None
        self._call: str | None = None  # text of the tool call we are in
        self._after_tag = False
        self._newlines = ""  # newlines held back: more text brings them out, a tag swallows them
        self.stopped = False

    @property
    def stop_string(self) -> str | None:
        """The stop string that has come, if one has."""
        return self._stops.found

    @property
    def in_call(self) -> bool:
        return self._call is not None

    def push(self, token: int) -> Piece:
        tag = self._tags.get(token)
        if tag is None:
            return self._emit(self._decoder.push(token))
        piece = self._emit(self._decoder.flush(), ended_by=tag)
        return piece if self.stopped else self._switch(tag, piece)

    def finish(self) -> Piece:
        """What was held back, when the reply ends here."""
        piece = self._emit(self._decoder.flush(), ended_by="")
        call, self._call = self._call, None
        if call is not None:
            found = self._tools.calls(call, closed=False) if self._tools is not None else None
            piece = _joined(piece, self._piece([TOOL_CALL + call] if found is None else found, exact=True))
        newlines, self._newlines = self._newlines, ""
        return Piece(piece.text + newlines, piece.thinking, piece.tool_calls)

    def _emit(self, text: str, ended_by: str | None = None) -> Piece:
        """`text` on its way out; where a tag or the reply's end ("") ends a channel,
        nothing held back can go on.
        """
        if self.stopped:
            return Piece("", self.thinking)
        text, self.stopped = self._stops.push(text)
        if ended_by is not None and not self.stopped:
            text += self._stops.flush()
        if self._call is not None:
            self._call += text
            return Piece("", self.thinking)
        if self._bare is None or self.thinking:
            return self._piece([text])
        parts = self._bare.push(text)
        if ended_by is not None or self.stopped:
            parts += self._bare.flush(closed=ended_by == END_TOOL_CALL)
        return self._piece(parts)

    def _piece(self, parts: Iterable[str | Call], exact: bool = False) -> Piece:
        """Texts and calls that come one after the other. exact: the newlines of the texts belong to no
        tag.
        """
        text, calls = "", list[Call]()
        for part in parts:
            if isinstance(part, dict):
                calls.append(part)
                self._newlines, self._after_tag = "", True
            else:
                text += part if exact else self._without_newlines(part)
        return Piece(text, self.thinking, tuple(calls))

    def _without_newlines(self, text: str) -> str:
        if self._after_tag:
            text = text.lstrip("\n")
            self._after_tag = not text
        if not text.strip("\n"):
            self._newlines += text
            return ""
        text = self._newlines + text
        shown = text.rstrip("\n")
        self._newlines = text[len(shown) :]
        return shown

    def _switch(self, tag: str, piece: Piece) -> Piece:
        """Go on in the channel that `tag` opens; `piece` is the last text of the old channel."""
        if self._call is not None:
            if tag == END_TOOL_CALL:
                return self._end_call(self._call)
            self._call += tag  # inside a call a tag is part of its text
            return piece
        self._newlines, self._after_tag = "", True
        if tag == TOOL_CALL:
            self._call = ""
        elif tag != END_TOOL_CALL:
            self.thinking = tag == THINK
        return piece

    def _end_call(self, text: str) -> Piece:
        found = self._tools.calls(text) if self._tools is not None else hermes_calls(text)
        self._call, self._after_tag = None, True
        return self._piece([TOOL_CALL + text + END_TOOL_CALL] if found is None else found, exact=True)


def _joined(first: Piece, second: Piece) -> Piece:
    """Two pieces of one channel."""
    return Piece(first.text + second.text, first.thinking, first.tool_calls + second.tool_calls)
