"""A conversation that is to be answered, in the words that chat completions, responses and messages share.

body of a surface -> Talk -> prompt tokens, tools, grammar -> Ask -> Stream -> Answer -> body of the surface
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..drivers.reply import ContextFullError, Event, Reply, Stats, Vocabulary
from ..drivers.sampler import SamplingOptions
from ..drivers.score import TokenScore
from ..text.chat import END_THINK, THINK, TOOL_CALL, last_control_token
from ..text.tokenizer import TooLongError
from .ask import Ask, Progress, Stream
from .errors import ApiError, context_error
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
    """What the reply must look like. kind: of `value`; strict: whether a schema must be followed to the
    letter.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "lark"]
    value: Any = None
    strict: bool = True
    path: str = "response_format"  # of the field that asks for it

    def grammar(self, vocabulary: Vocabulary) -> Grammar:
        """What a reply must follow to look like it. ApiError 400 if it cannot be enforced."""
        try:
            return _grammar_of(vocabulary, self)
        except ValueError as error:
            raise ApiError(400, f"{self.path}: {error}", param=self.path, code="unsupported_schema") from None


@dataclass
class Talk:
    """A conversation to be answered.

    messages: as Model.chat_prompt takes them. tools: OpenAI's, functions alone. tool_choice: "auto",
    "required", "none" or the name of a function. parallel: whether a reply may hold several calls. thinking:
    None leaves it to the model. n: how many replies. continues: the last message is the assistant's,
    unfinished, and the reply goes on with it.
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
    continues: bool = False
    paths: dict[str, str] = field(
        default_factory=dict
    )  # what a field is called in this surface, if otherwise

    async def ask(self, served: Served, namespace: str = "", priority: int = 0) -> Ask:
        """What the engine is asked. ApiError 400 names the field that cannot be."""
        return await served.work(self._ask, served, namespace, priority)

    async def prompt(self, served: Served) -> list[int]:
        """The token ids of the conversation, however many."""
        return await served.work(self._prompt, served)

    def _prompt(self, served: Served, most: int | None = None) -> list[int]:
        """most: ApiError 400 as soon as it is known that there are more."""
        tools = self.tools if self.tools else None
        messages = self.messages[:-1] if self.continues else self.messages
        where = self.paths.get("messages", "messages")
        try:
            ids = served.model.chat_prompt(messages, self.thinking, tools, most)
            return ids + self._unfinished(served, ids) if self.continues else ids
        except TooLongError as error:
            raise too_long(error, served, where) from None
        except ValueError as error:
            raise ApiError(400, str(error), param=where) from None

    def _unfinished(self, served: Served, before: list[int]) -> list[int]:
        """The tokens of the message that the reply goes on with, as the model would have said them."""
        tokenizer, message = served.model.tokenizer, self.messages[-1]
        thought, said = message.get("reasoning_content") or "", message["content"]
        begin, end = tokenizer.control_id(THINK), tokenizer.control_id(END_THINK)
        ids: list[int] = []
        if thought and begin is not None and end is not None:
            ids = [] if last_control_token(tokenizer, before) == begin else [begin, *tokenizer.encode("\n")]
            ids += tokenizer.encode(thought)
            if said:
                ids += [*tokenizer.encode("\n"), end, *tokenizer.encode("\n\n")]
        return ids + tokenizer.encode(said) if said else ids

    def _ask(self, served: Served, namespace: str, priority: int) -> Ask:
        tools = self._tool_set(served)
        grammar = self._grammar(served, tools) if self.format or tools else None
        ids = self._prompt(served, served.context)
        return Ask(
            [ids] * self.n,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            seeds=seeds_of(self.sampling, self.n),
            stop=self.stop,
            logprobs=self.logprobs,
            grammar=grammar,
            tools=tools if self.tool_choice != "none" else None,
            thinking_budget=self.thinking_budget,
            namespace=namespace,
            priority=priority,
            origin=self.paths.get("messages", "messages"),
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

        vocabulary = served.model.vocabulary
        answer = None if self.format is None else self.format.grammar(vocabulary)
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


def stream_of(fields: Fields) -> tuple[bool, bool]:
    """(whether the answer comes piece by piece, whether the usage comes last)."""
    streams = fields.flag("stream", False) or False
    options = fields.object("stream_options")
    if options is None:
        return streams, False
    if not streams:
        raise fields.error("stream_options", "needs stream to be true")
    usage = options.flag("include_usage", False) or False
    options.ignore("include_obfuscation", "continuous_usage_stats")
    options.finish()
    return streams, usage


def prompts_of(fields: Fields, name: str, n_tokens: int) -> list[str | list[int]]:
    """A text, a list of texts, token ids, or a list of lists of token ids: the prompts, of one kind.

    n_tokens: ids are below it. ApiError 400 if there is no prompt.
    """
    value = fields.raw(name)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise fields.error(name, "is neither a text, nor token ids, nor a list of those")
    if not value:
        raise fields.error(name, "is empty")
    if all(isinstance(item, str) for item in value):
        return list(value)
    if all(isinstance(item, list) for item in value):
        return [_ids(fields, f"{name}[{i}]", item, n_tokens) for i, item in enumerate(value)]
    return [_ids(fields, name, value, n_tokens)]


def ids_of(fields: Fields, name: str, n_tokens: int) -> list[int]:
    """Token ids, which are below n_tokens; none at all will do."""
    found = fields.items(name, LARGEST)
    if found is None:
        raise fields.error(name, "is missing")
    return _ids(fields, name, found, n_tokens)


def _ids(fields: Fields, name: str, value: list[Any], n_tokens: int) -> list[int]:
    for i, id in enumerate(value):
        if type(id) is not int or not 0 <= id < n_tokens:
            raise fields.error(
                f"{name}[{i}]", f"is no token id, which is a whole number from 0 to {n_tokens - 1}"
            )
    return value


def sampling_of(fields: Fields, n_tokens: int = 1 << 32) -> SamplingOptions:
    """How tokens are chosen: the names of OpenAI, and of llama.cpp and vLLM where those have none.

    n_tokens: of the model; a bias is for an id below it.
    """
    sampling: SamplingOptions = {
        "temperature": fields.number("temperature", 0, 100),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": _top_k(fields),
        "min_p": fields.number("min_p", 0, 1),
        "presence_penalty": fields.number("presence_penalty", -100, 100),
        "frequency_penalty": fields.number("frequency_penalty", -100, 100),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
        "logit_bias": _logit_bias(fields, n_tokens),
        "seed": seed_of(fields),
    }
    if "repeat_penalty" in fields:  # llama.cpp's name
        sampling["repetition_penalty"] = fields.number("repeat_penalty", 0.01, 100)
    return sampling


def seeds_of(sampling: SamplingOptions, n: int) -> list[int] | None:
    """A seed for each of n replies to a prompt: the sampling's, and those that follow it."""
    seed = sampling.get("seed")
    return None if seed is None else [(seed + i) % (1 << 64) for i in range(n)]


def seed_of(fields: Fields) -> int | None:
    """The seed; a negative one counts from the end of the 64-bit numbers."""
    seed = fields.whole("seed", -(1 << 63), (1 << 64) - 1)
    return None if seed is None else seed % (1 << 64)


def _top_k(fields: Fields) -> int | None:
    top_k = fields.whole("top_k", -1, 1 << 31)
    return 0 if top_k == -1 else top_k  # -1 is vLLM's word for all


def _logit_bias(fields: Fields, n_tokens: int) -> dict[int, float] | None:
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
            if not name.isascii() or not name.isdigit() or len(name) > 10 or int(name) >= n_tokens:
                raise bias.error(name, "is no token id")
            found[int(name)] = value
    return found


def format_of(fields: Fields) -> Format | None:
    """What the reply must look like: OpenAI's response_format, or vLLM's and
    llama.cpp's words for more than JSON.
    """
    found = []
    wanted = fields.object("response_format")
    if wanted is not None:
        kind = wanted.text(
            "type", "text", choices=("text", "json_object", "json_schema", "regex", "choice", "lark")
        )
        if kind == "json_object":
            schema = wanted.raw("schema")  # llama.cpp puts one here
            found.append(Format("json_object") if schema is None else Format("json_schema", schema))
        elif kind == "json_schema":
            inner = wanted.object("json_schema")
            if inner is None or "schema" not in inner:
                raise wanted.error("json_schema.schema", "is missing")
            inner.text("name")
            inner.text("description")
            path = "response_format.json_schema.schema"
            schema = inner.raw("schema")
            found.append(Format("json_schema", schema, inner.flag("strict", False) or False, path))
        elif kind != "text":
            path = f"response_format.{kind}"
            value = wanted.texts(kind, 4096) if kind == "choice" else wanted.text(str(kind))
            if not value:
                raise wanted.error(str(kind), "is missing")
            found.append(Format(kind, value, path=path))  # type: ignore[arg-type]
    fields.refuse("grammar", "use response_format of type lark")
    for name in ("guided_json", "json_schema"):
        if name in fields:
            found.append(Format("json_schema", fields.raw(name), path=name))
    if "guided_regex" in fields:
        found.append(Format("regex", fields.text("guided_regex"), path="guided_regex"))
    if "guided_choice" in fields:
        found.append(Format("choice", fields.texts("guided_choice", 4096), path="guided_choice"))
    fields.refuse("guided_grammar", "use response_format of type lark")
    fields.refuse("structured_outputs", "use response_format")
    if len(found) > 1:
        raise ApiError(400, f"{found[0].path} and {found[1].path} are two formats", param=found[1].path)
    return found[0] if found else None


def refuse_foreign_sampling(fields: Fields) -> None:
    """What other servers do and this one does not: it would silently not happen."""
    others: dict[str, tuple[Any, ...]] = {
        "mirostat": (0,), "typical_p": (1, 1.0), "tfs_z": (1, 1.0), "dry_multiplier": (0, 0.0),
        "xtc_probability": (0, 0.0), "dynatemp_range": (0, 0.0), "use_beam_search": (False,),
        "ignore_eos": (False,), "min_tokens": (0,), "best_of": (1,), "length_penalty": (1, 1.0),
        "bad_words": ([],), "allowed_token_ids": ([],), "stop_token_ids": ([],), "min_length": (0,),
        "n_probs": (0,), "top_n_sigma": (-1, -1.0), "logits_processors": ([],), "prompt_logprobs": (),
        "include_stop_str_in_output": (False,), "skip_special_tokens": (False,), "truncate_prompt_tokens": (),
        "n_predict": (-1,), "detokenize": (True,), "lora": ([],), "samplers": (),
    }  # fmt: skip
    for name, off in others.items():
        fields.refuse(name, "this server does not do that", unless=off)


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
    """One reply, put together of its updates.

    reasoning_tokens: how many were thought. ids: of its tokens. events: those with log-probabilities. scores:
    of the prompt, if they were asked for.
    """

    reply: Reply = field(default_factory=Reply)
    reasoning_tokens: int = 0
    ids: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    scores: list[TokenScore] | None = None

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.ids)

    def add(self, event: Event) -> None:
        """Take in the next event."""
        self.reply.add(event)
        if event.token is not None:
            self.ids.append(event.token)
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
        if update.scores is not None:
            found[update.index].scores = update.scores
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
        "draft_n": stats.drafted_tokens,
        "draft_n_accepted": stats.accepted_tokens,
    }


def progress_of(progress: Progress) -> dict[str, Any]:
    """Where a sequence is before its first token: llama.cpp's prompt_progress, with the stage."""
    return {
        "total": progress.total, "cache": progress.cached, "processed": progress.processed,
        "time_ms": round(progress.ms, 3), "stage": progress.stage, "position": progress.position,
    }  # fmt: skip


def prompt_usage(stats: Sequence[Stats]) -> dict[str, Any]:
    """Tokens of prompts without replies, in OpenAI's words."""
    prompt = sum(one.prompt_tokens for one in stats)
    cached = sum(one.cached_tokens for one in stats)
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def too_long(error: TooLongError, served: Served, path: str) -> ApiError:
    """A text that is known not to fit before all of it is read. path: of the field."""
    told = f"the prompt is at least {error.n} tokens, the context holds {served.context}"
    return context_error(error.n, served.context, path, told)


def recipe_error(path: str, error: ValueError) -> ApiError:
    """A text that cannot become a prompt: it is too long, or the model lacks a token. path: of the field."""
    told = f"{path}: {error}"
    if isinstance(error, ContextFullError):
        return context_error(error.n_prompt, error.context, path, told)
    return ApiError(400, told, param=path)
