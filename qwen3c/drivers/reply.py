"""One reply on its way, without a model and without I/O: a row of logits in, an event out.

    logits -> mask, Sampler -> token -> ReplyStream -> Event (text, thinking, tool call, finish reason)

A ReplyState computes no logits; its driver does: generate.py for one reply, batch.py for many. The text
depends on the logits, the sampling and the seed alone, because a token's random number follows from the seed
and the token's position. So a reply is the same alone, in a batch, and with its tokens computed again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..kernels.draw import Draw
from ..text.chat import END_THINK, TAGS, THINK, Piece, ReplyStream, last_control_token
from ..text.tokenizer import Tokenizer
from ..text.tools import ToolSet
from .sampler import Sampler, Sampling

FinishReason = Literal["stop", "length", "cancelled"]
SHOWN = 48  # characters of a text in a repr or an error


@dataclass(frozen=True, slots=True)
class Event:
    """What one token of a reply brought; the last event of a reply has a finish_reason."""

    token: int | None  # None if the reply ended without a further token
    text: str  # text to show now; "" while a character, tag or stop string is unfinished
    thinking: bool  # whether `text` is thought, not answer
    finish_reason: FinishReason | None = None
    tool_calls: tuple[
        dict[str, Any], ...
    ] = ()  # {"name": ..., "arguments": {...}} of each that is complete now
    logprob: float | None = None  # of `token`, in nats, before penalties and temperature
    top_logprobs: list[tuple[int, float]] | None = None  # (token, logprob), the most likely first


@dataclass
class Stats:
    """Counts and times of one reply, filled in as it goes."""

    seed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the session
    read_tokens: int = 0  # prompt tokens computed for this reply; after a cancel some are left
    prefill_seconds: float = 0.0
    generated_tokens: int = 0
    decode_seconds: float = 0.0  # from the first token to the last
    decode_passes: int = 0  # that gave the tokens after the first
    drafted_tokens: int = 0  # guesses that these passes checked
    accepted_tokens: int = 0  # those that were right
    finish_reason: FinishReason | None = None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed per second; cached ones do not count."""
        return self.read_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first token, which belongs to prefill; 0 if there is no second one."""
        return max(self.generated_tokens - 1, 0) / max(self.decode_seconds, 1e-9)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens after the first that a pass gave; 0 if there was no pass. Without drafts it is 1."""
        return max(self.generated_tokens - 1, 0) / self.decode_passes if self.decode_passes else 0.0


@dataclass(repr=False)
class Reply:
    """The events of one reply, put together. str() of it is its text."""

    text: str = ""
    thinking: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # None while the reply is on its way, or if an error ended it
    stats: Stats = field(default_factory=Stats)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        thought = f", {len(self.thinking)} characters of thought" if self.thinking else ""
        calls = "".join(f", calls {call['name']}" for call in self.tool_calls)
        shown = self.text if len(self.text) <= SHOWN else self.text[: SHOWN - 1] + "…"
        end = self.finish_reason or "unfinished"
        return f"<Reply {shown!r}, {self.stats.generated_tokens} tokens{thought}{calls}, {end}>"

    def add(self, event: Event) -> None:
        """Take in the next event."""
        if event.thinking:
            self.thinking += event.text
        else:
            self.text += event.text
        self.tool_calls += event.tool_calls
        self.finish_reason = event.finish_reason

    def message(self) -> dict[str, Any]:
        """The reply as a message, for the prompts that come after it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [{"type": "function", "function": call} for call in self.tool_calls]
        return message


# ----------------------------------------------------------------------------
# The state machine


class Mask(Protocol):
    """Restricts the next token, as a grammar does.

    It may have a method forced() besides: the tokens that will most likely come next because there is little
    else that may. They are tried as a draft.
    """

    def allowed(self) -> NDArray[np.bool_] | None:
        """(n_tokens,), true where a token may come next; None where every token may."""

    def accept(self, token: int) -> None:
        """Advance by `token`, which was sampled."""

    def prepare(self) -> None:
        """The next allowed() is coming: begin to compute it beside what the caller does meanwhile."""


@dataclass(frozen=True)
class Vocabulary:
    """What a reply must know of a model's tokens.

    n_tokens: only ids below it exist. end_tokens: ids that end a reply. undefined: ids below n_tokens that
    stand for no token. tokenizer: None for events without text. thinking: the model's kind, "hybrid",
    "always" or "none". bare: replies are text alone, in which no tag means anything. derived: what other
    modules computed from it once.
    """

    n_tokens: int
    end_tokens: frozenset[int]
    undefined: Sequence[int] = ()
    tokenizer: Tokenizer | None = None
    thinking: str = "none"
    bare: bool = False
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def control_id(self, tag: str) -> int | None:
        """The id of a control token; None if the vocabulary has no such token, or no texts."""
        return None if self.tokenizer is None else self.tokenizer.control_id(tag)

    def beginning(self, prompt: Sequence[int]) -> Literal["thought", "answer", "either"]:
        """What the reply to `prompt` begins in. A bare text, without control tokens, is answered by text
        alone.
        """
        think, end = self.control_id(THINK), self.control_id(END_THINK)
        if self.bare or self.tokenizer is None or think is None or end is None:
            return "answer"
        last = last_control_token(self.tokenizer, prompt)
        if last == think:
            return "thought"
        return "answer" if last is None or last == end or self.thinking == "none" else "either"


@dataclass(frozen=True)
class ReplySettings:
    """What a caller may ask of one reply, beside the sampling and the number of its tokens."""

    stop: str | Sequence[str] = ()  # texts that end the reply and are not part of it
    logprobs: int | None = None  # how many of the most likely tokens each event gives; None: no logprob
    mask: Mask | None = None  # restricts the tokens
    tools: ToolSet | None = None  # what ReplyStream needs to know of tool calls
    thinking_budget: int | None = None  # after this many tokens of thought </think> comes; None: no bound


class ReplyState:
    """The state of one reply: the tokens sampled so far, the text held back, why it ended.

    prompt: the token ids before the reply. max_tokens: the most tokens that are sampled; at 0, end() is all
    that may be called.
    ValueError if an argument is out of range, or the vocabulary has no </think> and a budget is given.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        settings: ReplySettings = ReplySettings(),
    ) -> None:
        n_tokens, tokenizer = vocabulary.n_tokens, vocabulary.tokenizer
        logprobs, budget = settings.logprobs, settings.thinking_budget
        if logprobs is not None and not 0 <= whole("logprobs", logprobs) <= n_tokens:
            raise ValueError(f"logprobs = {logprobs} is outside 0..{n_tokens}")
        self._sampler = Sampler(sampling, prompt, n_tokens, vocabulary.undefined)
        self._stream: ReplyStream | None = None
        if tokenizer is not None:
            think, tags = tokenizer.control_id(THINK), () if vocabulary.bare else TAGS
            opened = think is not None and last_control_token(tokenizer, prompt) == think
            in_thought = opened and not vocabulary.bare
            self._stream = ReplyStream(tokenizer, in_thought, _stops(settings.stop), settings.tools, tags)
        self._end_tokens = vocabulary.end_tokens
        self._logprobs = logprobs
        self._begun = False  # whether the next token has been drawn
        self._only: int | None = None  # the next token, where it is the only one that may come
        self._mask = settings.mask
        self._forced: Callable[[], Sequence[int]] = getattr(settings.mask, "forced", tuple)
        self._undefined = vocabulary.undefined
        self._end_thought = None if budget is None else _end_of_thought(vocabulary, budget)
        self._thought_left = budget or 0  # tokens, where there is a budget
        self.max_tokens = max_tokens
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None

    @property
    def seed(self) -> int:
        """The seed in use: the one given, else one drawn for this reply."""
        return self._sampler.seed

    @property
    def stop_string(self) -> str | None:
        """The text of `stop` that has ended the reply, if one has."""
        return self._stream.stop_string if self._stream else None

    @property
    def sampled_logprob(self) -> float:
        """Log-probability (nats) of the last token under the distribution it was drawn from; see Sampler."""
        return self._sampler.logprob

    def forced(self) -> Sequence[int]:
        """The tokens that will most likely come next because the mask allows little else."""
        return self._forced()

    def prepare(self) -> None:
        """take() is coming: begin to compute its mask, if there is one, beside the
        logits. It may be left out.
        """
        if self._mask:
            self._mask.prepare()

    def begin(self, logits: NDArray[np.float32]) -> Draw | None:
        """take() is coming, with these logits: what it will draw, for draw() to find beside that of others.

        None if it draws nothing, because only one token may come. It may be left out; take() then draws by
        itself.
        """
        allowed = self._allowed()
        only = self._only_of(allowed)
        draw = None if only is not None else self._sampler.begin(logits, allowed, self._logprobs)
        self._begun, self._only = True, only
        return draw

    def take(self, logits: NDArray[np.float32]) -> Event:
        """Sample the next token from `logits` (vocab_size,), those after the last token so far.

        ValueError if the logits are not finite, or if the mask allows no token.
        """
        token = self._next(logits)
        logprob, top_logprobs = None, None
        if self._logprobs is not None:
            logprob, top_logprobs = (
                self._sampler.measured(logits, token)
                if self._begun
                else self._sampler.logprobs(logits, token, self._logprobs)
            )
        self._begun = False
        self.tokens.append(token)
        if self._mask:
            self._mask.accept(token)
        ends = token in self._end_tokens
        piece = Piece() if ends or not self._stream else self._stream.push(token)
        if ends or (self._stream and self._stream.stopped):
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            piece = self._last_piece(piece)
        return Event(
            token, piece.text, piece.thinking, self.finish_reason, piece.tool_calls, logprob, top_logprobs
        )

    def _next(self, logits: NDArray[np.float32]) -> int:
        """The next token: the only one that may come, the one that draw() has found, else drawn now."""
        if not self._begun:
            allowed = self._allowed()
            self._only = self._only_of(allowed)
            if self._only is None:
                return self._sampler.sample(logits, allowed)
        if self._only is None:
            return self._sampler.end()
        token, self._only = self._only, None
        self._sampler.take(token)
        return token

    def _only_of(self, allowed: NDArray[np.bool_] | None) -> int | None:
        """The only allowed token, if there is no more than one and its log-probability is not asked for."""
        if allowed is None or self._logprobs is not None or np.count_nonzero(allowed) != 1:
            return None
        token = int(np.argmax(allowed))
        return None if token in self._undefined else token

    def _allowed(self) -> NDArray[np.bool_] | None:
        """Which tokens may come next; None: every one."""
        allowed = self._mask.allowed() if self._mask else None
        stream, forced = self._stream, self._end_thought
        if forced is None or stream is None or not stream.thinking or stream.in_call:
            return allowed
        if self._thought_left:
            self._thought_left -= 1
            return allowed
        return forced if allowed is None else allowed & forced

    def end(self, reason: FinishReason) -> Event:
        """End the reply without a further token; the event brings what was held back."""
        self.finish_reason = reason
        piece = self._last_piece(Piece())
        return Event(None, piece.text, piece.thinking, reason, piece.tool_calls)

    def _last_piece(self, piece: Piece) -> Piece:
        """`piece` joined with the text that the stream still holds back."""
        rest = self._stream.finish() if self._stream else Piece()
        thinking = (piece if piece.text else rest).thinking
        return Piece(piece.text + rest.text, thinking, piece.tool_calls + rest.tool_calls)


# ----------------------------------------------------------------------------
# Arguments, checked


class ContextFullError(ValueError):
    """A prompt is longer than the context of its session: n_prompt tokens, or at least so many."""

    def __init__(self, message: str, n_prompt: int, context: int) -> None:
        super().__init__(message)
        self.n_prompt = n_prompt
        self.context = context


def token_ids(prompt: Sequence[int], n_ids: int) -> list[int]:
    """`prompt` as a list of at least one id below n_ids; ValueError says what is wrong with it."""
    if isinstance(prompt, str):
        raise ValueError("prompt is text; pass token ids, from model.tokenizer.encode or model.chat_prompt")
    try:
        ids = [operator.index(id) for id in prompt]
    except TypeError:
        raise ValueError(f"prompt = {_short(prompt)} is not a list of token ids") from None
    if not ids:
        raise ValueError("prompt is empty: there is nothing to go on from")
    beyond = next((i for i, id in enumerate(ids) if not 0 <= id < n_ids), None)
    if beyond is not None:
        raise ValueError(f"prompt[{beyond}] = {ids[beyond]} is no token: ids are 0 to {n_ids - 1}")
    return ids


def token_budget(max_tokens: int | None, n_prompt: int, context: int, largest: int) -> int:
    """How many tokens may come after a prompt of n_prompt, so that both together stay within `context`.

    max_tokens: the caller's bound; None for what fits. largest: the longest context the model can have.
    ContextFullError if the prompt alone is longer than the context, ValueError if max_tokens is no number.
    """
    if n_prompt > context:
        room = f"can hold {largest} (-c {largest})" if largest > context else "holds no more"
        told = f"prompt is {n_prompt} tokens, the context holds {context}; this model {room}"
        raise ContextFullError(told, n_prompt, context)
    if max_tokens is None:
        return context - n_prompt
    if whole("max_tokens", max_tokens) < 0:
        raise ValueError(f"max_tokens = {max_tokens} is negative")
    return min(whole("max_tokens", max_tokens), context - n_prompt)


def whole(name: str, value: Any) -> int:
    """`value` as an integer; ValueError with the name if it is none."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} = {_short(value)} is not a whole number") from None


def _end_of_thought(vocabulary: Vocabulary, budget: int) -> NDArray[np.bool_]:
    """The mask that allows </think> alone."""
    if whole("thinking_budget", budget) < 0:
        raise ValueError(f"thinking_budget = {budget} is negative")
    end = vocabulary.control_id(END_THINK)
    if end is None:
        raise ValueError(f"thinking_budget = {budget}: the vocabulary has no token {END_THINK}")
    mask = np.zeros(vocabulary.n_tokens, np.bool_)
    mask[end] = True
    return mask


def _stops(stop: str | Sequence[str]) -> list[str]:
    try:
        return [stop] if isinstance(stop, str) else list(stop)
    except TypeError:
        raise ValueError(f"stop = {_short(stop)} is not a text or a list of texts") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
