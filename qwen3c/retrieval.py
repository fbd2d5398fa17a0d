"""Texts as vectors, and how well documents answer a query: the recipes of Qwen3-Embedding and Qwen3-Reranker.

    embed   text + end token -> final hidden state of the last token, at length 1
    rerank  the question "does this document meet the query?" -> softmax of the logits of "no" and "yes"

Both are as the model cards have them (https://arxiv.org/abs/2506.05176), but for two things: what a text spells is
never a control token, and no text is cut short. Model.embed and Model.rerank call them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .engine import Logits
    from .model import Model
    from .text.tokenizer import Tokenizer

END = "<|endoftext|>"
TASK = "Given a web search query, retrieve relevant passages that answer the query"

_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

# Tokens computed together: enough that the weights are read for many at once, while the KV cache of a
# long list of texts never stands in memory whole
_BATCH_TOKENS = 2048


def instruct(query: str, task: str = TASK) -> str:
    """What Qwen3-Embedding embeds for a query; the documents it is compared with are embedded bare."""
    return f"Instruct: {task}\nQuery:{query}"


def embed(model: Model, texts: Sequence[str]) -> NDArray[np.float32]:
    """See Model.embed."""
    _check_list("texts", texts)
    end = model.tokenizer.closing or [_control_id(model.tokenizer, END)]
    prompts = []
    for i, text in enumerate(texts):
        if not text:
            raise ValueError(f"text {i} of {len(texts)} is empty")
        prompts.append([*model.tokenizer.opening, *model.tokenizer.encode(text), *end])
    _check_lengths(model, "text", prompts)
    hidden = np.array(list(_last_rows(model, prompts, "hidden")), np.float32).reshape(-1, model.config.dim)
    return hidden / np.maximum(np.linalg.norm(hidden, axis=1, keepdims=True), np.float32(1e-12))


def rerank(
    model: Model, query: str, documents: Sequence[str], instruction: str | None
) -> NDArray[np.float32]:
    """See Model.rerank."""
    _check_list("documents", documents)
    tokenizer = model.tokenizer
    for tag in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        _control_id(tokenizer, tag)
    answers = [_word_id(tokenizer, "no"), _word_id(tokenizer, "yes")]
    before, after = tokenizer.encode(_BEFORE, special=True), tokenizer.encode(_AFTER, special=True)
    question = f"<Instruct>: {TASK if instruction is None else instruction}\n<Query>: {query}\n<Document>: "
    prompts = [[*before, *tokenizer.encode(question + document), *after] for document in documents]
    _check_lengths(model, "document", prompts)
    logits = [row[answers].astype(np.float64) for row in _last_rows(model, prompts, "last")]
    return np.array([1 / (1 + np.exp(no - yes)) for no, yes in logits], np.float32)


def _last_rows(model: Model, prompts: list[list[int]], kind: Logits) -> Iterator[NDArray[np.float32]]:
    """What Session.forward returns of each prompt; the tokens they all begin with are computed once."""
    common = _common_start(prompts)
    root = model.session()
    if common:
        root.forward(common)
    batch, n_tokens = [], 0
    for i, prompt in enumerate(prompts):
        batch.append((root.fork(), prompt[len(common) :]))
        n_tokens += len(prompt) - len(common)
        if n_tokens >= _BATCH_TOKENS or i == len(prompts) - 1:
            yield from model.forward(batch, kind)
            batch, n_tokens = [], 0


def _common_start(prompts: list[list[int]]) -> list[int]:
    """The tokens all prompts begin with, short of the last one of any: each keeps a token of its own."""
    low, high = min(prompts, default=[]), max(prompts, default=[])
    limit = min(map(len, prompts), default=1) - 1
    n = next((i for i in range(limit) if low[i] != high[i]), limit)
    return low[:n]


def _check_list(name: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError(f"{name} is one text, not a list of them")


def _check_lengths(model: Model, name: str, prompts: list[list[int]]) -> None:
    """All of them, before anything is computed."""
    for i, prompt in enumerate(prompts):
        if len(prompt) > model.config.context:
            fault = f"takes {len(prompt)} tokens with what goes around it"
            raise ValueError(
                f"{name} {i} of {len(prompts)} {fault}, the context of the model is {model.config.context}"
            )


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
