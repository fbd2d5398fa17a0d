"""A reply is a function of its prompt, settings and seed, however its logits were computed.

python -m pytest tests/drivers/test_reply.py
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_models import TINY_QWEN3, export_small_model

from qwen3c import Model
from qwen3c.drivers.batch import drive
from qwen3c.drivers.reply import (
    ContextFullError,
    Event,
    Reply,
    ReplySettings,
    ReplyState,
    Vocabulary,
    token_budget,
)
from qwen3c.drivers.sampler import Sampling

N_CASES = 200


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(str(TINY_QWEN3), threads=1)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Random weights, nearly uniform: another random number gives another token."""
    return Model(str(export_small_model(tmp_path_factory.mktemp("flat"), std=0.05)), threads=1)


def cases(model: Model, n: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Random prompts with random settings of everything that decides a token."""
    r = random.Random(7)
    shared = [r.randrange(model.config.n_tokens) for _ in range(60)]
    found = []
    for i in range(n):
        own = [r.randrange(model.config.n_tokens) for _ in range(r.randrange(1, 40))]
        options: dict[str, Any] = {
            "temperature": r.choice([0, 0.3, 0.8, 1.0, 2.0]),
            "top_k": r.choice([0, 1, 5, 40]),
            "top_p": r.choice([1.0, 0.9, 0.3]),
            "min_p": r.choice([0.0, 0.05]),
            "presence_penalty": r.choice([0.0, 1.0]),
            "frequency_penalty": r.choice([0.0, 0.5]),
            "repetition_penalty": r.choice([1.0, 1.2]),
            "logit_bias": {r.randrange(model.config.n_tokens): r.choice([-5.0, 5.0])},
            "seed": r.randrange(1 << 64),
        }
        found.append((shared[: r.choice([0, 0, 33, 60])] + own, options | {"max_tokens": r.randrange(1, 24)}))
        if i % 10 == 0:
            found[-1][1]["stop"] = ["e", "zz"]
    return found


def key(events: list[Event]) -> list[tuple[Any, ...]]:
    return [(e.token, e.text, e.thinking, e.finish_reason, e.logprob, e.top_logprobs) for e in events]


@pytest.mark.parametrize("which", ["model", "flat"])
def test_a_reply_is_the_same_alone_in_a_batch_and_computed_again(
    which: str, request: pytest.FixtureRequest
) -> None:
    model: Model = request.getfixturevalue(which)
    found = cases(model, N_CASES)
    alone = [key(list(model.generate(prompt, logprobs=2, **options))) for prompt, options in found]
    states = [
        ReplyState(
            model.vocabulary,
            prompt,
            Sampling(**{name: value for name, value in o.items() if name not in ("max_tokens", "stop")}),
            o["max_tokens"],
            ReplySettings(stop=o.get("stop", ()), logprobs=2),
        )
        for prompt, o in found
        for _ in range(2)
    ]

    # together, in passes that mix prompts, pieces of prompts and single tokens, prefixes forked
    together: list[list[Event]] = [[] for _ in found]
    pairs = [(prompt, state) for (prompt, _), state in zip(found, states[::2], strict=True)]
    for index, event in drive(model, pairs, 16):
        together[index].append(event)
    assert [key(events) for events in together] == alone

    # every token's logits computed a second time, all in one pass, as the check of guessed tokens does
    for (prompt, _), state, expected in zip(found, states[1::2], alone, strict=True):
        tokens = [token for token, *_ in expected if token is not None]
        rows = model.session().forward([*prompt, *tokens], logits="all")[len(prompt) - 1 :]
        assert key([state.take(row) for row in rows[: len(tokens)]]) == expected


def test_another_seed_or_position_is_another_reply(flat: Model) -> None:
    """Negative control: with another seed or position the texts differ, so the tests above can fail."""
    prompt = list(range(20))

    def tokens(prompt: list[int], seed: int) -> list[int]:
        generation = flat.generate(prompt, 12, temperature=1.0, top_k=0, top_p=1.0, seed=seed)
        return [event.token for event in generation if event.token is not None]

    assert tokens(prompt, 1) == tokens(prompt, 1) != tokens(prompt, 2)
    assert tokens(prompt, 1)[:4] != tokens(prompt[1:], 1)[:4]


def test_a_reply_goes_on_from_any_of_its_tokens(flat: Model) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 9}
    whole = [event.token for event in flat.generate([1, 2, 3], 20, **options)]
    for n in (1, 7, 19):
        assert None not in whole
        rest = flat.generate(
            [1, 2, 3, *(token for token in whole[:n] if token is not None)], 20 - n, **options
        )
        assert [event.token for event in rest] == whole[n:]


class Script:
    """A mask that allows one token at a time: those of a list."""

    def __init__(self, tokens: list[int], n_tokens: int) -> None:
        self.tokens = tokens
        self.n_tokens = n_tokens
        self.accepted: list[int] = []

    def allowed(self) -> NDArray[np.bool_] | None:
        if len(self.accepted) >= len(self.tokens):
            return None
        mask = np.zeros(self.n_tokens, np.bool_)
        mask[self.tokens[len(self.accepted)]] = True
        return mask

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def prepare(self) -> None:
        """Nothing to do ahead of time."""


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_decides_what_may_come(flat: Model, temperature: float) -> None:
    wanted = [5, 9, 5, 11]
    script = Script(wanted, flat.config.n_tokens)
    events = list(flat.generate([1, 2], 6, mask=script, temperature=temperature, seed=3, logprobs=0))
    assert [event.token for event in events][:4] == wanted
    assert script.accepted[:4] == wanted and len(script.accepted) == len(events)
    # what is reported is the model's own distribution, not the masked one
    row = flat.session().forward([1, 2])[: flat.config.n_tokens].astype(np.float64)
    expected = row[5] - np.log(np.exp(row - row.max()).sum()) - row.max()
    assert events[0].logprob == pytest.approx(expected, abs=1e-5)


def test_a_mask_that_allows_nothing_is_an_error(flat: Model) -> None:
    class Nothing:
        def allowed(self) -> NDArray[np.bool_]:
            return np.zeros(flat.config.n_tokens, np.bool_)

        def accept(self, token: int) -> None:
            raise AssertionError

        def prepare(self) -> None:
            pass

    with pytest.raises(ValueError, match="no token"):
        list(flat.generate([1, 2], 6, mask=Nothing()))


def test_a_state_without_a_tokenizer_gives_tokens_alone() -> None:
    vocabulary = Vocabulary(8, frozenset({3}))
    state = ReplyState(vocabulary, [1], Sampling(temperature=0), 5)
    events = [state.take(np.eye(8, dtype=np.float32)[token]) for token in (2, 3)]
    assert [(e.token, e.text, e.finish_reason) for e in events] == [(2, "", None), (3, "", "stop")]


def test_an_ended_reply_brings_what_was_held_back(model: Model) -> None:
    state = ReplyState(model.vocabulary, [1], Sampling(temperature=0), 50, ReplySettings(stop="abcdef"))
    reply = Reply()

    def rows(text: str) -> Iterator[NDArray[np.float32]]:
        for id in model.tokenizer.encode(text):
            yield np.where(np.arange(model.config.vocab_size) == id, 9, 0).astype(np.float32)

    for row in rows("say abc"):
        reply.add(state.take(row))
    held = reply.text
    assert held != "say abc"
    reply.add(state.end("cancelled"))
    assert (reply.text, reply.finish_reason, state.finish_reason) == ("say abc", "cancelled", "cancelled")


@pytest.mark.parametrize(
    ("max_tokens", "n_prompt", "expected"), [(None, 3, 7), (3, 3, 3), (9, 3, 7), (0, 3, 0), (None, 10, 0)]
)
def test_prompt_and_reply_stay_within_the_context(
    max_tokens: int | None, n_prompt: int, expected: int
) -> None:
    assert token_budget(max_tokens, n_prompt, 10, 40) == expected


def test_a_prompt_longer_than_the_context_says_what_the_model_can_hold() -> None:
    with pytest.raises(ContextFullError, match="11 tokens, the context holds 10; this model can hold 40"):
        token_budget(None, 11, 10, 40)


@pytest.mark.parametrize("bad", [-1, True, 1.5, "3"])
def test_a_bad_number_of_tokens_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="max_tokens = "):
        token_budget(bad, 1, 10, 10)


def test_more_logprobs_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="logprobs = 9 is outside 0..8"):
        ReplyState(Vocabulary(8, frozenset()), [1], Sampling(), 5, ReplySettings(logprobs=9))
