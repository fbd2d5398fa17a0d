"""Sequences in shared passes: bits as alone, common beginnings computed once, at most `running` at once.

python -m pytest tests/drivers/test_batch.py
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_models import export_small_model

from qwen3c import CachedSession, Event, Model
from qwen3c.drivers.batch import LARGEST_PIECE, Batch, Member, common_prefix, drive, last_rows
from qwen3c.drivers.reply import ReplyState, Stats
from qwen3c.drivers.sampler import Sampling
from qwen3c.engine import Logits, Session


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(str(export_small_model(tmp_path_factory.mktemp("model"), std=0.05, context=1024)), threads=1)


class Watched(Model):
    """A model that remembers the passes it made: how many tokens of each session."""

    passes: list[list[int]]

    def forward(
        self, batch: Sequence[tuple[Session, Any]], logits: Logits | Sequence[int] = "last"
    ) -> list[NDArray[np.float32]]:
        self.passes.append([len(ids) for _, ids in batch])
        return super().forward(batch, logits)


@pytest.fixture
def watched(model: Model) -> Watched:
    watched = Watched(model.path, threads=1)
    watched.passes = []
    return watched


def prompts(n: int, shared: int, own: int, seed: int = 0) -> list[list[int]]:
    r = random.Random(seed)
    beginning = [r.randrange(200) for _ in range(shared)]
    return [beginning + [r.randrange(200) for _ in range(own)] for _ in range(n)]


def texts(events: Sequence[tuple[int, Event]], n: int) -> list[list[int | None]]:
    return [[event.token for index, event in events if index == i] for i in range(n)]


@pytest.mark.parametrize("running", [1, 3, 16, 100])
def test_many_replies_are_each_what_generate_says(model: Model, running: int) -> None:
    asked = [*prompts(7, 50, 5), *prompts(5, 0, 90, 1), [3]]
    seeds = list(range(len(asked)))
    together = list(model.generate_many(asked, 9, running=running, seeds=seeds, temperature=1.0, top_k=0))
    alone = [
        [event.token for event in model.generate(prompt, 9, seed=seed, temperature=1.0, top_k=0)]
        for prompt, seed in zip(asked, seeds, strict=True)
    ]
    assert texts(together, len(asked)) == alone
    assert sorted(i for i, event in together if event.finish_reason) == seeds


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"temperature": 1.2, "top_k": 0, "top_p": 0.7},
        {"temperature": 1.2, "top_k": 0, "min_p": 0.2, "thinking_budget": 2},
    ],
)
def test_replies_drawn_together_have_the_log_probabilities_of_those_drawn_alone(
    model: Model, options: dict[str, Any]
) -> None:
    asked = prompts(6, 10, 5)
    together = [list[Event]() for _ in asked]
    for i, event in model.generate_many(asked, 12, seeds=range(6), logprobs=3, **options):
        together[i].append(event)
    for i, prompt in enumerate(asked):
        assert list(model.generate(prompt, 12, seed=i, logprobs=3, **options)) == together[i]


def test_a_common_beginning_is_computed_once(watched: Watched) -> None:
    list(watched.generate_many(prompts(10, 300, 4), 3, seed=1))
    read = sum(map(sum, watched.passes))
    assert (
        read <= 300 + 10 * 5 + 10 * 3
    )  # the common beginning once, then each prompt's own end and its reply


def test_a_common_beginning_is_computed_once_wherever_its_prompts_stand(watched: Watched) -> None:
    """Forty of them, each for five prompts that lie far apart."""
    beginnings = [prompts(1, 0, 60, seed)[0] for seed in range(40)]
    asked = [beginning + end for end in prompts(5, 0, 4, 99) for beginning in beginnings]
    said: dict[int, list[int | None]] = {}
    for i, event in watched.generate_many(asked, 2, seeds=range(200), running=8):
        said.setdefault(i, []).append(event.token)
    assert sum(map(sum, watched.passes)) <= 40 * 60 + 200 * (4 + 2)
    for i in (0, 77, 199):
        assert [event.token for event in watched.generate(asked[i], 2, seed=i)] == said[i]


def test_no_more_replies_run_at_once_than_allowed(watched: Watched) -> None:
    list(watched.generate_many(prompts(9, 0, 4), 6, running=4, seed=1))
    assert max(map(len, watched.passes)) == 4


def test_a_pass_reads_no_more_of_prompts_than_its_pace(watched: Watched) -> None:
    list(watched.generate_many(prompts(3, 0, 700), 2, seed=1))
    assert max(map(sum, watched.passes)) <= LARGEST_PIECE + 3


def test_decoding_goes_on_while_a_prompt_is_read(watched: Watched) -> None:
    short, long = prompts(1, 0, 4)[0], prompts(1, 0, 900, 1)[0]
    order = [index for index, _ in watched.generate_many([short, long], 30, seed=1, logit_bias={0: -50.0})]
    first_of_long = order.index(1)
    assert first_of_long >= 3  # the short one said several tokens before


def test_one_that_is_cancelled_does_not_disturb_the_others(model: Model) -> None:
    asked, cancelled = prompts(3, 20, 4), [False, False, False]
    batch: Batch[Event] = Batch(model)
    for i, prompt in enumerate(asked):
        state = ReplyState(model.vocabulary, prompt, Sampling(seed=i), 8)
        member = Member(i, state, CachedSession(model), prompt, Stats(), cancelled=lambda i=i: cancelled[i])  # type: ignore[misc]
        batch.running.append(member)
    said: list[list[int | None]] = [[], [], []]
    while batch.running:
        for member, event in batch.step():
            said[member.index].append(event.token)
            cancelled[1] = len(said[1]) >= 3
    assert said[1][-1] is None and len(said[1]) == 4
    for i in (0, 2):
        alone = model.generate(asked[i], 8, seed=i, temperature=1.0, top_k=0, top_p=1.0)
        assert said[i] == [event.token for event in alone]


def test_last_rows_are_those_of_each_prompt_alone(model: Model) -> None:
    asked = [*prompts(20, 100, 3), *prompts(4, 0, 300, 2)]
    for kind in ("last", "hidden"):
        expected = [model.session().forward(prompt, kind) for prompt in asked]
        found = last_rows(model, asked, kind)
        assert [row.tobytes() for row in found] == [row.tobytes() for row in expected]
    assert last_rows(model, [], "last") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"running": 0}, "running = 0 is less than 1"),
        ({"seeds": [1]}, "seeds are 1, prompts 2"),
        ({"logprobs": -1}, "logprobs = -1"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"max_tokens": -2}, "max_tokens = -2 is negative"),
    ],
)
def test_bad_arguments_are_refused_by_the_call(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate_many([[1], [2]], **options)


def test_a_prompt_that_cannot_be_is_named_by_its_number(model: Model) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 of 2: prompt is 1025 tokens, the context holds 1024"):
        model.generate_many([[1], [2] * 1025])
    with pytest.raises(ValueError, match=r"prompt 0 of 1: prompt is empty"):
        model.generate_many([[]])
    assert list(model.generate_many([])) == []


def test_a_prompt_that_fills_the_context_ends_at_once(model: Model) -> None:
    ((index, event),) = model.generate_many([[1] * 1024])
    assert (index, event.token, event.finish_reason) == (0, None, "length")


def test_common_prefixes() -> None:
    for a, b, expected in (([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 3], 1), ([4], [5], 0)):
        assert common_prefix(a, b) == common_prefix(b, a) == expected


def test_sequences_are_taken_from_an_iterator_as_there_is_room(model: Model) -> None:
    taken = []

    def sequences() -> Iterator[tuple[list[int], ReplyState]]:
        for i, prompt in enumerate(prompts(6, 0, 4)):
            taken.append(i)
            yield prompt, ReplyState(model.vocabulary, prompt, Sampling(seed=i), 5)

    events = drive(model, sequences(), 2)
    next(events)
    assert taken == [0, 1, 2]  # two run, the next one is taken in advance
    list(events)
    assert taken == list(range(6))
