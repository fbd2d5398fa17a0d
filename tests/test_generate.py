"""The token loop: the same text however it is reached, every reason to stop, nothing lost.

python -m pytest tests/test_generate.py
"""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import TINY_QWEN3, export_small_model

from qwen3c import Model
from qwen3c.format import ModelFileError
from qwen3c.generate import CachedSession, ContextFullError, Event, Generation

PROMPT = "def fibonacci(n):\n"


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(str(TINY_QWEN3), threads=1)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Random weights: with thinking, tool and chat tokens, and rows of the vocabulary that are no tokens."""
    return Model(str(export_small_model(tmp_path_factory.mktemp("random"))), threads=1)


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def ids(model: Model, text: str = PROMPT) -> list[int]:
    return model.tokenizer.encode(text)


# ----------------------------------------------------------------------------
# The text


def test_greedy_text_is_that_of_a_plain_loop(model: Model) -> None:
    session, expected, logits = model.session(), [], None
    logits = session.forward(ids(model))
    for _ in range(40):
        expected.append(int(np.argmax(logits[: model.config.n_tokens])))
        logits = session.forward(expected[-1:])
    generation = model.generate(ids(model), 40, temperature=0)
    events = list(generation)
    assert [event.token for event in events] == generation.tokens == expected
    assert text_of(events) == model.tokenizer.decode(expected) == generation.reply.text


def test_the_seed_decides_the_text_and_is_reported(model: Model) -> None:
    def text(**sampling: Any) -> str:
        return text_of(list(model.generate(ids(model), 30, **sampling)))

    assert text(seed=1) == text(seed=1) != text(seed=2)
    generation = model.generate(ids(model), 30)
    first = text_of(list(generation))
    assert first == text(seed=generation.stats.seed)


def test_text_does_not_depend_on_what_was_cached(model: Model) -> None:
    session = CachedSession(model)
    prompts = [PROMPT, PROMPT + "    if n", PROMPT + "    while", PROMPT, "import os\n", PROMPT + "    if n"]
    for text in prompts:
        cached = model.generate(ids(model, text), 12, session=session, seed=3)
        assert list(cached) == list(model.generate(ids(model, text), 12, seed=3))
    assert cached.stats.cached_tokens == 0  # "import os" came between
    again = model.generate(ids(model, PROMPT + "    if n"), 12, session=session, seed=3)
    assert list(again)
    assert again.stats.cached_tokens == len(ids(model, PROMPT + "    if n")) - 1  # but for the last


def test_a_reply_is_reused_as_part_of_the_next_prompt(model: Model) -> None:
    session = CachedSession(model)
    first = model.generate(ids(model), 20, session=session, temperature=0)
    list(first)
    assert session.tokens == [*ids(model), *first.tokens[:-1]]
    second = model.generate([*ids(model), *first.tokens, 5, 6], 5, session=session, temperature=0)
    list(second)
    assert second.stats.cached_tokens == len(ids(model)) + 19


@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_pieces_of_a_prompt_change_nothing(
    model: Model, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ids(model, "import sys\n" * 60)
    whole = list(model.generate(prompt, 8, seed=1))
    monkeypatch.setattr("qwen3c.generate.FIRST_PIECE", size)
    monkeypatch.setattr("qwen3c.generate.LARGEST_PIECE", size)
    done: list[tuple[int, int]] = []
    assert list(model.generate(prompt, 8, seed=1, progress=lambda *d: done.append(d))) == whole
    assert [d for d, _ in done] == sorted(
        {min(n, len(prompt)) for n in range(size, len(prompt) + size, size)}
    )
    assert {total for _, total in done} == {len(prompt)}


def test_padding_rows_are_never_sampled(random_model: Model) -> None:
    assert random_model.config.n_tokens < random_model.config.vocab_size
    for seed in range(10):
        reply = model_tokens(random_model, seed)
        assert max(reply) < random_model.config.n_tokens


def model_tokens(model: Model, seed: int) -> list[int]:
    generation = model.generate(ids(model, "a"), 60, temperature=20.0, top_k=0, top_p=1.0, seed=seed)
    list(generation)
    return generation.tokens


def test_events_hold_the_whole_text_of_any_tokens(random_model: Model) -> None:
    """Random tokens: bytes that are no characters, tags, ends. Only tags and their newlines may go."""
    end = set(random_model.metadata["eos_token_ids"])
    tags = {
        random_model.tokenizer.control_id(t) for t in ("<think>", "</think>", "<tool_call>", "</tool_call>")
    }
    plain = 0
    for seed in range(40):
        generation = random_model.generate(
            ids(random_model, "a"), 30, temperature=20.0, top_k=0, top_p=1.0, seed=seed
        )
        text = text_of(list(generation))
        if not tags & set(generation.tokens):
            plain += 1
            assert text == random_model.tokenizer.decode(t for t in generation.tokens if t not in end)
    assert plain > 5


# ----------------------------------------------------------------------------
# Reasons to stop


def test_max_tokens_bound_the_reply(model: Model) -> None:
    for n in (1, 2, 7):
        generation = model.generate(ids(model), n, temperature=0)
        events = list(generation)
        assert len(events) == len(generation.tokens) == generation.stats.generated_tokens == n
        assert [event.finish_reason for event in events] == [None] * (n - 1) + ["length"]
    (only,) = model.generate(ids(model), 0)
    assert (only.token, only.text, only.finish_reason) == (None, "", "length")


def test_prompt_and_reply_stay_within_the_context(model: Model) -> None:
    prompt = ids(model)
    session = CachedSession(model, len(prompt) + 5)
    generation = model.generate(prompt, session=session, temperature=0)
    assert list(generation)[-1].finish_reason == "length" and len(generation.tokens) == 5
    exact = model.generate(prompt, session=CachedSession(model, len(prompt)))
    assert [event.finish_reason for event in exact] == ["length"] and exact.tokens == []
    with pytest.raises(
        ValueError, match=f"prompt is {len(prompt)} tokens, the context holds {len(prompt) - 1}"
    ):
        model.generate(prompt, session=CachedSession(model, len(prompt) - 1))


def test_end_tokens_end_the_reply_and_do_not_show(random_model: Model) -> None:
    end = random_model.metadata["eos_token_ids"][0]
    (event,) = random_model.generate(ids(random_model, "a"), 9, temperature=0, logit_bias={end: 1e4})
    assert (event.token, event.text, event.finish_reason) == (end, "", "stop")


def test_stop_strings_end_the_reply_across_tokens_and_do_not_show(model: Model) -> None:
    full = text_of(list(model.generate(ids(model), 60, temperature=0)))
    for start in range(2, len(full) - 8, 7):
        stop = full[start : start + 5]
        generation = model.generate(ids(model), 60, temperature=0, stop=["never in it", stop])
        events = list(generation)
        assert text_of(events) == full[: full.index(stop)]
        assert events[-1].finish_reason == generation.stats.finish_reason == "stop"
    assert text_of(list(model.generate(ids(model), 60, temperature=0, stop="never in it"))) == full


def test_text_held_back_comes_out_in_the_end(model: Model) -> None:
    full = text_of(list(model.generate(ids(model), 20, temperature=0)))
    events = list(model.generate(ids(model), 20, temperature=0, stop=full[-3:] + "not this"))
    assert text_of(events) == full and events[-1].finish_reason == "length"


def test_cancel_ends_prefill_and_decode(model: Model) -> None:
    prompt = ids(model, "x = 1\n" * 150)
    session, pieces = CachedSession(model), []

    def late() -> bool:
        return len(pieces) >= 2

    generation = model.generate(prompt, session=session, cancel=late, progress=lambda *d: pieces.append(d))
    assert [event.finish_reason for event in generation] == ["cancelled"]
    assert generation.tokens == [] and 0 < len(session.tokens) < len(prompt)
    stop = threading.Event()
    generation = model.generate(prompt, session=session, cancel=stop.is_set, seed=1)
    events = []
    for event in generation:
        events.append(event)
        if len(events) == 5:
            stop.set()
    assert [event.finish_reason for event in events] == [None] * 5 + ["cancelled"]
    assert generation.stats.cached_tokens == pieces[-1][0]
    assert text_of(events) == model.tokenizer.decode(generation.tokens)
    # and the session is as good as a new one
    again = list(model.generate(prompt, 10, session=session, seed=1))
    assert again == list(model.generate(prompt, 10, seed=1))


def test_a_reply_may_be_left_alone_halfway(model: Model) -> None:
    session = CachedSession(model)
    generation = model.generate(ids(model), 50, session=session, seed=1)
    for _ in range(4):
        next(generation)
    del generation
    assert list(model.generate(ids(model), 9, session=session, seed=1)) == list(
        model.generate(ids(model), 9, seed=1)
    )


def test_an_interrupted_forward_leaves_the_session_usable(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = CachedSession(model)
    list(model.generate(ids(model), 3, session=session, seed=1))

    class Interrupted:
        """Forwards, and is interrupted before anybody hears of it."""

        def __init__(self, inner: Any) -> None:
            self.rewind, self.inner = inner.rewind, inner

        def forward(self, ids: list[int]) -> None:
            self.inner.forward(ids)
            raise KeyboardInterrupt

    inner = session.session
    session.session = Interrupted(inner)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        list(model.generate(ids(model, "import os"), 9, session=session, seed=1))
    session.session = inner
    assert list(model.generate(ids(model), 9, session=session, seed=1)) == list(
        model.generate(ids(model), 9, seed=1)
    )


class InterruptedAt:
    """A session of the engine that is interrupted once: before or after the engine did what was asked."""

    def __init__(self, inner: Any, method: str, after: bool) -> None:
        self.inner, self.method, self.after = inner, method, after

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            interrupts = name == self.method
            if interrupts and not self.after:
                raise KeyboardInterrupt
            result = getattr(self.inner, name)(*args)
            if interrupts:
                raise KeyboardInterrupt
            return result

        return call


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", ["forward", "rewind"])
def test_a_session_never_claims_more_than_it_holds_wherever_it_is_interrupted(
    model: Model, method: str, after: bool
) -> None:
    """Between the engine's call and the list of tokens: in either order of the two, one interrupt tells."""
    session = CachedSession(model)
    session.forward(ids(model))
    inner = session.session
    session.session = InterruptedAt(inner, method, after)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        session.forward([5, 6, 7]) if method == "forward" else session.rewind(3)
    session.session = inner
    assert len(session.tokens) <= inner.position
    prompt = [*ids(model), 5, 6, 7, 8]
    assert list(model.generate(prompt, 5, session=session, seed=1)) == list(model.generate(prompt, 5, seed=1))


# ----------------------------------------------------------------------------
# What events and statistics say


def test_the_rate_of_a_cancelled_prompt_is_that_of_the_tokens_read(model: Model) -> None:
    prompt, pieces = ids(model, "x = 1\n" * 150), []
    generation = model.generate(
        prompt, cancel=lambda: len(pieces) >= 2, progress=lambda done, total: pieces.append(done)
    )
    list(generation)
    stats = generation.stats
    assert 0 < stats.read_tokens == pieces[-1] < len(prompt) == stats.prompt_tokens
    assert stats.prefill_rate == stats.read_tokens / stats.prefill_seconds


def test_a_prompt_that_does_not_fit_says_what_the_model_can_hold(model: Model) -> None:
    for context, more in [
        (7, r"; this model can hold 2048 \(-c 2048\)$"),
        (2048, "; this model holds no more$"),
    ]:
        n = context + 1
        with pytest.raises(
            ContextFullError, match=f"prompt is {n} tokens, the context holds {context}{more}"
        ):
            model.generate([1] * n, session=CachedSession(model, context))


def test_logprobs_are_those_of_the_logits(model: Model) -> None:
    generation = model.generate(ids(model), 5, temperature=0, presence_penalty=1.5, logprobs=3)
    session = model.session()
    logits = session.forward(ids(model))
    for event in generation:
        x = logits[: model.config.n_tokens].astype(np.float64)
        expected = x - (x.max() + math.log(np.exp(x - x.max()).sum()))
        assert event.logprob == pytest.approx(expected[event.token], abs=1e-4)
        assert event.top_logprobs is not None
        assert [id for id, _ in event.top_logprobs] == list(np.argsort(-expected, kind="stable")[:3])
        logits = session.forward([event.token])
    assert next(model.generate(ids(model), 1)).logprob is None
    assert next(model.generate(ids(model), 1, logprobs=0)).top_logprobs == []


def test_statistics_count_what_happened(model: Model) -> None:
    generation = model.generate(ids(model), 10, seed=5)
    list(generation)
    stats = generation.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (len(ids(model)), 0, 10)
    assert stats.seed == 5 and stats.finish_reason == "length"
    assert stats.prefill_seconds > 0 < stats.decode_seconds
    assert stats.decode_rate == pytest.approx(9 / stats.decode_seconds)
    assert stats.prefill_rate == pytest.approx(len(ids(model)) / stats.prefill_seconds)


class Scripted(Model):
    """A model whose tokens are given: what it would say is what the test needs it to."""

    script: list[int] = []

    def generate(self, prompt: Any, *args: Any, **options: Any) -> Generation:
        generation = super().generate(prompt, *args, **options)
        tokens = iter(self.script)
        generation._sampler.sample = lambda logits: next(tokens)  # type: ignore[method-assign]
        return generation


def scripted(model: Model, said: str, prompt: list[int]) -> Generation:
    other = Scripted(model.path, threads=1)
    other.script = other.tokenizer.encode(said, special=True)
    return other.generate(prompt, max_tokens=len(other.script))


@pytest.mark.parametrize(
    ("thinking", "said", "thought", "answer"),
    [
        (True, "<think>\nhm\n</think>\n\nyes<|im_end|>", "hm", "yes"),
        (True, "<think>\nhm", "hm", ""),
        (False, "yes<|im_end|>", "", "yes"),
    ],
)
def test_thought_and_answer_come_apart(
    random_model: Model, thinking: bool, said: str, thought: str, answer: str
) -> None:
    prompt = random_model.chat_prompt([{"role": "user", "content": "<think>"}], thinking=thinking)
    generation = scripted(random_model, said, prompt)
    list(generation)
    assert (generation.reply.thinking, generation.reply.text) == (thought, answer)
    message = generation.reply.message()
    assert message["content"] == answer and message.get("reasoning_content", "") == thought


def test_a_prompt_that_opens_thought_makes_the_reply_start_in_it(tmp_path: Path) -> None:
    model = Model(str(export_small_model(tmp_path, thinking="always")), threads=1)
    prompt = model.chat_prompt([{"role": "user", "content": "hi"}])
    generation = scripted(model, "hm\n</think>\n\nyes<|im_end|>", prompt)
    list(generation)
    assert (generation.reply.thinking, generation.reply.text) == ("hm", "yes")
    # a thought of long ago, never closed, is not the reply's
    raw = model.tokenizer.encode_escaped("<think>\nhm<|im_end|>\n<|im_start|>assistant\n")
    generation = scripted(model, "yes<|im_end|>", raw)
    list(generation)
    assert (generation.reply.thinking, generation.reply.text) == ("", "yes")


def test_tool_calls_come_whole(random_model: Model) -> None:
    said = 'So:\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call><|im_end|>'
    generation = scripted(random_model, said, ids(random_model, "a"))
    events = list(generation)
    assert [event.tool_call for event in events if event.tool_call] == [
        {"name": "f", "arguments": {"a": "é"}}
    ]
    assert generation.reply.text == "So:" and generation.reply.finish_reason == "stop"
    assert generation.reply.message()["tool_calls"][0]["function"]["arguments"] == {"a": "é"}


# ----------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    ("prompt", "options", "complaint"),
    [
        ([], {}, "prompt is empty"),
        ("text", {}, "prompt is text"),
        ([1], {"max_tokens": -1}, "max_tokens = -1"),
        ([1], {"logprobs": -1}, "logprobs = -1"),
        ([1], {"temperature": -1}, "temperature = -1"),
        ([1], {"top_k": 1.5}, "top_k = 1.5"),
        ([1], {"stop": [""]}, "non-empty strings"),
        ([1], {"logit_bias": {1 << 30: 1.0}}, "does not exist"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_computed(
    model: Model, prompt: Any, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        model.generate(prompt, **options)


def test_a_token_beyond_the_vocabulary_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match=str(model.config.vocab_size)):
        list(model.generate([1, model.config.vocab_size], 1))


def test_defaults_follow_the_prompt(random_model: Model) -> None:
    user = [{"role": "user", "content": "hi"}]
    assert random_model.may_think(random_model.chat_prompt(user))
    assert not random_model.may_think(random_model.chat_prompt(user, thinking=False))
    assert random_model.sampling(True).top_p == 0.95 and random_model.sampling(False).top_p == 0.8
    assert random_model.sampling(False, top_p=0.5, top_k=None).top_p == 0.5


def test_model_files_with_senseless_defaults_are_refused(tmp_path: Path) -> None:
    from qwen3c.format import ModelFile, ModelWriter

    path = export_small_model(tmp_path)
    file = ModelFile(path)
    metadata = file.metadata | {"generation": {"top_p": 7}}
    with ModelWriter(tmp_path / "bad.bin", file.config, metadata, file.tokenizer, file.template) as writer:
        for tensor in writer.tensors:
            writer.write(file.data(tensor))
            writer.end_tensor()
    with pytest.raises(
        ModelFileError, match=r"bad\.bin: metadata: generation: top_p = 7 is not a number from 0 to 1"
    ):
        Model(str(tmp_path / "bad.bin"))


def test_a_file_whose_tokenizer_cannot_be_read_says_so(tmp_path: Path) -> None:
    from qwen3c.format import ModelFile, ModelWriter

    file = ModelFile(export_small_model(tmp_path))
    with ModelWriter(tmp_path / "bad.bin", file.config, file.metadata, b"{}", file.template) as writer:
        for tensor in writer.tensors:
            writer.write(file.data(tensor))
            writer.end_tensor()
    with pytest.raises(ModelFileError, match=r"bad\.bin: tokenizer\.json: "):
        _ = Model(str(tmp_path / "bad.bin")).tokenizer
