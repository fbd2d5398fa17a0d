"""POST /v1/completions: how a model goes on from bare texts or token ids, and how likely it finds them.

There is no template and there are no roles: what the client sends is what the model reads, and no tag in the
reply means anything. With `echo` and `logprobs` the answer has the log-probability of every token of the
prompts, as lm-eval's local-completions takes them. docs/SERVING.md lists what is taken, ignored and refused.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...drivers.reply import Event
from ...drivers.sampler import SamplingOptions
from ...text.tokenizer import Tokenizer, TooLongError
from ..api import FINGERPRINT, Api
from ..ask import Ask, Stream, Update
from ..errors import ApiError
from ..fields import Fields
from ..models import Served
from ..streams import COMMENT, DONE, data
from ..talk import (
    LARGEST,
    MOST_REPLIES,
    MOST_TOP,
    Answer,
    Format,
    answers,
    format_of,
    progress_of,
    prompts_of,
    refuse_foreign_sampling,
    sampling_of,
    seeds_of,
    stops_of,
    stream_of,
    timings,
    too_long,
    usage,
)  # fmt: skip

IGNORED = (
    "user", "metadata", "cache_prompt", "id_slot", "timings_per_token", "keep_alive",
    "spaces_between_special_tokens",
    "request_id",
)  # fmt: skip
MAX_TOKENS = 16  # where the client says nothing, as OpenAI has it
Score = tuple[
    int, float | None, Sequence[tuple[int, float]]
]  # token, its log-probability, the most likely there


def routes(api: Api) -> list[Route]:
    """The endpoint."""

    async def complete(request: Request) -> Response:
        fields = await api.fields(request)
        served = await api.models.get(fields.text("model"))
        wanted = read(fields, served)
        client = api.client(request)
        priority = api.priority(request, fields)
        ignored = fields.finish()
        prompts = await served.work(wanted.tokenized, served)
        ask = await served.work(wanted.ask, served, prompts, client.name, priority)
        headers = api.headers(served, ignored, ask)
        stream = await served.submit(ask, client.limits)
        completion = Completion(f"cmpl-{api.request_id(request)}", served, wanted, prompts, stream)
        return await api.answer(request, served, completion, wanted.streams, headers)

    return [Route("/v1/completions", complete, methods=["POST"])]


# ----------------------------------------------------------------------------
# The request


@dataclass(frozen=True)
class Prompt:
    """A prompt: its token ids and its text. hidden: how many tokens at the beginning are not in the text."""

    ids: list[int]
    text: str
    hidden: int = 0


@dataclass
class Wanted:
    """The request. prompts: texts or token ids; n replies to each. logprobs: how many of the most likely
    tokens.

    special: whether the text of a control token in a prompt is that token. opens: whether a text begins with
    what the vocabulary puts before one.
    """

    prompts: list[str | list[int]]
    n: int
    max_tokens: int
    echo: bool
    logprobs: int | None
    sampling: SamplingOptions
    stop: list[str]
    format: Format | None
    streams: bool
    usage: bool
    progress: bool
    token_ids: bool  # whether the ids of prompts and replies are given
    names_ids: bool  # whether tokens are called by their ids in logprobs
    special: bool
    opens: bool

    @property
    def scores(self) -> bool:
        """Whether the log-probabilities of the prompts' tokens are wanted."""
        return self.echo and self.logprobs is not None

    def tokenized(self, served: Served) -> list[Prompt]:
        """All prompts. ApiError 400 if one of them is empty or does not fit."""
        found, tokenizer = [], served.model.tokenizer
        for i, prompt in enumerate(self.prompts):
            path = "prompt" if len(self.prompts) == 1 else f"prompt[{i}]"
            if isinstance(prompt, str):
                found.append(self._of_text(served, prompt, path))
            else:
                found.append(Prompt(prompt, tokenizer.decode(prompt) if self.echo else ""))
            if not found[-1].ids:
                raise ApiError(400, f"{path} is empty: there is nothing to go on from", param=path)
        return found

    def _of_text(self, served: Served, text: str, path: str) -> Prompt:
        tokenizer = served.model.tokenizer
        opening = tokenizer.opening if self.opens else []
        try:
            ids = tokenizer.encode(text, self.special, served.context)
        except TooLongError as error:
            raise too_long(error, served, path) from None
        except ValueError as error:
            raise ApiError(400, f"{path}: {error}", param=path) from None
        if opening and ids[: len(opening)] == opening:  # the client has put it there
            opening = []
        return Prompt([*opening, *ids], text, len(opening))

    def ask(self, served: Served, prompts: Sequence[Prompt], namespace: str, priority: int) -> Ask:
        """What the engine is asked: n sequences for the first prompt, n for the second, ..."""
        seeds = seeds_of(self.sampling, self.n)
        return Ask(
            [prompt.ids for prompt in prompts for _ in range(self.n)],
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            seeds=None if seeds is None else seeds * len(prompts),
            stop=self.stop,
            logprobs=self.logprobs,
            grammar=self.format.grammar(served.bare_vocabulary) if self.format is not None else None,
            bare=True,
            echo=self.logprobs if self.scores else None,
            namespace=namespace,
            priority=priority,
            origin="prompt",
        )


def read(fields: Fields, served: Served) -> Wanted:
    """What the fields ask for. ApiError 400 names a field that is wrong or not supported."""
    if "prompt" not in fields:
        raise fields.error("prompt", "is missing")
    n_tokens = served.model.config.n_tokens
    streams, wants_usage = stream_of(fields)
    max_tokens = fields.whole("max_tokens", 0, LARGEST, MAX_TOKENS)
    wanted = Wanted(
        prompts_of(fields, "prompt", n_tokens),
        n=fields.whole("n", 1, MOST_REPLIES, 1) or 1,
        max_tokens=MAX_TOKENS if max_tokens is None else max_tokens,
        echo=fields.flag("echo", False) or False,
        logprobs=fields.whole("logprobs", 0, MOST_TOP),
        sampling=sampling_of(fields, n_tokens),
        stop=stops_of(fields),
        format=format_of(fields),
        streams=streams,
        usage=wants_usage,
        progress=fields.flag("return_progress", False) or False,
        token_ids=fields.flag("return_token_ids", False) or False,
        names_ids=fields.flag("return_tokens_as_token_ids", False) or False,
        special=fields.flag("parse_special", True) is not False,
        opens=fields.flag("add_special_tokens", True) is not False,
    )
    fields.ignore(*IGNORED)
    fields.refuse("suffix", "the model goes on from a text, it does not fill a gap", unless=("",))
    fields.refuse("prompt_embeds", "use prompt")
    fields.refuse("messages", "use /v1/chat/completions")
    fields.refuse("max_completion_tokens", "use max_tokens")
    refuse_foreign_sampling(fields)
    return wanted


# ----------------------------------------------------------------------------
# The answer


@dataclass
class Completion:
    """The answer to a request, whole or in chunks. id: of the answer."""

    id: str
    served: Served
    wanted: Wanted
    prompts: list[Prompt]
    stream: Stream
    ping: str = COMMENT

    def __post_init__(self) -> None:
        self._created = int(time.time())
        self._tokenizer = self.served.model.tokenizer
        self._tokens = [Tokens(self._tokenizer, self.wanted.names_ids) for _ in self.stream.jobs]

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is sent at once."""
        return await self.served.work(self._whole, await answers(self.stream))

    def _whole(self, found: Sequence[Answer]) -> dict[str, Any]:
        choices = []
        for i, answer in enumerate(found):
            parts = [self._beginning(i, answer)] if self.wanted.echo else []
            parts += [self._scored(i, answer.events)]
            choice = self._choice(i, answer.reply.text, joined(parts), answer.finish)
            if self.wanted.echo:
                choice["text"] = self._prompt(i).text + choice["text"]
            choices.append(self._with_ids(choice, answer.ids, begins=True))
        tokens = usage(self.stream, found, self.wanted.n)
        return self._head() | {"choices": choices, "usage": tokens, "timings": timings(self.stream)}

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer in chunks: what is echoed, what comes, why each reply ended, the usage if it is wanted,
        [DONE].
        """
        found = [Answer() for _ in self.stream.jobs]
        if (self.wanted.token_ids or self.wanted.echo) and not self.wanted.scores:
            yield "".join(self._echo(i, answer) for i, answer in enumerate(found))
        async for first in self.stream:
            texts = [self._chunk(update, found) for update in (first, *self.stream.ready())]
            if any(texts):
                yield "".join(texts)
        if self.wanted.usage:
            tokens = usage(self.stream, found, self.wanted.n)
            yield data(self._head() | {"choices": [], "usage": tokens, "timings": timings(self.stream)})
        yield DONE

    def failed(self, error: ApiError) -> str:
        """The chunk of an answer that breaks off."""
        return data(error.openai())

    def _chunk(self, update: Update, found: Sequence[Answer]) -> str:
        """The chunk that an update makes; "" for none."""
        i, answer = update.index, found[update.index]
        if update.scores is not None:
            answer.scores = update.scores
            return self._echo(i, answer)
        if update.progress is not None and self.wanted.progress:
            choice = self._choice(i, "", None, None)
            return data(self._head() | {"choices": [choice], "prompt_progress": progress_of(update.progress)})
        event = update.event
        if event is None:
            return ""
        answer.add(event)
        finish = answer.finish if event.finish_reason is not None else None
        logprobs = self._scored(i, [event] if event.logprob is not None else [])
        if not (event.text or finish or self.wanted.token_ids or (logprobs and logprobs["tokens"])):
            return ""
        choice = self._choice(i, event.text, logprobs, finish)
        ids = [] if event.token is None else [event.token]
        return data(self._head() | {"choices": [self._with_ids(choice, ids)]})

    def _echo(self, index: int, answer: Answer) -> str:
        """The chunk with what comes before the reply: the prompt, if it is echoed."""
        text = self._prompt(index).text if self.wanted.echo else ""
        logprobs = self._beginning(index, answer) if self.wanted.echo else None
        choice = self._with_ids(self._choice(index, text, logprobs, None), [], begins=True)
        return data(self._head() | {"choices": [choice]})

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self._created, "model": self.served.name,
            "system_fingerprint": FINGERPRINT,
        }  # fmt: skip

    def _choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _with_ids(self, choice: dict[str, Any], ids: list[int], begins: bool = False) -> dict[str, Any]:
        """The choice with token ids, if they are wanted: vLLM's fields. begins: whether it is the choice's
        first chunk.
        """
        if self.wanted.token_ids:
            choice["token_ids"] = ids
            if begins:
                choice["prompt_token_ids"] = self._prompt(choice["index"]).ids
        return choice

    def _prompt(self, index: int) -> Prompt:
        """The prompt of a choice."""
        return self.prompts[index // self.wanted.n]

    def _beginning(self, index: int, answer: Answer) -> dict[str, Any] | None:
        """The log-probabilities of the prompt's tokens."""
        if answer.scores is None:
            return None
        scores = [(one.token, one.logprob, one.top) for one in answer.scores]
        return self._tokens[index].of_prompt(scores, self._prompt(index))

    def _scored(self, index: int, events: Sequence[Event]) -> dict[str, Any] | None:
        """The log-probabilities of the reply's tokens that the events brought."""
        if self.wanted.logprobs is None:
            return None
        scores = [(e.token, e.logprob, e.top_logprobs or ()) for e in events if e.token is not None]
        return self._tokens[index].take(scores)


class Tokens:
    """The tokens of one choice with their log-probabilities, in the shape of OpenAI's completions, as they
    come.

    names_ids: whether a token is called by its id. A text_offset is the place in the choice's text where a
    token begins.
    """

    def __init__(self, tokenizer: Tokenizer, names_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._names_ids = names_ids
        self._decoder = tokenizer.stream()
        self._offset = 0

    def of_prompt(self, scores: Sequence[Score], prompt: Prompt) -> dict[str, Any] | None:
        """The tokens of a prompt whose text is echoed."""
        hidden, end = prompt.hidden, len(prompt.text)
        found = joined([self.take(scores[:hidden], shows=False), self.take(scores[hidden:])])
        assert found is not None
        found["text_offset"] = [min(offset, end) for offset in found["text_offset"]]  # if it was normalised
        self._decoder, self._offset = self._tokenizer.stream(), end
        return found

    def take(self, scores: Iterable[Score], shows: bool = True) -> dict[str, Any]:
        """The next tokens. shows: whether they are in the text."""
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for id, logprob, top in scores:
            found["tokens"].append(self._name(id))
            found["text_offset"].append(self._offset)
            if logprob is None:  # nothing comes before it
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
            else:
                found["token_logprobs"].append(bounded(logprob))
                found["top_logprobs"].append(self._named([*top, (id, logprob)]))
            if shows:
                self._offset += len(self._decoder.push(id))
        return found

    def _named(self, top: Iterable[tuple[int, float]]) -> dict[str, float]:
        named: dict[str, float] = {}
        for id, logprob in top:
            named.setdefault(self._name(id), bounded(logprob))
        return named

    def _name(self, id: int) -> str:
        """The text of a token; its bytes, as OpenAI writes them, where they are no whole characters."""
        if self._names_ids:
            return f"token_id:{id}"
        raw = self._tokenizer.token_bytes(id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def bounded(logprob: float) -> float:
    """A log-probability as JSON can hold it: -9999 is OpenAI's word for a token that cannot come."""
    return max(logprob, -9999.0)


def joined(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Log-probabilities of tokens that follow each other; None if there are none."""
    found = [part for part in parts if part is not None]
    return {name: [value for part in found for value in part[name]] for name in found[0]} if found else None
