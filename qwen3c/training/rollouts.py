"""Prompts -> sampled completions with their log-probabilities, by the engine, many sequences at once.

A completion depends on (weights, prompt, seed) alone, and is the one that Model.generate samples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .. import engine
from ..drivers.batch import drive
from ..drivers.draft import Drafting
from ..drivers.reply import ReplySettings, ReplyState, Vocabulary, token_budget, token_ids
from ..drivers.sampler import Sampling

RUNNING = 256  # sequences at once


@dataclass
class Completion:
    """tokens: the sampled ones, with the end token. logprobs: theirs, in nats, under the sampled
    distribution.
    """

    seed: int  # the seed with which Model.generate gives these tokens
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False  # whether an end token ended it, not the limit


def rollout(
    model: engine.Engine,
    prompts: Sequence[Sequence[int]],
    n_completions: int,
    max_tokens: int,
    end_tokens: Collection[int],
    temperature: float,
    seed: Sequence[int],
    draft: bool = True,
) -> list[list[Completion]]:
    """n_completions of each prompt. temperature: 0 is greedy. draft: see Model.generate.

    ValueError if one could exceed the context.
    """
    ids = [token_ids(prompt, model.config.vocab_size) for prompt in prompts]
    context = model.config.context
    for prompt in ids:
        token_budget(max_tokens, len(prompt) + max_tokens, context, context)
    seeds = np.random.SeedSequence(seed).generate_state(len(ids) * n_completions, np.uint64).tolist()
    completions = [Completion(number) for number in seeds]
    vocabulary = Vocabulary(model.config.n_tokens, frozenset(end_tokens))
    # greedy sampling gives its token probability 1; learning needs the model's own probability of it
    settings = ReplySettings(logprobs=0 if temperature == 0 else None)

    def replies() -> Iterator[tuple[list[int], ReplyState]]:
        for i, completion in enumerate(completions):
            prompt = ids[i // n_completions]
            sampling = Sampling(temperature=temperature, seed=completion.seed)
            state = ReplyState(vocabulary, prompt, sampling, max_tokens, settings)
            states[i] = state
            yield prompt, state

    states: dict[int, ReplyState] = {}
    for i, event in drive(model, replies(), RUNNING, drafting=Drafting(model) if draft else None):
        if event.token is not None:
            completion = completions[i]
            completion.tokens.append(event.token)
            completion.logprobs.append(states[i].sampled_logprob if event.logprob is None else event.logprob)
            completion.ended = event.token in end_tokens
    return [completions[i : i + n_completions] for i in range(0, len(completions), n_completions)]
