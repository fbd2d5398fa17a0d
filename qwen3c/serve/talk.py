"""A conversation that is to be answered, in the words that chat completions, responses and messages share.

body of a surface -> Talk -> prompt tokens, tools, grammar -> Ask -> Stream -> Answer -> body of the surface
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..drivers.reply import Event, Reply, Vocabulary
from ..drivers.sampler import SamplingOptions
from ..text.chat import TOOL_CALL
from .ask import Ask, Stream, Update
from .errors import ApiError
from .fields import Fields
from .models import Served

if TYPE_CHECKING:
    from ..drivers.grammar import Grammar
    from ..text.tools import ToolSet

Finish = Literal["stop", "length", "tool_calls"]
LARGEST = 1 << 40  # where a number has no bound of its own
MOST_STOPS = 64
MOST_REPLIES = 128  # of one request
MOST_NAME = 128  # characters of a function's name: agents prefix them with their server's
MOST_TOP = 20  # most likely tokens beside each token, as OpenAI has it


@dataclass
class Format:
    """What the reply must look like. kind: of `value`; strict: whether a schema must be followed to the letter."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "lark"]
    value: Any = None
    strict: bool = True
    path: str = "response_format"  # of the field that asks for it


@dataclass
class Talk:
    """A conversation to be answered.

    messages: as Model.chat_prompt takes them. tools: OpenAI's, functions alone. tool_choice: "auto", "required", "none"
    or the name of a function. parallel: whether a reply may hold several calls. thinking: None leaves it to the model.
    n: how many replies.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str = "auto"
    parallel: bool = True
    thinking: bool | None = None
    thinking_budget: int | None = None
    format: Format | None = None
    max_tokens: int | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: list[str] = field(default_factory=list)
    logprobs: int | None = None
    n: int = 1
    paths: dict[str, str] = field(
        default_factory=dict
    )  # what a field is called in this surface, if otherwise

    async def ask(self, served: Served, namespace: str = "", priority: int = 0) -> Ask:
        """What the engine is asked. ApiError 400 names the field that cannot be."""
        return await served.work(self._ask, served, namespace, priority)

    async def prompt(self, served: Served) -> list[int]:
        """The token ids of the conversation."""
        return await served.work(self._prompt, served)

    def _prompt(self, served: Served) -> list[int]:
        tools = self.tools if self.tools else None
        try:
            return served.model.chat_prompt(self.messages, self.thinking, tools)
        except ValueError as error:
            raise ApiError(400, str(error), param=self.paths.get("messages", "messages")) from None

    def _ask(self, served: Served, namespace: str, priority: int) -> Ask:
        tools = self._tool_set(served)
        grammar = self._grammar(served, tools) if self.format or tools else None
        ids = self._prompt(served)
        seed = self.sampling.get("seed")
        return Ask(
            [ids] * self.n,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            seeds=None if seed is None else [(seed + i) % (1 << 64) for i in range(self.n)],
            stop=self.stop,
            logprobs=self.logprobs,
            grammar=grammar,
            tools=tools,
            thinking_budget=self.thinking_budget,
            namespace=namespace,
            priority=priority,
        )

    def _tool_set(self, served: Served) -> ToolSet | None:
        if not self.tools:
            return None
        from ..text.tools import ToolSet, format_of

        try:
            return ToolSet(self.tools, format_of(served.model.chat_template.source), MOST_NAME)
        except ValueError as error:
            raise self._error("tools", str(error)) from None

    def _grammar(self, served: Served, tools: ToolSet | None) -> Grammar | None:
        """What the reply must follow, as the format and the tools have it."""
        from ..drivers.grammar import Grammar

        vocabulary, wanted = served.model.vocabulary, self.format
        try:
            answer = None if wanted is None else _grammar_of(vocabulary, wanted)
        except ValueError as error:
            assert wanted is not None
            raise ApiError(
                400, f"{wanted.path}: {error}", param=wanted.path, code="unsupported_schema"
            ) from None
        if tools is None or (self.tool_choice == "auto" and vocabulary.control_id(TOOL_CALL) is None):
            return answer  # a model without that token cannot call, and need not
        named = self.tool_choice if self.tool_choice not in ("auto", "required", "none") else None
        choice: Any = "auto" if named is not None else self.tool_choice
        try:
            return Grammar.tools(vocabulary, tools, choice, name=named, parallel=self.parallel, answer=answer)
        except ValueError as error:
            raise self._error("tools", str(error)) from None

    def _error(self, name: str, reason: str) -> ApiError:
        path = self.paths.get(name, name)
        return ApiError(400, f"{path}: {reason}", param=path)


def _grammar_of(vocabulary: Vocabulary, wanted: Format) -> Grammar:
    """The grammar of a format. ValueError if it cannot be enforced."""
    from ..drivers.grammar import Grammar

    if wanted.kind == "json_object":
        return Grammar.json_object(vocabulary)
    if wanted.kind == "json_schema":
        return Grammar.json_schema(vocabulary, wanted.value, wanted.strict)
    if wanted.kind == "regex":
        return Grammar.regex(vocabulary, wanted.value)
    if wanted.kind == "choice":
        return Grammar.choice(vocabulary, wanted.value)
    return Grammar.lark(vocabulary, wanted.value)


# ----------------------------------------------------------------------------
# Fields that several surfaces have


def sampling_of(fields: Fields) -> SamplingOptions:
    """How tokens are chosen: the names of OpenAI, and of llama.cpp and vLLM where those have none."""
    sampling: SamplingOptions = {
        "temperature": fields.number("temperature", 0, 100),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": _top_k(fields),
        "min_p": fields.number("min_p", 0, 1),
        "presence_penalty": fields.number("presence_penalty", -100, 100),
        "frequency_penalty": fields.number("frequency_penalty", -100, 100),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
        "logit_bias": _logit_bias(fields),
        "seed": seed_of(fields),
    }
    if "repeat_penalty" in fields:  # llama.cpp's name
        sampling["repetition_penalty"] = fields.number("repeat_penalty", 0.01, 100)
    return sampling


def seed_of(fields: Fields) -> int | None:
    """The seed; a negative one counts from the end of the 64-bit numbers."""
    seed = fields.whole("seed", -(1 << 63), (1 << 64) - 1)
    return None if seed is None else seed % (1 << 64)


def _top_k(fields: Fields) -> int | None:
    top_k = fields.whole("top_k", -1, 1 << 31)
    return 0 if top_k == -1 else top_k  # -1 is vLLM's word for all


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    bias = fields.object("logit_bias")
    if bias is None:
        return None
    found = {}
    names = list(fields.raw("logit_bias"))
    if len(names) > 4096:
        raise fields.error("logit_bias", f"has {len(names)} entries, more than 4096")
    for name in names:
        value = bias.number(name, -1e4, 1e4)
        if value:  # a bias of 0 changes nothing, whatever it is for
            if not name.isascii() or not name.isdigit() or len(name) > 10:
                raise bias.error(name, "is no token id")
            found[int(name)] = value
    return found


def refuse_foreign_sampling(fields: Fields) -> None:
    """Samplers that other servers have and this one has not: what they are asked for would silently not happen."""
    others: dict[str, tuple[Any, ...]] = {
        "mirostat": (0,), "typical_p": (1, 1.0), "tfs_z": (1, 1.0), "dry_multiplier": (0, 0.0),
        "xtc_probability": (0, 0.0), "dynatemp_range": (0, 0.0), "use_beam_search": (False,),
        "ignore_eos": (False,), "min_tokens": (0,), "best_of": (1,), "length_penalty": (1, 1.0),
        "bad_words": ([],), "allowed_token_ids": ([],), "stop_token_ids": ([],), "min_length": (0,),
        "n_probs": (0,), "top_n_sigma": (-1, -1.0), "logits_processors": ([],), "prompt_logprobs": (),
    }  # fmt: skip
    for name, off in others.items():
        fields.refuse(name, "this server has no such sampler", unless=off)


def stops_of(fields: Fields, name: str = "stop") -> list[str]:
    """Texts that end a reply."""
    stops = fields.texts(name, MOST_STOPS, []) or []
    if any(not stop for stop in stops):
        raise fields.error(name, "holds an empty text")
    if any(len(stop) > 1024 for stop in stops):
        raise fields.error(name, "holds a text of more than 1024 characters")
    return stops


# ----------------------------------------------------------------------------
# What came


@dataclass
class Answer:
    """One reply, put together of its updates. reasoning_tokens: how many were thought. events: with log-probabilities."""

    reply: Reply = field(default_factory=Reply)
    reasoning_tokens: int = 0
    tokens: int = 0
    events: list[Event] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Take in the next event."""
        self.reply.add(event)
        self.tokens += event.token is not None
        self.reasoning_tokens += event.thinking and event.token is not None
        if event.logprob is not None:
            self.events.append(event)

    @property
    def finish(self) -> Finish:
        """Why it ended, in OpenAI's words."""
        if self.reply.tool_calls and self.reply.finish_reason == "stop":
            return "tool_calls"
        return "length" if self.reply.finish_reason == "length" else "stop"


async def answers(stream: Stream) -> list[Answer]:
    """The whole replies of a stream."""
    found = [Answer() for _ in stream.jobs]
    async for update in stream:
        if update.event is not None:
            found[update.index].add(update.event)
    return found


def usage(stream: Stream, found: Sequence[Answer], n: int = 1) -> dict[str, Any]:
    """Tokens, in OpenAI's words. n: replies to each prompt, which counts once."""
    stats = stream.stats[::n]
    prompt = sum(one.prompt_tokens for one in stats)
    completion = sum(one.tokens for one in found)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in stats)},
        "completion_tokens_details": {"reasoning_tokens": sum(one.reasoning_tokens for one in found)},
    }


def timings(stream: Stream) -> dict[str, Any]:
    """How fast the first reply was, in llama.cpp's words."""
    stats = stream.stats[0]
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": stats.read_tokens,
        "prompt_ms": round(1000 * stats.prefill_seconds, 3),
        "prompt_per_second": round(stats.prefill_rate, 3),
        "predicted_n": stats.generated_tokens,
        "predicted_ms": round(1000 * stats.decode_seconds, 3),
        "predicted_per_second": round(stats.decode_rate, 3),
    }


def is_update_of_reply(update: Update) -> bool:
    """Whether the update brought a token, and not only word of waiting."""
    return update.event is not None
