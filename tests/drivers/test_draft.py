"""Drafts change nothing that a reply says: tokens, text, log-probabilities, what its session holds.

python -m pytest tests/drivers/test_draft.py            a part of the prompts and settings
python -m pytest -m slow tests/drivers/test_draft.py    1,000 of them
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_models import TINY_QWEN3, export_small_model

from qwen3c import CachedSession, Event, Model
from qwen3c.drivers import draft as draft_module
from qwen3c.drivers.batch import Member
from qwen3c.drivers.draft import (
    FORCED,
    MATCHES,
    MODEL,
    Chances,
    Costs,
    Draft,
    Drafter,
    Drafting,
    Shelf,
    Small,
)
from qwen3c.drivers.lookup import BETWEEN, LONGEST, Lookup
from qwen3c.drivers.reply import ReplyState, Stats
from qwen3c.engine import Engine
from qwen3c.training.rollouts import rollout

TEXTS = (
    "The lake lies in the hills. The lake is blue in June. The lake is",
    "red, green, blue, red, green, blue, red, green,",
    "def area(a, b):\n    return a * b\n\ndef volume(a, b, c):\n    return",
    "Once there was a fox who had a friend. The fox said to the friend:",
    '{"name": "Ann", "age": 31}\n{"name": "Bob", "age": 17}\n{"name":',
    "A",
)
SCHEMA = {
    "type": "object",
    "properties": {"first_name": {"type": "string", "maxLength": 8}, "is_member": {"type": "boolean"}},
    "required": ["first_name", "is_member"],
    "additionalProperties": False,
}


class Eager(Drafting):
    """Every guess is checked, whatever it promises."""

    def lengths(self, found: Sequence[Draft | None], n_decoding: int, n_prompt: int) -> list[int]:
        return [len(draft.chances) if draft else 0 for draft in found]


class HostileDrafter(Drafter):
    def guesses(self) -> bool:
        return True


class Hostile(Drafting):
    """Guesses that make no sense: wrong, far too long, control tokens, numbers that are no tokens."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._random = random.Random(1)
        self._tokens = [*range(model.config.n_tokens), *[*model.metadata["eos_token_ids"]] * 50, -1, 1 << 40]

    def drafts(self, asked: Sequence[tuple[Drafter, int]], n_decoding: int, n_prompt: int) -> list[list[int]]:
        return [self._random.choices(self._tokens, k=self._random.choice([0, 1, 3, 60, 4000])) for _ in asked]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TINY_QWEN3, threads=1)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Random weights, which repeat themselves soon; more rows of logits than tokens."""
    return Model(export_small_model(tmp_path_factory.mktemp("padded"), context=512), threads=1)


@pytest.fixture(params=["eager", "as measured", "hostile", "small"])
def drafting(model: Model, padded: Model, request: pytest.FixtureRequest) -> Iterator[str]:
    """Both models draft in one of these ways."""
    ways: dict[str, Callable[[Model], Drafting]] = {
        "eager": Eager,
        "as measured": Drafting,
        "hostile": Hostile,
        "small": lambda one: Eager(one, one),  # a model that guesses at itself
    }
    for one in (model, padded):
        one.drafting = ways[request.param](one)
    yield request.param
    del model.drafting, padded.drafting


def cases(model: Model, n: int, seed: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """(prompt, arguments of generate) of every kind."""
    r = random.Random(seed)
    encode = model.tokenizer.encode
    for i in range(n):
        text = r.choice(TEXTS) if r.random() < 0.8 else " ".join(r.choices(TEXTS, k=9))
        raw = r.random() < 0.6 or not model.chat_template.source
        prompt = encode(text) if raw else model.chat_prompt(text, r.choice([True, False, None]))
        options: dict[str, Any] = {"max_tokens": r.choice([1, 2, 7, 30, 60]), "seed": i}
        options |= r.choice([{}, {"temperature": 0.0}, {"temperature": 0.0}, {"temperature": 1.5}])
        options |= r.choice([{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"top_k": 0, "top_p": 1.0}])
        options |= r.choice([{}, {}, {"repetition_penalty": 1.2}, {"presence_penalty": 1.0}])
        options |= r.choice([{}, {}, {"frequency_penalty": 0.3}, {"logit_bias": {encode("lake")[0]: 3.0}}])
        options |= r.choice([{}, {"logprobs": 0}, {"logprobs": 3}])
        options |= r.choice([{}, {}, {"stop": ["e"]}, {"stop": ["lake", "\n\n"]}])
        if r.random() < 0.3:
            options |= r.choice([{"schema": SCHEMA}, {"regex": "(blue ){4}sky"}, {"choice": ["yes", "no"]}])
        elif not raw and r.random() < 0.3:
            options["thinking_budget"] = r.choice([0, 3])
        yield prompt, options


def said(events: Iterator[Event] | Sequence[Event]) -> list[Any]:
    """All that the events say."""
    return [
        (e.token, e.text, e.thinking, e.finish_reason, e.tool_calls, e.logprob, e.top_logprobs)
        for e in events
    ]


def reply(model: Model, prompt: list[int], **options: Any) -> tuple[list[Any], list[int], Stats]:
    """What a reply says, what its session holds then, and its figures."""
    session = CachedSession(model)
    generation = model.generate(prompt, session=session, **options)
    events = said(generation)
    assert session.session.position == len(session.tokens)
    return events, session.tokens, generation.stats


def compare(model: Model, n: int, seed: int) -> tuple[int, int]:
    """Replies with and without drafts; how many guesses were right, and how many there were."""
    accepted = drafted_tokens = 0
    for prompt, options in cases(model, n, seed):
        plain = reply(model, prompt, draft=False, **options)
        drafted = reply(model, prompt, **options)
        assert drafted[:2] == plain[:2], (prompt, options)
        accepted += drafted[2].accepted_tokens
        drafted_tokens += drafted[2].drafted_tokens
    return accepted, drafted_tokens


def test_drafts_change_nothing(model: Model, padded: Model, drafting: str) -> None:
    right, guesses = np.add(compare(model, 30, 1), compare(padded, 30, 2))
    assert guesses > 100 and (right > 50 or drafting == "hostile")


@pytest.mark.slow
def test_drafts_change_nothing_of_a_thousand_replies(model: Model, padded: Model, drafting: str) -> None:
    right, guesses = np.add(compare(model, 500, 3), compare(padded, 500, 4))
    assert guesses > 1000 and (right > 500 or drafting == "hostile")


def test_a_session_that_is_not_rewound_is_noticed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the comparison fails where a wrong guess stays in the session."""

    def forget_draft(one: Member[Event]) -> None:
        one.draft, one.checks = [], []

    monkeypatch.setattr(model, "drafting", Eager(model), raising=False)
    monkeypatch.setattr(Member, "forget_draft", forget_draft)
    with pytest.raises(AssertionError):
        compare(model, 30, 1)


def test_a_wrong_guess_that_passes_for_right_is_noticed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the check itself."""

    def go_on(one: Member[Event], token: int) -> None:
        if one.drafter is not None:
            one.drafter.add(token)
        if not one.draft:
            one.waiting = [token]

    monkeypatch.setattr(model, "drafting", Eager(model), raising=False)
    monkeypatch.setattr(Member, "go_on", go_on)
    with pytest.raises(AssertionError):
        compare(model, 30, 1)


def test_replies_in_shared_passes_are_those_alone(model: Model, drafting: str) -> None:
    prompts = [model.tokenizer.encode(text) for text in TEXTS] * 2
    seeds = list(range(len(prompts)))
    ways: list[Any] = [{"temperature": 0.0}, {"temperature": 0.8, "logprobs": 1, "presence_penalty": 0.5}]
    for options in ways:
        together: list[list[Any]] = [[] for _ in prompts]
        for i, event in model.generate_many(prompts, 40, running=5, seeds=seeds, **options):
            together[i] += said([event])
        alone = [
            said(model.generate(prompt, 40, seed=seed, draft=False, **options))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        assert together == alone


def test_rollouts_are_the_same(model: Model) -> None:
    prompts = [model.tokenizer.encode(text) for text in TEXTS]
    ends = model.metadata["eos_token_ids"]
    for temperature in (0.0, 1.0):
        found = [rollout(model, prompts, 3, 30, ends, temperature, [1], draft) for draft in (False, True)]
        assert found[0] == found[1]


@pytest.mark.parametrize("after", range(0, 12, 3))
def test_a_cancel_comes_after_the_same_token(model: Model, drafting: str, after: int) -> None:
    prompt = model.tokenizer.encode(TEXTS[1])

    def stopped(draft: bool) -> tuple[list[Any], list[int], list[int]]:
        session = CachedSession(model)
        events: list[Any] = []
        generation = model.generate(
            prompt, 40, session=session, cancel=lambda: len(events) > after, draft=draft, temperature=0.0
        )
        for event in generation:
            events += said([event])
            assert generation.tokens == [each[0] for each in events if each[0] is not None]
        assert session.session.position == len(session.tokens)
        return events, generation.tokens, session.tokens

    assert stopped(True) == stopped(False)


def test_a_reply_that_is_left_leaves_its_session_as_it_was(model: Model, drafting: str) -> None:
    """Between two events, and after another reply has taken the session over."""
    prompt = model.tokenizer.encode(TEXTS[1])
    other = model.tokenizer.encode(TEXTS[1] + " blue")
    held: dict[bool, list[list[int]]] = {True: [], False: []}
    rows: dict[bool, list[bytes]] = {True: [], False: []}
    for draft in (False, True):
        session = CachedSession(model)
        generation = model.generate(prompt, 30, session=session, draft=draft, temperature=0.0)
        for _ in zip(range(9), generation, strict=False):
            held[draft].append(session.tokens.copy())
            fork = session.fork()
            rows[draft].append(fork.session.forward([5]).tobytes())
        held[draft].append(
            [e.token or -1 for e in model.generate(other, 9, session=session, temperature=0.0)]
        )
        with pytest.raises(ValueError, match="another reply goes on"):
            list(generation)
    assert held[True] == held[False] and rows[True] == rows[False]


def test_the_context_ends_a_reply_at_the_same_token(padded: Model, drafting: str) -> None:
    for context in (64, 65, 70, 300):
        prompt = [5, 6, 7] * 20
        events = [
            said(
                padded.generate(
                    prompt, session=CachedSession(padded, context), draft=draft, temperature=0.0,
                    logit_bias=dict.fromkeys(padded.metadata["eos_token_ids"], -1e4),
                )
            )
            for draft in (False, True)
        ]  # fmt: skip
        assert events[0] == events[1] and len(events[0]) == context - len(prompt)


def test_what_a_grammar_leaves_no_choice_of_comes_in_one_pass(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "drafting", Eager(model), raising=False)
    monkeypatch.setattr(draft_module, "LEAST", 2.0)  # no text is a guess
    text = "The only text that may come is this one, word by word."
    generation = model.generate(model.tokenizer.encode("A"), 90, choice=[text], seed=1)
    assert str(generation.result()) == text
    assert generation.stats.accepted_tokens >= 4


def test_the_only_token_that_may_come_is_not_drawn(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = ReplyState._next

    class Only:
        """A mask that allows one token each time."""

        def allowed(self) -> NDArray[np.bool_]:
            return np.arange(model.config.n_tokens) == 70

        def accept(self, token: int) -> None:
            assert token == 70

        def prepare(self) -> None:
            pass

    def watched(state: ReplyState, logits: NDArray[np.float32]) -> int:
        monkeypatch.delattr(type(state._sampler), "sample", raising=False)
        return sample(state, logits)

    plain = said(model.generate([1, 2], 5, mask=Only(), logprobs=0))
    monkeypatch.setattr(ReplyState, "_next", watched)
    assert [e[:4] for e in said(model.generate([1, 2], 5, mask=Only()))] == [e[:4] for e in plain]
    with pytest.raises(AttributeError, match="sample"):  # the control
        list(model.generate([1, 2], 5))


class DamagedEngine(Engine):
    """Logits after any token that is not in `expected` at its place are not finite."""

    expected: list[int]

    def forward(self, batch: Any, logits: Any = "last") -> list[NDArray[np.float32]]:
        outputs = super().forward(batch, logits)
        for output, (session, ids) in zip(outputs, batch, strict=True):
            begin = session.position - len(ids)
            right = [self.expected[begin + i] == id for i, id in enumerate(ids)]
            for i in range(len(output) if not isinstance(logits, str) else 0):
                if not all(right[: i + 1]):
                    output[i] = (np.nan, -np.inf, np.inf)[i % 3]
        return outputs


class Damaged(Model, DamagedEngine):
    """A model over it."""


def test_a_row_after_a_wrong_guess_may_hold_anything(model: Model) -> None:
    """Logits that are not finite are an error where they are used, and only there."""
    prompt = model.tokenizer.encode(TEXTS[0])
    plain = said(model.generate(prompt, 30, draft=False, temperature=0.0))
    damaged = Damaged(model.path, threads=1)
    damaged.drafting = Hostile(damaged)
    damaged.expected = [*prompt, *[event[0] for event in plain], *[-1] * 5000]
    assert said(damaged.generate(prompt, 30, temperature=0.0)) == plain
    damaged.expected[len(prompt) + 9] = -1
    with pytest.raises(ValueError, match="not finite|largest logit is"):
        damaged.drafting = Eager(damaged, damaged)
        list(damaged.generate(prompt, 30, temperature=0.0))


# ----------------------------------------------------------------------------
# How long drafts are


def lengths(drafting: Drafting, chance: float, kind: int | None = None, **rows: int) -> int:
    draft = Draft([1] * 15, [chance**0.5] + [chance] * 14, kind)
    return drafting.lengths([draft], rows.get("n_decoding", 1), rows.get("n_prompt", 0))[0]


def test_a_draft_is_as_long_as_it_promises_to_win(model: Model) -> None:
    drafting = Drafting(model)
    assert lengths(drafting, 0.0) == 0
    assert lengths(drafting, 0.999) == 15
    assert 0 < lengths(drafting, 0.5) < 8
    for _ in range(100):  # a machine whose rows cost as much as passes: nothing can be won
        for n in range(1, 17):
            drafting.costs.learn(n, 0.01 * n)
    assert lengths(drafting, 0.9) == 0
    for _ in range(100):  # and one where they cost nothing
        for n in range(1, 17):
            drafting.costs.learn(n, 0.01)
    assert lengths(drafting, 0.5) > 5
    assert lengths(drafting, 0.5, n_prompt=200) < 3  # others wait for the prompts


def test_a_pass_that_the_machine_disturbed_changes_little() -> None:
    costs = Costs()
    for _ in range(200):
        for n in (1, 4, 8):
            costs.learn(n, 0.01 * (1 + n / 8))
    before = costs.of(8)
    assert before == pytest.approx(2 / 1.125, rel=0.02)
    costs.learn(8, 60.0)
    assert costs.of(8) == pytest.approx(before, rel=0.08)


def test_what_a_pass_costs_follows_what_it_took() -> None:
    costs = Costs()
    for seconds in (1.0, 0.01):  # the second machine is a hundred times as fast, and rows cost more there
        for _ in range(300):
            for n in (1, 2, 16):
                costs.learn(n, seconds * n)
        assert [costs.of(n) for n in (1, 2, 16)] == pytest.approx([1, 2, 16], rel=0.02)
        assert costs.relative(3 * seconds) == pytest.approx(3, rel=0.02)
    assert costs.of(400) > costs.of(64)


def test_guesses_that_are_wrong_lose_their_chance_and_get_it_back() -> None:
    general = Chances()
    own, other = Chances(general), Chances(general)
    first = own.of(0)
    for _ in range(30):
        own.learn(0, False)
    assert own.of(0) < 0.1 * first and other.of(0) < first
    for _ in range(60):
        own.learn(0, True)
    assert own.of(0) > 0.8
    for _ in range(2000):
        own.relax(MODEL)
    assert own.of(MODEL) == pytest.approx(general.of(MODEL))
    for _ in range(200):
        own.learn(MODEL, False)
    assert general.of(MODEL) < 0.1
    for _ in range(3000):
        own.relax(MODEL)
    assert own.of(MODEL) > 0.4


def test_a_draft_says_what_came_after_the_same_words() -> None:
    drafter = Drafter([1, 2, 3, 4, 5, 6, 1, 2], Shelf(), False, tuple)
    drafter.add(3)
    draft = drafter.draft(4)
    assert draft is not None and draft.tokens == [4, 5, 6, 1] and draft.kind is None
    assert draft.chances == sorted(draft.chances)
    drafter.add(9)
    assert drafter.draft(4) is None
    for token in (7, 8, 7, 8, 7):
        drafter.add(token)
    draft = drafter.draft(6)
    assert draft is not None and draft.tokens == [8, 7, 8, 7, 8, 7]  # what repeats itself goes on so


def test_forced_tokens_are_tried_first() -> None:
    drafter = Drafter([1, 2, 3, 1], Shelf(), False, lambda: [7, 8])
    drafter.add(2)
    assert drafter.draft(1) == Draft([7], [draft_module.PRIORS[FORCED]], FORCED)


def test_a_long_text_is_looked_up_to_its_end() -> None:
    drafter = Drafter([1, 2, 3], Shelf(), False, tuple)
    r = random.Random(1)
    text = [r.randrange(1000) for _ in range(5000)]
    for token in [*text, *text[4000:4100]]:
        drafter.add(token)
    draft = drafter.draft(9)
    assert draft is not None and draft.tokens == text[4100:4109]


# ----------------------------------------------------------------------------
# Texts of others


def test_texts_are_seen_in_their_namespace_alone(model: Model) -> None:
    drafting = Drafting(model)
    drafting.shelf("a").put([11, 12, 13, 14, 15, 16])
    for namespace, expected in (("a", [14, 15, 16]), ("b", None), (None, None)):
        drafter = drafting.drafter([1, 11, 12], tuple, namespace)
        drafter.add(13)
        draft = drafter.draft(9)
        assert (draft and draft.tokens) == expected


def test_how_good_guesses_are_is_learned_in_their_namespace_alone(model: Model) -> None:
    drafting = Drafting(model)
    before = drafting.shelf("b").chances.of(0)
    drafter = drafting.drafter([1, 2], tuple, "a")
    for token in [1, 2, 3] * 50:
        drafter.add(token)
    assert drafting.shelf("a").chances.of(len(MATCHES) - 1) != Chances().of(len(MATCHES) - 1)
    assert drafting.shelf("b").chances.of(0) == before
    drafting.drafter([1, 2], tuple).add(3)


def test_namespaces_that_nobody_asks_for_are_forgotten(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_module, "SHELVES", 3)
    drafting = Drafting(model)
    first, second = drafting.shelf("0"), drafting.shelf("1")
    for name in ("2", "0", "3"):
        drafting.shelf(name)
    assert drafting.shelf("0") is first and drafting.shelf("1") is not second


# ----------------------------------------------------------------------------
# A smaller model


def test_a_model_of_another_vocabulary_is_refused(model: Model, padded: Model) -> None:
    with pytest.raises(ValueError, match="cannot draft for .*another tokenizer") as error:
        model.draft_with(padded)
    assert "\n" not in str(error.value)


def test_a_smaller_model_that_reads_along_guesses_what_it_would_say(model: Model) -> None:
    small = Small(model)
    prompt = model.tokenizer.encode(" ".join(TEXTS * 9))
    said = [e.token or 0 for e in model.generate(prompt, 30, temperature=0.0, draft=False)]
    reader, known, passes = small.reader(), prompt.copy(), 0
    while not (guesses := small.guess([(reader, known, 5)])[0]):
        passes += 1
    assert passes == (len(prompt) - 1) // draft_module.CATCH_UP and guesses == said[:5]
    known += [*said[:3], said[3] + 1]  # one of them was wrong
    assert small.guess([(reader, known, 2)])[0] == [
        e.token for e in model.generate(known, 2, temperature=0.0, draft=False)
    ]
    assert small.guess([(small.reader(), known * 40, 2)]) == [[]]  # longer than its context
    assert small.seconds > 0


def test_a_smaller_model_that_is_damaged_harms_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = model.tokenizer.encode(TEXTS[0])
    plain = said(model.generate(prompt, 12, draft=False, seed=1))
    monkeypatch.setattr(model, "drafting", Eager(model, model), raising=False)
    monkeypatch.setattr(
        Small, "guess", lambda self, asked: [[int(np.argmax(np.full(9, np.nan)))] for _ in asked]
    )
    assert said(model.generate(prompt, 12, seed=1)) == plain


# ----------------------------------------------------------------------------
# Lookups


def naive(texts: list[int], tail: list[int], oldest: int) -> tuple[int, int]:
    best = (0, -1)
    for place in range(len(texts) - 1, oldest - 1, -1):
        length = 0
        while length < min(LONGEST, len(tail), place - oldest):
            if texts[place - 1 - length] != tail[len(tail) - 1 - length] or tail[-1 - length] == BETWEEN:
                break
            length += 1
        if length >= 2 and length > best[0]:
            best = (length, place)
    return best


@pytest.mark.parametrize("capacity", [60, 250, 5000])
@pytest.mark.parametrize("letters", [2, 3, 9])
def test_the_newest_of_the_longest_matches_is_found(capacity: int, letters: int) -> None:
    r = random.Random(letters)
    lookup, text, agreed = Lookup(capacity), [], 0
    for _ in range(1500):
        text.append(r.randrange(letters) if r.random() < 0.99 else BETWEEN)
        lookup.add(text[-1:])
        expected = naive(text, text, max(0, len(text) - lookup.capacity))
        found = lookup.find(lookup)
        agreed += found == expected
        if found[0]:  # among many places not all are looked at, but what is found is true
            assert naive(text[: found[1] + 1], text, max(0, len(text) - lookup.capacity))[0] >= found[0]
            after = lookup.read(found[1], 5)
            ends = [*text[found[1] : found[1] + 5], BETWEEN]
            assert after == ends[: ends.index(BETWEEN)]
    assert agreed > (1200 if letters > 2 else 500)


def test_a_match_that_goes_on_is_not_lost_among_many_places() -> None:
    lookup, r = Lookup(), random.Random(1)
    text = [r.randrange(50) for _ in range(40)]
    lookup.add(text)
    for _ in range(300):
        lookup.add([*text[30:32], 99])  # places after the same two tokens, newer than the one that is right
    place = -1
    for token in text[10:39]:
        lookup.add((token,))
        place = lookup.find(lookup, place)[1]
    assert lookup.read(place, 1) == text[39:40]


def test_what_is_forgotten_is_not_read() -> None:
    lookup = Lookup(60)
    lookup.add(range(1000))
    assert lookup.read(1000 - lookup.capacity - 1, 3) == [] and lookup.read(-1, 3) == []
    assert lookup.read(997, 9) == [997, 998, 999] and len(lookup) == 1000


def test_speed_figures_count_what_was_guessed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "drafting", Eager(model), raising=False)

    def figures(draft: bool) -> Stats:
        prompt = model.tokenizer.encode(TEXTS[1])
        return model.generate(prompt, 40, temperature=0.0, draft=draft).result().stats

    plain, drafted = figures(False), figures(True)
    assert (plain.tokens_per_pass, plain.drafted_tokens) == (1.0, 0)
    assert drafted.generated_tokens == plain.generated_tokens
    assert 0 < drafted.accepted_tokens <= drafted.drafted_tokens
    assert drafted.decode_passes == drafted.generated_tokens - 1 - drafted.accepted_tokens
