"""The public Model: the engine with its tokenizer, its chat template and the token loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import engine, retrieval
from .chat import END_THINK, ChatTemplate, last_control_token, may_think
from .format import ModelFileError
from .generate import CachedSession, Generation
from .memory import check_space_for_model
from .sampler import Sampling, default_sampling
from .template import Renderer
from .tokenizer import BackgroundTokenizer, Tokenizer


class Model(engine.Model):
    """A model.bin, ready to be asked.

    path: the file. threads: None for as many as this machine can feed. kv: "f16", "f32" or "int8", the KV cache.
    activations: "int8", or "float32" to compare with other implementations. huge_pages: copy the weights into
    memory of large pages (memory.in_huge_pages says what that costs and gains). renderer: of chat templates, if
    one has been started already; any number of models may share it.
    ModelFileError, one line, if the file is not a model.bin that this version can run. MemoryError where `ulimit -v`
    leaves too little address space.
    """

    def __init__(
        self,
        path: str,
        threads: int | None = None,
        kv: engine.KV = "f16",
        activations: engine.Activations = "int8",
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
        self._tokenizer = BackgroundTokenizer(self.file)
        self._renderer = renderer or Renderer()

    @property
    def tokenizer(self) -> Tokenizer:
        """Text <-> tokens. ModelFileError if the tokenizer.json in the file cannot be read."""
        return self._tokenizer.result()

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template; its `thinking` is the model's kind: "hybrid", "always" or "none"."""
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

    def chat_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, by the model's chat template, ending where the assistant speaks.

        messages: dicts with role ("system", "user", "assistant", "tool") and content (text, None or a
        list of text parts); of an assistant also reasoning_content and tool_calls.
        thinking: None leaves it to the model (hybrid models think). tools: JSON schemas of functions.
        No text in messages or tools becomes a control token, except the reply tags in what the
        assistant said. ValueError if a message is malformed, the switch cannot work with this model or
        the template refuses (ChatTemplateError).
        """
        return self.chat.prompt(messages, thinking, tools)

    def sampling(self, thinking: bool, **given: Any) -> Sampling:
        """What is given (see Sampling; None counts as not given) over the defaults of the model."""
        chosen = {name: value for name, value in given.items() if value is not None}
        return Sampling(**{**default_sampling(self.metadata, thinking), **chosen})

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int | None = None,
        *,
        session: CachedSession | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        cancel: Callable[[], bool] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **sampling: Any,
    ) -> Generation:
        """The reply to `prompt` (token ids), as an iterator of events.

        max_tokens: None for what the context holds. session: one to go on with; what its tokens have
        in common with the prompt is not computed again. stop: texts that end the reply and are not
        part of it. logprobs: None, or how many of the most likely tokens to give with each event.
        cancel: asked before every token and every piece of the prompt; true ends the reply.
        progress: told (tokens done, tokens in all) of the prompt. sampling: see Sampling.
        ValueError, before anything is computed, if an argument is out of range or the prompt is longer
        than the context.
        """
        return Generation(
            self,
            prompt,
            self.sampling(self.may_think(prompt), **sampling),
            session=CachedSession(self) if session is None else session,
            max_tokens=max_tokens,
            stop=stop,
            logprobs=logprobs,
            cancel=cancel,
            progress=progress,
        )

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The texts as vectors of length 1, (n, dim): products of rows are cosines. As Qwen3-Embedding's card has it.

        A text ends with the vocabulary's own end, else <|endoftext|>; its vector is the final hidden state there.
        A query goes through retrieval.instruct first. ValueError, before anything is computed, if a text is empty
        or passes the context, or the vocabulary has no such token.
        """
        return retrieval.embed(self, texts)

    def rerank(
        self, query: str, documents: Sequence[str], instruction: str | None = None
    ) -> NDArray[np.float32]:
        """How likely each document meets the query, (n,) in 0..1, asked as Qwen3-Reranker's card has it.

        instruction: what the search is for; None for a web search. ValueError, before anything is computed, if
        a document passes the context or the vocabulary lacks a token of the recipe.
        """
        return retrieval.rerank(self, query, documents, instruction)

    def may_think(self, prompt: Sequence[int]) -> bool:
        """Whether the reply to `prompt` may begin with thought; a hybrid's may unless the prompt ends it."""
        closed = last_control_token(self.tokenizer, prompt) == self.tokenizer.control_id(END_THINK)
        return may_think(self.metadata["thinking"], not closed)
