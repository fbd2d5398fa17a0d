"""Conversations: what was said stays said, whatever happens to a reply.

python -m pytest tests/test_conversation.py
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_models import TINY_QWEN3, export_small_model

from qwen3c import Model
from qwen3c.conversation import SETTINGS, Conversation, read_conversation
from qwen3c.drivers.reply import ContextFullError


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(str(TINY_QWEN3), threads=1)


def talk(model: Model, **options: Any) -> Conversation:
    return Conversation(model, **{"max_tokens": 8, "seed": 1, "thinking": False} | options)


def say(conversation: Conversation, text: str) -> str:
    generation = conversation.ask(text)
    return "".join(event.text for event in generation)


def contents(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def test_replies_are_those_of_the_whole_conversation(model: Model) -> None:
    conversation = talk(model, system="be brief")
    messages: list[dict[str, Any]] = [{"role": "system", "content": "be brief"}]
    for i, text in enumerate(["one", "two", "three"]):
        messages.append({"role": "user", "content": text})
        prompt = model.chat_prompt(messages, thinking=False)
        # the seed moves on, or asking again would bring the same reply again
        expected = "".join(event.text for event in model.generate(prompt, 8, seed=1 + i))
        assert say(conversation, text) == expected
        messages.append({"role": "assistant", "content": expected})
    assert conversation.messages == messages[1:]


def test_a_reply_stays_as_far_as_it_came(model: Model) -> None:
    conversation = talk(model)
    generation = conversation.ask("hi")
    shown = next(generation).text + next(generation).text + next(generation).text
    assert contents(conversation) == ["hi", shown]
    assert say(conversation, "go on") and contents(conversation)[:3] == ["hi", shown, "go on"]


def test_a_question_without_one_token_of_reply_was_not_asked(model: Model) -> None:
    conversation = talk(model)
    say(conversation, "hi")
    before = conversation.messages
    (event,) = conversation.ask("never mind", cancel=lambda: True)
    assert event.finish_reason == "cancelled" and conversation.messages == before
    (event,) = conversation.regenerate(cancel=lambda: True)
    assert conversation.messages == before
    with pytest.raises(ValueError, match="the context holds 2048"):
        conversation.ask("much " * 2000)
    assert conversation.messages == before


def test_regenerating_replaces_the_last_reply(model: Model) -> None:
    conversation = talk(model, temperature=2.0)
    with pytest.raises(ValueError, match="no reply yet"):
        conversation.regenerate()
    first = say(conversation, "hi")
    second = "".join(event.text for event in conversation.regenerate())
    assert first != second and contents(conversation) == ["hi", second]
    conversation.clear()
    assert conversation.messages == []


def test_settings_hold_from_the_next_reply_on(model: Model) -> None:
    conversation = talk(model)
    assert list(conversation.effective_settings()) == list(SETTINGS)
    assert conversation.effective_settings()["temperature"] == 0.7  # without thinking
    conversation.set("temperature", 0)
    conversation.set("max_tokens", 3)
    greedy = say(conversation, "hi")
    conversation.clear()
    assert say(conversation, "hi") == greedy
    conversation.set("temperature", None)
    assert conversation.effective_settings()["temperature"] == 0.7
    for name, value in [
        ("nothing", 1),
        ("top_k", -1),
        ("top_k", "5"),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
    ]:
        with pytest.raises(ValueError, match=name):
            conversation.set(name, value)
    assert conversation.settings["max_tokens"] == 3


def test_thinking_can_be_switched_where_the_model_can(model: Model, tmp_path: Path) -> None:
    conversation = talk(model)
    conversation.set_thinking(True)
    assert conversation.effective_settings()["temperature"] == 0.6
    always = Model(str(export_small_model(tmp_path, thinking="always")), threads=1)
    with pytest.raises(ValueError, match="always thinks"):
        Conversation(always, thinking=False)
    with pytest.raises(ValueError, match="always thinks"):
        Conversation(always).set_thinking(False)


def test_a_saved_conversation_goes_on(model: Model, tmp_path: Path) -> None:
    conversation, path = talk(model, system="be kind"), tmp_path / "c.json"
    say(conversation, "hi 🎉")
    conversation.save(str(path))
    other = talk(model)
    other.load(str(path))
    assert (other.system, other.messages) == ("be kind", conversation.messages)
    conversation.clear()
    conversation.save(str(path))  # over an older one
    assert read_conversation(path) == ("be kind", [])
    assert os.listdir(tmp_path) == ["c.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"{}", b"null", b'{"qwen3c": "conversation"}', b"[" * 100_000,
     b'{"qwen3c": "conversation", "system": 5, "messages": []}',
     b'{"qwen3c": "conversation", "system": null, "messages": [{"role": "cat", "content": ""}]}'],
)  # fmt: skip
def test_other_files_are_neither_loaded_nor_written_over(
    model: Model, tmp_path: Path, content: bytes
) -> None:
    conversation, path = talk(model), tmp_path / "c.json"
    say(conversation, "hi")
    before = conversation.messages
    path.write_bytes(content)
    for act in (conversation.load, conversation.save):
        with pytest.raises(ValueError, match=r"c\.json is not a saved conversation") as caught:
            act(str(path))
        assert "\n" not in str(caught.value)
    assert conversation.messages == before and path.read_bytes() == content


def test_a_save_that_fails_leaves_the_old_file(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, path = talk(model), tmp_path / "c.json"
    say(conversation, "hi")
    conversation.save(str(path))
    saved = path.read_bytes()
    say(conversation, "again")
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)  # what was written may not be on the disk
    with pytest.raises(ZeroDivisionError):
        conversation.save(str(path))
    assert path.read_bytes() == saved and os.listdir(tmp_path) == ["c.json"]


def test_a_full_context_ends_the_conversation_or_drops_its_oldest_turns(model: Model) -> None:
    conversation = Conversation(model, 256, max_tokens=4, seed=1, thinking=False, system="be brief")
    said: list[str] = []
    with pytest.raises(ContextFullError):
        while len(said) < 100:
            text = f"message {len(said)} " + "ab " * 10
            say(conversation, text)
            said.append(text)
    n_before = len(conversation.messages)
    assert 4 < n_before < 100 and conversation.forgotten == 0
    with pytest.raises(ContextFullError):
        say(conversation, text)
    conversation.set("overflow", "drop")
    dropped_at = []
    for i in range(30):
        before = conversation.forgotten
        generation = conversation.ask(f"and {i} " + "ab " * 10)
        list(generation)
        if conversation.forgotten > before:
            dropped_at.append(i)
            # the rest is what a model is asked that never heard of the oldest turns
            assert conversation.messages[conversation.forgotten]["role"] == "user"
        else:
            assert generation.stats.cached_tokens > 100 // 2
        told = [
            {"role": "system", "content": "be brief"},
            *conversation.messages[conversation.forgotten : -1],
        ]
        assert generation.stats.prompt_tokens == len(model.chat_prompt(told, False)) <= 256 - 4
    # nothing is lost, and half of the context is made free, so that it is seldom read again
    assert len(conversation.messages) == n_before + 60
    assert dropped_at and min(b - a for a, b in itertools.pairwise(dropped_at)) > 1
    n = len(conversation.messages)
    list(conversation.regenerate())
    assert len(conversation.messages) == n
    conversation.clear()
    assert conversation.forgotten == 0


def test_turns_are_dropped_whole_and_system_messages_never(model: Model, tmp_path: Path) -> None:
    turn: list[dict[str, Any]] = [
        {"role": "user", "content": "ab " * 10},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "one"},
    ]
    messages = [{"role": "system", "content": "RULES"}, *turn * 6]
    data = {"qwen3c": "conversation", "system": None, "messages": messages}
    (tmp_path / "c.json").write_text(json.dumps(data))
    conversation = Conversation(model, 256, max_tokens=4, thinking=False, overflow="drop")
    conversation.load(str(tmp_path / "c.json"))
    prompts: list[list[dict[str, Any]]] = []
    chat_prompt = model.chat_prompt
    model.chat_prompt = lambda told, thinking, tools: (prompts.append(told), chat_prompt(told, thinking))[1]  # type: ignore[assignment, func-returns-value, misc]
    try:
        say(conversation, "go on")
    finally:
        del model.chat_prompt
    assert conversation.forgotten > 1 and (conversation.forgotten - 1) % 4 == 0
    assert all(told[0] == messages[0] and told[1]["role"] == "user" for told in prompts)


def test_a_question_that_does_not_fit_alone_is_refused_and_nothing_dropped(model: Model) -> None:
    conversation = Conversation(model, 128, max_tokens=4, thinking=False, overflow="drop")
    say(conversation, "hi")
    with pytest.raises(ContextFullError):
        conversation.ask("ab " * 200)
    assert conversation.forgotten == 0 and len(conversation.messages) == 2


def test_the_context_can_be_changed_and_what_was_said_stays(model: Model) -> None:
    conversation = Conversation(model, 128, max_tokens=4, seed=1, thinking=False)
    say(conversation, "hi")
    before = conversation.messages
    for value in (0, 2049, "many", 1.5):
        with pytest.raises((ValueError, TypeError), match="context|int"):
            conversation.set("context", value)
        assert conversation.effective_settings()["context"] == 128
    conversation.set("context", 512)
    assert conversation.messages == before and conversation.session.context == 512
    say(conversation, "ab " * 150)
    conversation.set("context", None)
    assert conversation.effective_settings()["context"] == 128
    with pytest.raises(ContextFullError):
        say(conversation, "ab")


def test_stop_strings_are_a_setting(model: Model) -> None:
    conversation = talk(model, temperature=0, max_tokens=30)
    full = say(conversation, "hi")
    conversation.clear()
    conversation.set("stop", full[5:8])
    assert say(conversation, "hi") == full[: full.index(full[5:8])]
    conversation.set("stop", None)
    conversation.clear()
    assert say(conversation, "hi") == full
    with pytest.raises(ValueError, match="non-empty"):
        conversation.set("stop", [""])
    with pytest.raises(ValueError, match="overflow = 'away' is neither stop nor drop"):
        conversation.set("overflow", "away")


def test_a_path_that_cannot_be_a_conversation_is_named_as_it_was_given(model: Model, tmp_path: Path) -> None:
    conversation = talk(model)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        for act in (conversation.load, conversation.save):
            with pytest.raises(ValueError, match=f"{path} is not a file"):
                act(str(path))  # and does not wait for somebody to write into the pipe
    for act in (conversation.load, conversation.save):
        with pytest.raises(ValueError, match="~nosuchuser/x: there is no such home directory"):
            act("~nosuchuser/x")
    with pytest.raises(FileNotFoundError) as caught:
        conversation.save(str(tmp_path / "no" / "c.json"))
    assert caught.value.filename == str(tmp_path / "no" / "c.json")


def test_the_home_directory_is_found(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    conversation = talk(model)
    say(conversation, "hi")
    conversation.save("~/c.json")
    assert read_conversation(tmp_path / "c.json")[1] == conversation.messages
    conversation.load("~/c.json")
