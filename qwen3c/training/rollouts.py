"""Prompts -> sampled completions with their log-probabilities, by the engine, all sequences at once.

The engine's logits do not depend on the batch, and every completion has random numbers of its own: so a
completion is a function of (weights, prompt, seed) alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .. import engine

BLOCK = 64  # tokens whose probabilities are summed at once


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
    after_prompt = model.forward(list(zip(first, prompts, strict=True)))
    active = [
        (session if i == 0 else session.fork(), completion, uniform[row, i])
        for row, (session, group) in enumerate(zip(first, groups, strict=True))
        for i, completion in enumerate(group)
    ]
    logits = [row for row in after_prompt for _ in range(n_completions)]
    for position in range(max_tokens):
        for row, (_, completion, numbers) in zip(logits, active, strict=True):
            token, logprob = choose(row[: model.config.n_tokens], temperature, numbers[position])
            completion.tokens.append(token)
            completion.logprobs.append(logprob)
            completion.ended = token in end_tokens
        active = [entry for entry in active if not entry[1].ended]
        if not active or position == max_tokens - 1:
            break
        logits = model.forward([(session, completion.tokens[-1:]) for session, completion, _ in active])
    return groups


def choose(logits: NDArray[np.float32], temperature: float, number: float) -> tuple[int, float]:
    """A token and its log-probability. logits: (vocab_size,); number: uniform in 0..1; temperature: 0 is greedy."""
    if temperature == 0:
        token = int(logits.argmax())
        return token, float(logits[token]) - engine.log_sum_exp(logits)
    probabilities = engine.softmax(logits, temperature)
    # the first token whose cumulative probability exceeds the number: its block by their sums, then within that
    sums = np.add.reduceat(probabilities, np.arange(0, len(probabilities), BLOCK), dtype=np.float64)
    ends = np.cumsum(sums)
    target = number * ends[-1]
    block = min(int(np.searchsorted(ends, target, side="right")), len(ends) - 1)
    within = np.cumsum(probabilities[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    target = min(
        target - (ends[block] - sums[block]), np.nextafter(within[-1], 0)
    )  # the sums round differently
    token = block * BLOCK + int(np.searchsorted(within, target, side="right"))
    return token, math.log(probabilities[token] / ends[-1])
