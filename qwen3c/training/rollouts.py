"""Prompts -> sampled completions with their log-probabilities, by the engine, all sequences at once.

The engine's logits do not depend on the batch, and every completion has random numbers of its own: so a
completion is a function of (weights, prompt, seed) alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .. import engine


@dataclass
class Completion:
    """tokens: sampled, the ending one included. logprobs: of each, in nats, under what was sampled from."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False  # by an end token, not by the limit


def rollout(
    model: engine.Model,
    prompts: Sequence[Sequence[int]],
    n_completions: int,
    max_tokens: int,
    end_tokens: Collection[int],
    temperature: float,
    seed: Sequence[int],
) -> list[list[Completion]]:
    """n_completions of each prompt. temperature: 0 is greedy. ValueError if one exceeds the context."""
    groups = [[Completion() for _ in range(n_completions)] for _ in prompts]
    uniform = np.random.default_rng(seed).random((len(prompts), n_completions, max_tokens))

    # every prompt is computed once; its completions go on from forks
    first = [model.session(len(prompt) + max_tokens) for prompt in prompts]
    logits = np.stack(model.forward(list(zip(first, prompts, strict=True))))
    active = [
        (session if i == 0 else session.fork(), completion, uniform[row, i])
        for row, (session, group) in enumerate(zip(first, groups, strict=True))
        for i, completion in enumerate(group)
    ]
    logits = np.repeat(logits, n_completions, axis=0)
    for position in range(max_tokens):
        numbers = np.array([random[position] for _, _, random in active])
        tokens, logprobs = choose(logits[:, : model.config.n_tokens], temperature, numbers)
        for (_, completion, _), token, logprob in zip(active, tokens, logprobs, strict=True):
            completion.tokens.append(int(token))
            completion.logprobs.append(float(logprob))
            completion.ended = int(token) in end_tokens
        active = [entry for entry in active if not entry[1].ended]
        if not active or position == max_tokens - 1:
            break
        logits = np.stack(
            model.forward([(session, completion.tokens[-1:]) for session, completion, _ in active])
        )
    return groups


def choose(
    logits: NDArray[np.float32], temperature: float, uniform: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """One token per row of logits (n, vocab_size), and its log-probability; (n,) each."""
    scaled = logits.astype(np.float64) / (temperature or 1.0)
    scaled -= scaled.max(axis=1, keepdims=True)
    cumulative = np.cumsum(np.exp(scaled), axis=1)
    totals = cumulative[:, -1]
    if temperature == 0:
        tokens = logits.argmax(axis=1)
    else:
        # the first token whose cumulative probability exceeds the number
        tokens = (cumulative <= (uniform * totals)[:, None]).sum(axis=1)
    rows = np.arange(len(logits))
    return tokens, scaled[rows, tokens] - np.log(totals)
