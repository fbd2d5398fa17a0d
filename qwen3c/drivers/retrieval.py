"""Texts as vectors, and how well documents answer a query: the recipes of Qwen3-Embedding and Qwen3-Reranker.

    embed   text + end token -> final hidden state of the last token, at length 1
    rerank  the question "does this document meet the query?" -> softmax of the logits of "no" and "yes"

Both follow the model cards (https://arxiv.org/abs/2506.05176) but for two things: text never becomes a
control token, and a text that is too long is refused, not cut. Model.embed and Model.rerank call them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..text.tokenizer import TooLongError
from .batch import last_rows
from .reply import ContextFullError

if TYPE_CHECKING:
    from ..engine import Engine
    from ..text.tokenizer import Tokenizer

END = "<|endoftext|>"
TAGS, ANSWERS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>"), ("no", "yes")
RECIPE = (*TAGS, *ANSWERS)  # tokens that a model needs to judge documents
TASK = "Given a web search query, retrieve relevant passages that answer the query"

_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
    "Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def instruct(query: str, task: str = TASK) -> str:
    """The text to embed for a query, with its instruction; documents are embedded without one."""
    return f"Instruct: {task}\nQuery:{query}"


def embed(model: Engine, tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.float32]:
    """See Model.embed."""
    return unit_vectors(
        last_rows(model, embedding_prompts(model, tokenizer, texts), "hidden"), model.config.dim
    )


def embedding_prompts(model: Engine, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text and its end. ValueError if a text is empty or too long, or there is no such
    end.
    """
    _check_list("texts", texts)
    opening, end = tokenizer.opening, embedding_end(tokenizer)
    prompts = []
    for i, text in enumerate(texts):
        if not text:
            raise ValueError(f"text {i} of {len(texts)} is empty")
        name = f"text {i} of {len(texts)}"
        ids = _fitting(model, tokenizer, text, len(opening) + len(end), name)
        prompts.append([*opening, *ids, *end])
    return prompts


def embedding_end(tokenizer: Tokenizer) -> list[int]:
    """What stands at the end of a text that becomes a vector. ValueError if the
    vocabulary has no such token.
    """
    return tokenizer.closing or [_control_id(tokenizer, END)]


def unit_vectors(rows: Sequence[NDArray[np.float32]], dim: int) -> NDArray[np.float32]:
    """Final hidden states, (dim,) each, as vectors of length 1, (n, dim)."""
    hidden = np.array(rows, np.float32).reshape(-1, dim)
    return hidden / np.maximum(np.linalg.norm(hidden, axis=1, keepdims=True), np.float32(1e-12))


def rerank(
    model: Engine, tokenizer: Tokenizer, query: str, documents: Sequence[str], instruction: str | None
) -> NDArray[np.float32]:
    """See Model.rerank."""
    prompts, answers = rerank_prompts(model, tokenizer, query, documents, instruction)
    return relevance(last_rows(model, prompts, "last"), answers)


def rerank_prompts(
    model: Engine, tokenizer: Tokenizer, query: str, documents: Sequence[str], instruction: str | None
) -> tuple[list[list[int]], list[int]]:
    """(token ids of the question about each document, the ids of "no" and "yes");
    see Model.rerank for errors.
    """
    _check_list("documents", documents)
    for tag in TAGS:
        _control_id(tokenizer, tag)
    answers = [_word_id(tokenizer, word) for word in ANSWERS]
    before, after = tokenizer.encode(_BEFORE, special=True), tokenizer.encode(_AFTER, special=True)
    question = f"<Instruct>: {TASK if instruction is None else instruction}\n<Query>: {query}\n<Document>: "
    prompts = []
    for i, document in enumerate(documents):
        name = f"document {i} of {len(documents)}"
        ids = _fitting(model, tokenizer, question + document, len(before) + len(after), name)
        prompts.append([*before, *ids, *after])
    return prompts, answers


def relevance(rows: Sequence[NDArray[np.float32]], answers: list[int]) -> NDArray[np.float32]:
    """How likely "yes" is beside "no", (n,), by the logits after each question, (vocab_size,) each."""
    logits = [row[answers].astype(np.float64) for row in rows]
    return np.array([1 / (1 + np.exp(no - yes)) for no, yes in logits], np.float32)


def _check_list(name: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError(f"{name} is one text, not a list of them")


def _fitting(model: Engine, tokenizer: Tokenizer, text: str, around: int, name: str) -> list[int]:
    """Token ids of a text. ContextFullError if they and those around it pass the context."""
    context, least = model.config.context, ""
    try:
        ids = tokenizer.encode(text, most=context)
        n = len(ids) + around
    except TooLongError as error:
        ids, n, least = [], error.n + around, "at least "
    if n > context:
        fault = f"takes {least}{n} tokens with what goes around it, the context of the model is {context}"
        raise ContextFullError(f"{name} {fault}", n, context)
    return ids


def _control_id(tokenizer: Tokenizer, tag: str) -> int:
    id = tokenizer.control_id(tag)
    if id is None:
        raise ValueError(f"the vocabulary of this model has no token {tag}, which the recipe needs")
    return id


def _word_id(tokenizer: Tokenizer, word: str) -> int:
    ids = tokenizer.encode(word)
    if len(ids) != 1:
        raise ValueError(
            f"{word!r} is {len(ids)} tokens in the vocabulary of this model, the recipe needs one"
        )
    return ids[0]
