"""/tokenize, /detokenize, /apply-template, /tokenizer_info say what the tokenizer and the template do."""

from __future__ import annotations

from typing import Any

import pytest
from servers import Client, Server

TEXT = "def f(x): é\u20ac 日本 <|im_end|>"


@pytest.mark.parametrize("name", ["prompt", "content", "text"])
def test_a_text_becomes_its_tokens_control_tokens_included(client: Client, box: Server, name: str) -> None:
    tokenizer = box.model.tokenizer
    body = client.ok("/tokenize", **{name: TEXT})
    ids = tokenizer.encode(TEXT, special=True)
    assert body == {"tokens": ids, "count": len(ids), "max_model_len": box.served.context}
    assert client.ok("/tokenize", **{name: TEXT}, parse_special=False)["tokens"] == tokenizer.encode(TEXT)
    assert client.ok("/tokenize", **{name: ""})["tokens"] == []


def test_tokens_may_come_with_their_texts(client: Client, box: Server) -> None:
    tokenizer = box.model.tokenizer
    body = client.ok("/tokenize", content=TEXT, with_pieces=True, return_token_strs=True)
    raw = b"".join(
        one["piece"].encode() if isinstance(one["piece"], str) else bytes(one["piece"])
        for one in body["tokens"]
    )
    assert raw.decode() == TEXT
    assert [one["id"] for one in body["tokens"]] == tokenizer.encode(TEXT, special=True)
    assert body["token_strs"] == [tokenizer.decode([one["id"]]) for one in body["tokens"]]


def test_a_conversation_becomes_the_tokens_of_the_template(thinker: Client, tiny: Server) -> None:
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi <|im_end|>"}]
    expected = tiny.model.chat_prompt(messages, thinking=False)
    fields: dict[str, Any] = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    assert thinker.ok("/tokenize", **fields)["tokens"] == expected
    assert thinker.ok("/apply-template", **fields) == {"prompt": tiny.model.tokenizer.decode(expected)}


def test_tokens_become_their_text_again(client: Client) -> None:
    ids = client.ok("/tokenize", content=TEXT)["tokens"]
    assert client.ok("/detokenize", tokens=ids) == {"prompt": TEXT, "content": TEXT}
    assert client.ok("/detokenize", tokens=[]) == {"prompt": "", "content": ""}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "a", "content": "a"}, "content"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"content": "a", "with_piece": True}, "with_piece"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False},
         "add_generation_prompt"),
        ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, 4096]}, "tokens[1]"), ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/apply-template", {}, "messages"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_names_the_field(
    client: Client, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = client.post(path, fields)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_the_tokenizer_says_what_lm_eval_asks_of_it(thinker: Client, tiny: Server) -> None:
    """Its remote tokenizer reads these names, and encodes the end token's text to know its id."""
    info = thinker.get("/tokenizer_info").body
    assert (
        info["eos_token"] == "<|im_end|>"
        and info["pad_token"] == "<|endoftext|>"
        and info["bos_token"] is None
    )
    assert info["chat_template"] == tiny.model.chat_template.source
    assert info["model_max_length"] == tiny.served.context
    end = thinker.ok("/tokenize", prompt=info["eos_token"], add_special_tokens=False)["tokens"]
    assert end == tiny.model.metadata["eos_token_ids"][:1]
