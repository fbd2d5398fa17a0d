"""The public Model: the engine with its tokenizer, its chat template and the token loop."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .drivers import retrieval
from .drivers.batch import RUNNING, CachedSession, alike_together, drive
from .drivers.draft import Drafting
from .drivers.generate import AnswerOptions, Generation, ReplyOptions
from .drivers.grammar import Grammar
from .drivers.reply import (
    Event,
    Mask,
    Reply,
    ReplySettings,
    ReplyState,
    Vocabulary,
    token_budget,
    token_ids,
    whole,
)
from .drivers.sampler import Sampling, SamplingOptions, default_sampling
from .engine import KV, Activations, Engine, Logits, Session
from .format import ModelFileError
from .kernels.table import all_finite
from .memory import check_space_for_model, gib
from .system import names
from .text.chat import END_THINK, ChatTemplate, last_control_token, may_think
from .text.template import Renderer
from .text.tokenizer import BackgroundTokenizer, Tokenizer
from .text.tools import ToolSet, format_of

if sys.version_info >= (3, 11):
    from typing import Self, Unpack
elif TYPE_CHECKING:
    from typing_extensions import Self, Unpack


if TYPE_CHECKING:
    from .hub.download import Progress

CONSTRAINTS = ("schema", "regex", "choice", "grammar")  # options of which a call may have one


class Model(Engine):
    """A model.bin, ready to be asked.

    path: the file. threads: None for as many as this machine can feed. kv: the KV cache, "f16", "f32" or
    "int8".
    activations: "int8", or "float32" to compare with other implementations. huge_pages: copy the weights into
    memory of large pages (memory.in_huge_pages says what that costs and gains). renderer: a
    Renderer of chat templates that runs already, to share; None starts one when needed.
    ModelFileError, one line, if the file is not a model.bin that this version can run. MemoryError where
    `ulimit -v` leaves too little address space.

    config: the numbers of the model, such as config.n_layers and config.context. metadata: what else the file
    says of it, such as metadata["name"]. file: the mapped file itself. closed: whether close() was called.
    kv_bytes: bytes of KV cache that its sessions hold, those of a block that several share once.
    kv_block_bytes: bytes of one such block.

    Threads may share a model: calls take turns. A pickle holds the path and the options, so unpickling, in
    another process too, opens the file again; so does copying. `with Model(path) as model:` closes it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        kv: KV = "f16",
        activations: Activations = "int8",
        huge_pages: bool = False,
        *,
        renderer: Renderer | None = None,
    ) -> None:
        super().__init__(path, threads, kv, activations, huge_pages)
        try:
            self.sampling(thinking=False)
            self.sampling(thinking=True)
        except ValueError as error:
            raise ModelFileError(f"{self.path}: metadata: generation: {error}") from None
        check_space_for_model(self.config, len(self.file.tokenizer), self.threads)
        self._options = (threads, kv, activations, huge_pages)
        self._tokenizer = BackgroundTokenizer(self.file)
        self._renderer = renderer or Renderer()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # check the arguments here: Engine would open the file before __init__ refuses them
        _check_keywords(cls.__init__, kwargs, (), cls.__name__)
        try:
            inspect.signature(cls.__init__).bind(None, *args, **kwargs)
        except TypeError as error:
            reason = str(error).replace("missing a required", "missing 1 required positional")
            raise TypeError(f"{cls.__name__}() {reason}") from None
        return super().__new__(cls, *args, **kwargs)

    @classmethod
    def from_hub(
        cls,
        name: str,
        threads: int | None = None,
        kv: KV = "f16",
        activations: Activations = "int8",
        huge_pages: bool = False,
        *,
        bits: str = "8",
        progress: Progress | None = None,
    ) -> Self:
        """The model of a name on the Hugging Face Hub, such as "Qwen/Qwen3-0.6B", fetched and converted once.

        name: OWNER/NAME, with @REVISION, and :FILE.gguf for a GGUF file; a file of that name here wins. bits:
        about how many a weight takes, as --bits of export.py has them. progress: told (what is done, bytes
        done, bytes in all, 0 if unknown). The rest as for Model. ValueError, one line, for what cannot be had
        or converted; ImportError if the extra `hub` is needed and not installed.
        """
        given = None if os.path.exists(name) else names.parse(name)
        if given is None:
            return cls(name, threads, kv, activations, huge_pages)
        from .hub import obtain

        path = obtain.model(given, str(bits), progress or obtain.ignore)
        return cls(path, threads, kv, activations, huge_pages)

    def __repr__(self) -> str:
        size = (
            f"{gib(self.file.file_size)}, context {self.config.context}, {self.threads} threads, kv {self.kv}"
        )
        return f"<{type(self).__name__} {self.metadata['name']!r}, {'closed' if self.closed else size}>"

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_open()
        return type(self), (os.path.abspath(self.path), *self._options)

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the weights, the buffers, the tokenizer and the process that renders templates.

        A call under way in another thread ends first. A closed model keeps its path, config and metadata; any
        other use of it or its sessions is a ValueError. The memory of a session is freed with the session.
        """
        super().close()
        for name in (
            "_tokenizer",
            "_renderer",
            "chat_template",
            "undefined_tokens",
            "vocabulary",
            "drafting",
        ):
            vars(self).pop(name, None)

    @property
    def tokenizer(self) -> Tokenizer:
        """Text <-> tokens. ModelFileError if the tokenizer.json in the file cannot be read."""
        self._check_open()
        return self._tokenizer.result()

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template; its `thinking` is the model's kind: "hybrid", "always" or "none"."""
        self._check_open()
        names = self.metadata.get("special_tokens", {})
        if not isinstance(names, dict) or not all(isinstance(text, str) for text in names.values()):
            raise ModelFileError(f"{self.path}: metadata: special_tokens is not a table of texts")
        return ChatTemplate(
            self.file.template, self.tokenizer, self.metadata["thinking"], names, self._renderer
        )

    @cached_property
    def undefined_tokens(self) -> list[int]:
        """Ids below config.n_tokens that stand for no token."""
        return self.tokenizer.undefined(self.config.n_tokens)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What a reply must know of this model's tokens."""
        ends = frozenset(self.metadata["eos_token_ids"])
        thinking = self.metadata["thinking"]
        return Vocabulary(self.config.n_tokens, ends, self.undefined_tokens, self.tokenizer, thinking)

    @cached_property
    def drafting(self) -> Drafting:
        """What guesses at the next tokens of replies (drivers/draft.py): their own text, see draft_with."""
        return Drafting(self)

    def draft_with(self, small: Engine) -> None:
        """From now on a smaller model guesses, too, at the next tokens of replies: that changes no token.

        ValueError, one line, if its tokenizer is another one.
        """
        self.drafting = Drafting(self, small)

    # ------------------------------------------------------------------------
    # Text -> text

    def chat(
        self,
        messages: str | Sequence[dict[str, Any]],
        max_tokens: int | None = None,
        *,
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        **options: Unpack[ReplyOptions],
    ) -> Reply:
        """The whole reply to a conversation; str() of it is the answer.

        messages, thinking, tools: see chat_prompt. max_tokens, and options (session, stop, mask, cancel,
        progress, draft, the fields of AnswerOptions and of Sampling): see generate, which has the reply token
        by token. Conversation remembers what was said.
        """
        _check_keywords(Model.chat, options, ReplyOptions.__optional_keys__)
        prompt = self.chat_prompt(messages, thinking, tools)
        if tools and format_of(self.chat_template.source) != "hermes":
            options.setdefault("toolset", ToolSet(tools, format_of(self.chat_template.source)))
        with self.generate(prompt, max_tokens, **options) as generation:
            return generation.result()

    def complete(self, text: str, max_tokens: int | None = 256, **options: Unpack[ReplyOptions]) -> Reply:
        """How the model goes on from a bare text: no template, no roles.

        max_tokens: None for what the context holds; such text need not come to an end. options: session,
        stop, mask, cancel, progress, draft, the fields of AnswerOptions and of Sampling, see generate.
        """
        _check_keywords(Model.complete, options, ReplyOptions.__optional_keys__)
        if not isinstance(text, str):
            raise ValueError(f"text is {type(text).__name__}, not text; generate goes on from token ids")
        with self.generate(self.text_prompt(text), max_tokens, **options) as generation:
            return generation.result()

    # ------------------------------------------------------------------------
    # Text -> tokens -> events

    def text_prompt(self, text: str, most: int | None = None) -> list[int]:
        """Token ids of a bare text, behind the ids that the tokenizer puts before one (Tokenizer.opening).

        most: see Tokenizer.encode.
        """
        return [*self.tokenizer.opening, *self.tokenizer.encode(text, most=most)]

    def chat_prompt(
        self,
        messages: str | Sequence[dict[str, Any]],
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        most: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation, by the model's chat template, ending where the assistant speaks.

        messages: dicts with role ("system", "user", "assistant", "tool") and content (text, None or a
        list of text parts); of an assistant also reasoning_content and tool_calls. A text alone is one
        message of the user.
        thinking: None leaves it to the model (hybrid models think). tools: JSON schemas of functions.
        most: see Tokenizer.encode. No text in messages or tools becomes a control token, except the reply
        tags in what the assistant said. ValueError if a message is malformed, the switch cannot work with
        this model or the template refuses (ChatTemplateError).
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.chat_template.prompt(messages, thinking, tools, most)

    def sampling(self, thinking: bool, **given: Unpack[SamplingOptions]) -> Sampling:
        """Sampling with the given fields, the model's defaults for the others; None counts as not given."""
        _check_keywords(Model.sampling, given, SamplingOptions.__optional_keys__)
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return Sampling(**{**default_sampling(self.metadata, thinking), **chosen})

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int | None = None,
        *,
        session: CachedSession | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        mask: Mask | None = None,
        cancel: Callable[[], bool] | None = None,
        progress: Callable[[int, int], None] | None = None,
        draft: bool = True,
        **options: Unpack[AnswerOptions],
    ) -> Generation:
        """The reply to `prompt` (token ids), as an iterator of events, also `async for`; see Generation.

        max_tokens: None for as many as the context holds. session: a session to use; tokens that it shares
        with the beginning of the prompt are not computed again. stop: texts that end the reply and are not
        part of it. logprobs: None, or how many of the most likely tokens to give with each event. mask: says
        before each token which may come; see reply.Mask. cancel: asked before every token and every piece of
        the prompt; true ends the reply. progress: told (tokens done, tokens in all) of the prompt. draft:
        whether passes may check guesses at several tokens, which changes no token. options: see Sampling and
        AnswerOptions. An answer that is held to a schema, regex, choice or grammar meets it if finish_reason
        is "stop" and no text of `stop` came; one that ended by "length" is the beginning of such an answer.
        ValueError, before anything is computed, if an argument is out of range, an id of the
        prompt is no token, the prompt is longer than the context or a grammar cannot be enforced.
        """
        _check_keywords(Model.generate, options, AnswerOptions.__optional_keys__)
        ids = token_ids(prompt, self.config.vocab_size)
        own = CachedSession(self) if session is None else _checked_session(session, self)
        budget = token_budget(max_tokens, len(ids), own.context, self.config.context)
        grammar = self._grammar(options, mask)
        mask = mask if grammar is None else grammar.mask(ids)
        state = self._state(ids, budget, options, ReplySettings(stop, logprobs, mask))
        return Generation(
            own, ids, state, owns_session=session is None, cancel=cancel, progress=progress,
            drafting=self.drafting if draft else None,
        )  # fmt: skip

    def generate_many(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | None = None,
        *,
        running: int = RUNNING,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        seeds: Sequence[int] | None = None,
        draft: bool = True,
        **options: Unpack[AnswerOptions],
    ) -> Iterator[tuple[int, Event]]:
        """The replies to many prompts in shared passes: (index of the prompt, event) pairs as they come.

        At most `running` replies are on their way at once, those to prompts that begin alike beside and after
        each other: what they have in common is computed once. A reply is the same, to the bit, as generate's
        for its prompt alone.
        seeds: one for each prompt, in place of `seed` for all. The other arguments are those of generate.
        ValueError, before anything is computed, if an argument is out of range or a prompt does not fit.
        """
        _check_keywords(Model.generate_many, options, AnswerOptions.__optional_keys__)
        if whole("running", running) < 1:
            raise ValueError(f"running = {running} is less than 1")
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"seeds are {len(seeds)}, prompts {len(prompts)}")
        context = self.config.context
        checked: list[tuple[list[int], int]] = []
        for i, prompt in enumerate(prompts):
            try:
                ids = token_ids(prompt, self.config.vocab_size)
                checked.append((ids, token_budget(max_tokens, len(ids), context, context)))
            except ValueError as error:
                raise ValueError(f"prompt {i} of {len(prompts)}: {error}") from None

        grammar = self._grammar(options)

        def state(i: int) -> ReplyState:
            ids, budget = checked[i]
            own: AnswerOptions = {**options, "seed": seeds[i]} if seeds is not None else options
            mask = None if grammar is None else grammar.mask(ids)
            return self._state(ids, budget, own, ReplySettings(stop, logprobs, mask))

        for i in range(min(1, len(checked))):
            state(i)  # raises for an argument out of range now, not at the first event
        order = alike_together([ids for ids, _ in checked])
        replies = ((checked[i][0], state(i)) for i in order)
        driven = drive(self, replies, running, drafting=self.drafting if draft else None)
        return ((order[place], event) for place, event in driven)

    def _grammar(self, options: AnswerOptions, mask: Mask | None = None) -> Grammar | None:
        """The grammar that a call asks for, if any. ValueError if it asks for more than one constraint."""
        asked = {name: value for name, value in options.items() if name in CONSTRAINTS and value is not None}
        given = [*asked, *(["mask"] if mask is not None else [])]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: an answer is held to one of them")
        return Grammar.of(self.vocabulary, **asked) if asked else None  # type: ignore[arg-type]

    def _state(
        self,
        prompt: list[int],
        max_tokens: int,
        options: AnswerOptions,
        settings: ReplySettings,
    ) -> ReplyState:
        """The state of a reply; its sampling, tools and thinking budget come from `options`."""
        sampling: Any = {k: v for k, v in options.items() if k in SamplingOptions.__optional_keys__}
        chosen = self.sampling(self.may_think(prompt), **sampling)
        settings = replace(
            settings, tools=options.get("toolset"), thinking_budget=options.get("thinking_budget")
        )
        return ReplyState(self.vocabulary, prompt, chosen, max_tokens, settings)

    def may_think(self, prompt: Sequence[int]) -> bool:
        """Whether the reply to `prompt` may begin with thought; a hybrid's may, unless told not to."""
        closed = last_control_token(self.tokenizer, prompt) == self.tokenizer.control_id(END_THINK)
        return may_think(self.metadata["thinking"], not closed)

    # ------------------------------------------------------------------------
    # Tokens -> logits, texts -> vectors and scores

    def forward(
        self, batch: Sequence[tuple[Session, ArrayLike]], logits: Logits | Sequence[int] = "last"
    ) -> list[NDArray[np.float32]]:
        """One ragged batch over any sessions of this model; a list of what Session.forward returns, in order.

        logits: a list says how many rows are wanted of each session, the last ones: (n, vocab_size).
        ValueError also if the logits of a token, or the hidden state, are NaN or infinite; every other method
        computes through this one. With a list only the first row of each session is checked, for a draft
        may hold any token; a bad row after it is all NaN, which nobody can draw from. model.trace shows
        where such a number comes from.
        """
        outputs = super().forward(batch, logits)
        hidden = logits == "hidden"
        # embedding rows beyond n_tokens are padding
        n = self.config.dim if hidden else self.config.n_tokens
        rows = [row for output in outputs for row in output.reshape(-1, output.shape[-1])]
        if not all_finite(rows, n, self.threads):
            for output in outputs:
                self._check_rows(output.reshape(-1, output.shape[-1]), n, hidden, not isinstance(logits, str))
        return outputs

    def _check_rows(self, rows: NDArray[np.float32], n: int, hidden: bool, drafted: bool) -> None:
        for i, row in enumerate(rows):
            try:
                self._check_finite(row[:n], hidden)
            except ValueError:
                if not (i and drafted):
                    raise
                row[:] = np.nan

    def _check_finite(self, row: NDArray[np.float32], hidden: bool) -> None:
        finite = np.isfinite(row)
        bad = [i for i in np.flatnonzero(~finite).tolist() if hidden or i not in self.undefined_tokens]
        if bad:
            what, where = ("hidden state is", "at") if hidden else ("logits are", "of token")
            found = f"the model's {what} not finite ({row[bad[0]]} {where} {bad[0]})"
            raise ValueError(f"{self.path}: {found}: the file is damaged or its weights overflow")

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts as vectors of length 1, (n, dim), by Qwen3-Embedding's recipe; dot products of rows are
        cosines.

        A text ends with the token that its tokenizer adds, else <|endoftext|>; its vector is the final hidden
        state there. A query goes through retrieval.instruct first. ValueError, before anything is computed,
        if a text is empty or passes the context, or the vocabulary has no such end token.
        """
        return retrieval.embed(self, self.tokenizer, texts)

    def rerank(
        self, query: str, documents: Sequence[str], instruction: str | None = None
    ) -> NDArray[np.float32]:
        """How likely each document meets the query, (n,) in 0..1, asked as Qwen3-Reranker's card has it.

        instruction: what the search is for; None for a web search. ValueError, before anything is computed,
        if a document passes the context or the vocabulary lacks a token of the recipe.
        """
        return retrieval.rerank(self, self.tokenizer, query, documents, instruction)


functools.update_wrapper(Model.__new__, Model.__init__)  # for help() and inspect.signature()


def _checked_session(session: CachedSession, model: Model) -> CachedSession:
    if not isinstance(session, CachedSession):
        raise ValueError(
            f"session is a {type(session).__name__}, which does not know its tokens; pass a CachedSession"
        )
    if session.model is not model:
        raise ValueError(f"session belongs to another model ({session.model.path})")
    return session


def _check_keywords(
    function: Callable[..., Any], given: Iterable[str], options: Collection[str], name: str | None = None
) -> None:
    """TypeError, worded as Python's own and with the nearest name, for a keyword that `function` does not
    have.

    given: the keywords. options: those that its **parameter accepts. name: what to call the function.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [*options, *(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))]
    for keyword in given:
        if keyword not in known:
            import difflib

            near = difflib.get_close_matches(keyword, known, 1, cutoff=0.5)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            called = name or function.__qualname__
            raise TypeError(f"{called}() got an unexpected keyword argument {keyword!r}{hint}")
