"""The token loop: the same text however it is reached, every reason to stop, nothing lost.

python -m pytest tests/drivers/test_generate.py
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import TINY_QWEN3, export_small_model

from qwen3c import Model
from qwen3c.drivers.batch import CachedSession, forward
from qwen3c.drivers.generate import Generation
from qwen3c.drivers.reply import ContextFullError, Event
from qwen3c.format import ModelFileError

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
    # all but the last token, whose logits are needed
    assert again.stats.cached_tokens == len(ids(model, PROMPT + "    if n")) - 1


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
    monkeypatch.setattr("qwen3c.drivers.batch.FIRST_PIECE", size)
    monkeypatch.setattr("qwen3c.drivers.batch.LARGEST_PIECE", size)
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
    session = CachedSession(model)
    pieces: list[tuple[int, int]] = []

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

    def forward_and_interrupt(*arguments: Any) -> None:
        """The pass is computed, then interrupted before its tokens are recorded."""
        Model.forward(model, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "forward", forward_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(model.generate(ids(model, "import os"), 9, session=session, seed=1))
    monkeypatch.undo()
    assert list(model.generate(ids(model), 9, session=session, seed=1)) == list(
        model.generate(ids(model), 9, seed=1)
    )


class InterruptedAt:
    """A model or session that is interrupted once: before or after the engine did what was asked."""

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
    """An interrupt before or after the engine's work leaves session and list of tokens consistent."""
    session = CachedSession(model)
    forward(model, [(session, ids(model))])
    inner = session.session
    with pytest.raises(KeyboardInterrupt):
        if method == "forward":
            forward(InterruptedAt(model, method, after), [(session, [5, 6, 7])])  # type: ignore[arg-type]
        session.session = InterruptedAt(inner, method, after)  # type: ignore[assignment]
        session.rewind(3)
    session.session = inner
    assert len(session.tokens) <= inner.position
    prompt = [*ids(model), 5, 6, 7, 8]
    assert list(model.generate(prompt, 5, session=session, seed=1)) == list(model.generate(prompt, 5, seed=1))


# ----------------------------------------------------------------------------
# What events and statistics say


def test_the_rate_of_a_cancelled_prompt_is_that_of_the_tokens_read(model: Model) -> None:
    prompt = ids(model, "x = 1\n" * 150)
    pieces: list[int] = []
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
        logits = session.forward([event.token])  # type: ignore[arg-type]
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
    """A model whose next tokens the test chooses."""

    script: list[int] = []

    def generate(self, prompt: Sequence[int], *args: Any, **options: Any) -> Generation:
        generation = super().generate(prompt, *args, **options)
        tokens = iter(self.script)
        generation._state._sampler.sample = lambda logits, allowed=None: next(tokens)  # type: ignore[method-assign]
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
    assert [call for event in events for call in event.tool_calls] == [{"name": "f", "arguments": {"a": "é"}}]
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
    n = model.config.vocab_size
    with pytest.raises(ValueError, match=rf"prompt\[1\] = {n} is no token: ids are 0 to {n - 1}"):
        model.generate([1, n], 1)


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


# ----------------------------------------------------------------------------
# The whole reply, the end of one, the session it goes on in


def test_the_result_is_the_whole_reply_wherever_it_is_asked_for(model: Model) -> None:
    expected = text_of(list(model.generate(ids(model), 20, seed=1)))
    generation = model.generate(ids(model), 20, seed=1)
    assert (generation.reply.text, generation.reply.finish_reason) == ("", None)
    for _ in range(5):
        next(generation)
    reply = generation.result()
    assert reply is generation.reply is generation.result()
    assert reply.text == expected and reply.stats is generation.stats and reply.finish_reason == "length"


def test_the_result_of_a_reply_that_an_error_ended_is_an_error(model: Model) -> None:
    def fail() -> bool:
        if len(generation.tokens) == 3:
            raise KeyboardInterrupt
        return False

    generation = model.generate(ids(model), 20, seed=1, cancel=fail)
    with pytest.raises(KeyboardInterrupt):
        generation.result()
    with pytest.raises(ValueError, match="an error ended this reply after 3 tokens"):
        generation.result()
    assert len(generation.tokens) == 3 and generation.reply.text


def test_closing_ends_the_reply_and_computes_nothing(model: Model) -> None:
    session = CachedSession(model)
    with model.generate(ids(model), 50, session=session, seed=1) as generation:
        shown = "".join(next(generation).text for _ in range(4))
        held = list(session.tokens)
    generation.close()
    assert list(generation) == [] and session.tokens == held
    reply = generation.result()
    assert reply.finish_reason == generation.stats.finish_reason == "cancelled"
    assert reply.text.startswith(shown) and reply.text == model.tokenizer.decode(generation.tokens)
    again = model.generate(ids(model), 9, session=session, seed=1)
    assert list(again) == list(model.generate(ids(model), 9, seed=1))
    assert again.stats.cached_tokens == len(ids(model)) - 1


def test_closing_gives_text_that_was_held_back(model: Model) -> None:
    full = text_of(list(model.generate(ids(model), 20, temperature=0)))
    generation = model.generate(ids(model), 20, temperature=0, stop=full[:4] + "not this")
    assert not next(generation).text
    generation.close()
    assert generation.reply.text and full.startswith(generation.reply.text)


def test_closing_before_the_beginning_or_after_the_end_changes_nothing(model: Model) -> None:
    session = CachedSession(model)
    whole = model.generate(ids(model), 5, session=session, seed=1).result()
    held = list(session.tokens)
    generation = model.generate(ids(model, "import os"), 5, session=session)
    generation.close()
    assert list(generation) == [] and generation.tokens == [] and session.tokens == held
    assert generation.reply.finish_reason == "cancelled"
    with model.generate(ids(model), 5, session=session, seed=1) as generation:
        assert generation.result() == generation.reply
    assert (generation.reply.text, generation.reply.finish_reason) == (whole.text, "length")


def test_closing_releases_the_memory_of_a_session_of_its_own(model: Model) -> None:
    generation = model.generate(ids(model), 5, seed=1)
    generation.result()
    assert generation.session.session.kv_bytes > 0
    generation.close()
    assert generation.session.session.kv_bytes == 0
    session = CachedSession(model)
    with model.generate(ids(model), 5, session=session, seed=1) as generation:
        generation.result()
    assert session.session.kv_bytes > 0


def test_a_reply_may_be_closed_from_its_own_callbacks(model: Model) -> None:
    generation = model.generate(
        ids(model, "x = 1\n" * 100), 9, progress=lambda done, total: generation.close()
    )
    assert [event.finish_reason for event in generation] == ["cancelled"]
    assert 0 < len(generation.session.tokens) < generation.stats.prompt_tokens


def test_a_reply_may_be_closed_by_another_thread(model: Model) -> None:
    for _ in range(20):
        generation = model.generate(ids(model), 100, seed=1)
        reader = threading.Thread(target=lambda generation=generation: list(generation))
        reader.start()
        while not generation.tokens:
            pass
        generation.close()
        tokens = list(generation.tokens)
        reader.join()
        assert generation.tokens == tokens and generation.reply.finish_reason in (
            "cancelled",
            "stop",
            "length",
        )
        assert generation.reply.text == model.tokenizer.decode(tokens)


def test_an_older_reply_cannot_go_on_in_a_session_that_another_took(model: Model) -> None:
    session = CachedSession(model)
    older = model.generate(ids(model), 20, session=session, seed=1)
    next(older)
    newer = model.generate(ids(model, "import os"), 5, session=session, seed=1)
    next(newer)
    with pytest.raises(ValueError, match="another reply goes on in the session of this one"):
        next(older)
    assert newer.result().text == model.generate(ids(model, "import os"), 5, seed=1).result().text


@pytest.mark.parametrize(
    ("prompt", "options", "complaint"),
    [
        (5, {}, r"prompt = 5 is not a list of token ids"),
        ([1, 1.5], {}, r"prompt = \[1, 1.5\] is not a list of token ids"),
        ([1, -3], {}, r"prompt\[1\] = -3 is no token: ids are 0 to \d+"),
        ([1], {"max_tokens": "5"}, r"max_tokens = '5' is not a whole number"),
        ([1], {"max_tokens": True}, r"max_tokens = True is not a whole number"),
        ([1], {"logprobs": "x"}, r"logprobs = 'x' is not a whole number"),
        ([1], {"stop": 5}, r"stop = 5 is not a text or a list of texts"),
        ([1], {"logit_bias": [1]}, r"logit_bias = \[1\] is not a dict of token ids and numbers"),
    ],
)
def test_arguments_of_another_type_are_named(
    model: Model, prompt: Any, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        model.generate(prompt, **options)


def test_a_session_that_cannot_serve_is_refused(model: Model, random_model: Model) -> None:
    with pytest.raises(
        ValueError, match="session is a Session, which does not know its tokens; pass a CachedSession"
    ):
        model.generate([1], session=model.session())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"session belongs to another model \\({random_model.path}\\)"):
        model.generate([1], session=CachedSession(random_model))


# ----------------------------------------------------------------------------
# In an event loop


def test_async_events_are_the_same_events_and_leave_the_loop_free(model: Model) -> None:
    async def read(seed: int) -> list[Event]:
        return [event async for event in model.generate(ids(model), 30, seed=seed)]

    async def several() -> tuple[list[list[Event]], int, set[str]]:
        ticks, threads = 0, set()

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        def heard() -> bool:
            threads.add(threading.current_thread() is threading.main_thread())
            return False

        ticking = asyncio.create_task(tick())
        replies = await asyncio.gather(read(1), read(2))
        async for _ in model.generate(ids(model), 3, cancel=heard):
            pass
        ticking.cancel()
        return replies, ticks, threads  # type: ignore[return-value]

    (first, second), ticks, in_main_thread = asyncio.run(several())
    assert first == list(model.generate(ids(model), 30, seed=1))
    assert second == list(model.generate(ids(model), 30, seed=2))
    assert ticks > 30 and in_main_thread == {False}  # type: ignore[comparison-overlap]


def test_cancelling_the_task_ends_the_reply_and_leaves_the_session_usable(model: Model) -> None:
    prompt = ids(model, "x = 1\n" * 150)

    async def cancelled(generation: Generation, when: Callable[..., object], times: int) -> None:
        async def read() -> None:
            async for _ in generation:
                pass

        task = asyncio.create_task(read())
        while not when():
            await asyncio.sleep(0)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        # nothing of the reply runs any more
        held = (list(generation.tokens), list(generation.session.tokens))
        await asyncio.sleep(0.05)
        assert held == (generation.tokens, generation.session.tokens)

    for times in (1, 3):
        session = CachedSession(model)
        pieces: list[tuple[int, int]] = []
        generation = model.generate(
            prompt, 200, session=session, progress=lambda *d, pieces=pieces: pieces.append(d)
        )
        asyncio.run(cancelled(generation, lambda pieces=pieces: pieces, times))
        assert generation.reply.finish_reason == "cancelled" and list(generation) == []
        assert generation.tokens == [] and len(session.tokens) < len(prompt)  # the next piece was not read
        assert list(model.generate(prompt, 5, session=session, seed=1)) == list(
            model.generate(prompt, 5, seed=1)
        )
        generation = model.generate(prompt, 200, session=session, seed=1)
        asyncio.run(cancelled(generation, lambda g=generation: len(g.tokens) > 3, times))
        assert generation.reply.finish_reason == "cancelled"
        assert generation.reply.text == model.tokenizer.decode(generation.tokens)


def test_a_loop_that_shuts_down_waits_for_the_step_under_way(model: Model) -> None:
    """asyncio.run cancels all tasks at its end; nothing must write to the session after that."""
    session = CachedSession(model)
    generation = model.generate(ids(model), 200, session=session, seed=1)

    async def main() -> None:
        async def read() -> None:
            async for _ in generation:
                pass

        reading = asyncio.create_task(read())
        while not generation.tokens:
            await asyncio.sleep(0)
        assert not reading.done()

    asyncio.run(main())
    assert generation.reply.finish_reason == "cancelled" and list(generation) == []


def test_an_error_of_a_step_reaches_the_task(model: Model) -> None:
    def fail() -> bool:
        raise ArithmeticError("of the caller's own")

    async def read() -> None:
        async for _ in model.generate(ids(model), 3, cancel=fail):
            pass

    with pytest.raises(ArithmeticError, match="of the caller's own"):
        asyncio.run(read())
