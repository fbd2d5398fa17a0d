"""POST /v1/completions says what the model itself says, of texts and of token ids, whole and in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from servers import Client, Server, running
from small_models import token_id, write_small_model

from qwen3c import Model
from qwen3c.convert.export import export
from qwen3c.drivers.reply import Vocabulary
from qwen3c.drivers.sampler import Sampler, Sampling

PATH = "/v1/completions"
TEXT = "def f(x):\n    return "


def texts(body: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in body["choices"]]


def gathered(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of a stream, put together."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in event["choices"]:
            choice = found.setdefault(piece["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert choice["finish_reason"] is None, "something came after the end"
            choice["text"] += piece["text"]
            choice["finish_reason"] = piece["finish_reason"]
            if piece["logprobs"] is not None:
                sum_ = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
                choice["logprobs"] = {name: sum_[name] + piece["logprobs"][name] for name in sum_}
            for name in ("token_ids", "prompt_token_ids"):
                if name in piece:
                    choice[name] = choice.get(name, []) + piece[name]
    return [found[i] for i in sorted(found)]


def scores(model: Model, ids: list[int]) -> list[float]:
    """The log-probability of each token but the first, straight from the engine."""
    vocabulary: Vocabulary = model.vocabulary
    sampler = Sampler(Sampling(), (), vocabulary.n_tokens, vocabulary.undefined)
    (rows,) = model.forward([(model.session(len(ids)), ids)], "all")
    return [sampler.logprobs(row, id, 0)[0] for row, id in zip(rows, ids[1:], strict=False)]


# ----------------------------------------------------------------------------
# Prompts


def test_a_completion_is_what_the_model_says(client: Client, box: Server) -> None:
    body = client.ok(PATH, prompt=TEXT, max_tokens=12, seed=5, temperature=0.8)
    expected = box.model.complete(TEXT, 12, seed=5, temperature=0.8)
    assert texts(body) == [str(expected)]
    assert body["choices"][0]["finish_reason"] == expected.finish_reason
    n_prompt = len(box.model.text_prompt(TEXT))
    assert body["usage"]["prompt_tokens"] == n_prompt
    assert body["usage"]["completion_tokens"] == expected.stats.generated_tokens
    assert body["usage"]["total_tokens"] == n_prompt + expected.stats.generated_tokens


def test_without_max_tokens_sixteen_come(client: Client) -> None:
    for given in ({}, {"max_tokens": None}):
        body = client.ok(PATH, prompt=TEXT, logit_bias={"4091": -10000, "4089": -10000}, **given)
        assert body["usage"]["completion_tokens"] == 16
        assert body["choices"][0]["finish_reason"] == "length"


def test_a_prompt_is_a_text_or_token_ids_or_a_list_of_either(client: Client, box: Server) -> None:
    ids = box.model.tokenizer.encode
    fields: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
    one = texts(client.ok(PATH, prompt="import os", **fields))
    other = texts(client.ok(PATH, prompt="def f", **fields))
    assert texts(client.ok(PATH, prompt=ids("import os"), **fields)) == one
    assert texts(client.ok(PATH, prompt=["import os", "def f"], **fields)) == one + other
    assert texts(client.ok(PATH, prompt=[ids("import os"), ids("def f")], **fields)) == one + other


def test_choices_are_listed_prompt_by_prompt_and_each_prompt_has_the_same_seeds(client: Client) -> None:
    fields: dict[str, Any] = {"max_tokens": 5, "temperature": 1.5}
    body = client.ok(PATH, prompt=["import", "def"], n=3, seed=7, **fields)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    alone = [
        texts(client.ok(PATH, prompt=prompt, seed=7 + i, **fields))[0]
        for prompt in ("import", "def")
        for i in range(3)
    ]
    assert texts(body) == alone
    assert len(set(alone)) > 2
    assert body["usage"]["prompt_tokens"] == 2, "each prompt counts once"


def test_control_tokens_in_a_text_are_such_unless_it_is_asked_to_be_text_alone(
    client: Client, box: Server
) -> None:
    tokenizer = box.model.tokenizer
    for special in (True, False):
        body = client.ok(
            PATH, prompt="<|im_start|>user", max_tokens=1, return_token_ids=True, parse_special=special
        )
        assert body["choices"][0]["prompt_token_ids"] == tokenizer.encode("<|im_start|>user", special=special)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [("", "prompt"), ([], "prompt"), ([[]], "prompt"), (["a", ""], "prompt[1]"), ([[1], []], "prompt[1]")],
)
def test_an_empty_prompt_is_an_error_where_no_token_begins_a_text(
    client: Client, prompt: Any, param: str
) -> None:
    answer = client.post(PATH, prompt=prompt)
    assert (answer.status, answer.error["param"]) == (400, param)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a model whose vocabulary puts a token before each text, as Llama's does."""
    directory = tmp_path_factory.mktemp("opened")
    source = write_small_model(directory / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    begin = {"id": "<|endoftext|>", "ids": [token_id("<|endoftext|>")], "tokens": ["<|endoftext|>"]}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": begin},
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    export(source, directory / "model.bin")
    with running({"m": directory / "model.bin"}) as server:
        yield server


def test_what_begins_a_text_is_read_and_scored_but_does_not_show(opened: Server) -> None:
    client, begin = Client(opened.address), token_id("<|endoftext|>")
    fields: dict[str, Any] = {"max_tokens": 1, "echo": True, "logprobs": 0, "return_token_ids": True}
    (empty,) = client.ok(PATH, prompt="", **fields)["choices"]
    assert empty["prompt_token_ids"] == [begin]
    ids = opened.model.tokenizer.encode("ab c")
    (choice,) = client.ok(PATH, prompt="ab c", **fields)["choices"]
    assert choice["prompt_token_ids"] == [begin, *ids] == opened.model.text_prompt("ab c")
    assert choice["text"].startswith("ab c")
    assert choice["logprobs"]["text_offset"][:3] == [0, 0, len(opened.model.tokenizer.decode(ids[:1]))]
    assert choice["logprobs"]["text_offset"][-1] == len("ab c")
    for given in ({"prompt": "<|endoftext|>ab c"}, {"prompt": [begin, *ids]}):
        assert client.ok(PATH, **given, **fields)["choices"][0]["prompt_token_ids"] == [begin, *ids], "once"
    bare = client.ok(PATH, prompt="ab c", add_special_tokens=False, **fields)
    assert bare["choices"][0]["prompt_token_ids"] == ids
    assert client.ok("/tokenize", prompt="ab c")["tokens"] == [begin, *ids]
    assert client.ok("/tokenize", content="ab c")["tokens"] == ids


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (5, "prompt"), ({}, "prompt"), ([1, "a"], "prompt[1]"), ([1, True], "prompt[1]"),
        ([1.5], "prompt[0]"),
        ([-1], "prompt[0]"), ([[1], [1 << 63]], "prompt[1][0]"), ([[1], "a"], "prompt[0]"), (None, "prompt"),
        ([4096], "prompt[0]"),
    ],
)  # fmt: skip
def test_a_prompt_that_is_none_names_the_place(client: Client, prompt: Any, param: str) -> None:
    answer = client.post(PATH, prompt=prompt)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_a_prompt_beyond_the_context_says_both_numbers(client: Client) -> None:
    answer = client.post(PATH, prompt=[5] * 600)
    assert answer.status == 400
    assert answer.error["code"] == "context_length_exceeded"
    assert (answer.error["n_prompt_tokens"], answer.error["n_ctx"]) == (600, 512)
    assert answer.error["param"] == "prompt"


def test_a_prompt_that_fills_the_context_ends_by_length(client: Client) -> None:
    body = client.ok(PATH, prompt=[5] * 512, max_tokens=9)
    assert body["choices"][0] | {"text": ""} == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "length",
    }  # fmt: skip
    assert [one["finish_reason"] for one in gathered(client.events(PATH, prompt=[5] * 512))] == ["length"]


def test_more_sequences_than_the_queue_ever_holds_are_no_matter_of_waiting(client: Client) -> None:
    answer = client.post(PATH, prompt=["a"] * 13)
    assert (answer.status, answer.error["code"]) == (400, "too_many_sequences")


# ----------------------------------------------------------------------------
# Echo and log-probabilities


def test_echo_scores_every_token_of_the_prompt_as_the_engine_does(client: Client, box: Server) -> None:
    ids = box.model.tokenizer.encode(TEXT)
    body = client.ok(PATH, prompt=[ids], max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1234)
    (choice,) = body["choices"]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {len(ids) + 1}
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:-1] == scores(box.model, ids)
    assert choice["text"].startswith(TEXT)


def test_is_greedy_can_be_told_by_exact_equality(client: Client, box: Server) -> None:
    """lm-eval compares a token's log-probability with the largest of those listed: the same float, or
    greater.
    """
    ids = box.model.tokenizer.encode(TEXT)
    body = client.ok(PATH, prompt=[ids], max_tokens=1, echo=True, logprobs=1, temperature=0)
    logprobs = body["choices"][0]["logprobs"]
    (rows,) = box.model.forward([(box.model.session(len(ids)), ids)], "all")
    greedy = [int(np.argmax(row)) == id for row, id in zip(rows, ids[1:], strict=False)]
    told = [
        logprob == max(top.values())
        for logprob, top in zip(logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1], strict=True)
    ]
    assert told == greedy
    assert True in told and False in told
    assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())


@pytest.mark.parametrize("prompt", ["a né\u20ac of 日本語 x", "tabs\t\n\nand lines", "😀 face"])
@pytest.mark.parametrize("stream", [False, True])
def test_text_offsets_say_where_tokens_begin(client: Client, prompt: str, stream: bool) -> None:
    fields: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": 8,
        "echo": True,
        "logprobs": 2,
        "temperature": 0,
    }
    choices = gathered(client.events(PATH, **fields)) if stream else client.ok(PATH, **fields)["choices"]
    (choice,) = choices
    logprobs, text = choice["logprobs"], choice["text"]
    assert text.startswith(prompt)
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0
    for token, begin in zip(logprobs["tokens"], offsets, strict=True):
        if not token.startswith("bytes:"):
            assert text[begin : begin + len(token)] in (token, "")


def test_tokens_that_read_alike_do_not_hide_each_other(client: Client) -> None:
    body = client.ok(PATH, prompt="日本語", max_tokens=1, echo=True, logprobs=20)
    for top in body["choices"][0]["logprobs"]["top_logprobs"][1:]:
        assert len(top) >= 20
    body = client.ok(
        PATH, prompt=[5, 6], max_tokens=1, echo=True, logprobs=0, return_tokens_as_token_ids=True
    )
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == ["token_id:5", "token_id:6"]
    assert list(logprobs["top_logprobs"][1]) == ["token_id:6"]


def test_with_max_tokens_zero_the_prompt_alone_is_scored(client: Client, box: Server) -> None:
    body = client.ok(PATH, prompt=[TEXT, "import os"], max_tokens=0, echo=True, logprobs=0)
    assert texts(body) == [TEXT, "import os"]
    for choice, prompt in zip(body["choices"], (TEXT, "import os"), strict=True):
        ids = box.model.tokenizer.encode(prompt)
        assert choice["logprobs"]["token_logprobs"] == [None, *scores(box.model, ids)]
        assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0


def test_log_probabilities_are_those_of_the_model_whatever_the_sampling(client: Client, box: Server) -> None:
    fields: dict[str, Any] = {"prompt": TEXT, "max_tokens": 6, "logprobs": 3, "seed": 2}
    body = client.ok(PATH, **fields, temperature=1.5, presence_penalty=1, return_token_ids=True)
    (choice,) = body["choices"]
    options: Any = {"logprobs": 3, "seed": 2, "temperature": 1.5, "presence_penalty": 1}
    events = [*box.model.generate(box.model.text_prompt(TEXT), 6, **options)]
    assert choice["token_ids"] == [event.token for event in events]
    assert choice["logprobs"]["token_logprobs"] == [event.logprob for event in events]
    for event, top in zip(events, choice["logprobs"]["top_logprobs"], strict=True):
        assert event.top_logprobs is not None
        assert list(top.values())[:3] == [logprob for _, logprob in event.top_logprobs]


# ----------------------------------------------------------------------------
# Streams, ends, what a tag means


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 0}, {"return_token_ids": True},
        {"echo": True, "logprobs": 1, "return_token_ids": True}, {"n": 3}, {"stop": ["e", "\n"]},
        {"echo": True, "max_tokens": 0}, {"echo": True, "max_tokens": 0, "logprobs": 1}, {"max_tokens": 0},
        {"response_format": {"type": "regex", "regex": "[ab]{4}"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_stream_says_what_the_whole_answer_says(client: Client, fields: dict[str, Any]) -> None:
    asked = {"prompt": [TEXT, "日本"], "max_tokens": 9, "seed": 3, "temperature": 1.2} | fields
    body = client.ok(PATH, **asked)
    events = client.events(PATH, stream_options={"include_usage": True}, **asked)
    whole = [{key: value for key, value in choice.items() if key != "index"} for choice in body["choices"]]
    assert gathered(events[:-1]) == whole
    assert events[-1]["choices"] == []
    tokens = body["usage"] | {"prompt_tokens_details": None}
    assert events[-1]["usage"] | {"prompt_tokens_details": None} == tokens
    assert {event["id"] for event in events} == {events[0]["id"]}


def test_the_usage_chunk_comes_only_if_it_is_asked_for(client: Client) -> None:
    assert all("usage" not in event for event in client.events(PATH, prompt="a", max_tokens=2))


def test_a_stop_text_ends_the_reply_and_does_not_show(client: Client) -> None:
    whole = texts(client.ok(PATH, prompt=TEXT, max_tokens=40, temperature=0))[0]
    stop = whole[len(whole) // 2 :][:3]
    body = client.ok(PATH, prompt=TEXT, max_tokens=40, temperature=0, stop=stop)
    assert texts(body) == [whole[: whole.index(stop)]]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_tags_are_text_and_nothing_is_taken_out(thinker: Client, tiny: Server) -> None:
    """A bare text has no thought and no tool calls: what the tokens spell is what comes."""
    tokenizer = tiny.model.tokenizer
    tags = [tokenizer.control_id(tag) for tag in ("<think>", "</think>")]
    bias = {str(tag): 100 for tag in tags} | {"198": 99}
    for stream in (False, True):
        fields: dict[str, Any] = {"prompt": "<think>\n", "max_tokens": 12, "logit_bias": bias, "seed": 1}
        fields |= {"temperature": 2, "return_token_ids": True}
        choices = (
            gathered(thinker.events(PATH, **fields)) if stream else thinker.ok(PATH, **fields)["choices"]
        )
        assert choices[0]["text"] == tokenizer.decode(choices[0]["token_ids"])
        assert "think>" in choices[0]["text"]


def test_a_format_holds_and_a_bad_one_is_refused_at_once(client: Client) -> None:
    body = client.ok(PATH, prompt="x", max_tokens=8, guided_choice=["ab", "cd"])
    assert texts(body)[0] in ("ab", "cd")
    answer = client.post(PATH, prompt="x", guided_regex="(")
    assert (answer.status, answer.error["param"]) == (400, "guided_regex")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"), ({"messages": []}, "messages"),
        ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"), ({"echo": 1}, "echo"),
        ({"max_tokens": -1}, "max_tokens"), ({"max_token": 5}, "max_token"),
        ({"temprature": 1}, "temprature"),
        ({"logit_bias": {"4096": 1}}, "logit_bias.4096"), ({"logit_bias": {"foo": 1}}, "logit_bias.foo"),
        ({"stream_options": {"include_usage": True}}, "stream_options"), ({"ignore_eos": True}, "ignore_eos"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"), ({"n_predict": 5}, "n_predict"),
        ({"skip_special_tokens": True}, "skip_special_tokens"), ({"n": 0}, "n"),
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_the_meaning_and_cannot_be_done_is_refused_by_name(
    client: Client, fields: dict[str, Any], param: str
) -> None:
    answer = client.post(PATH, prompt="x", **fields)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_what_changes_nothing_is_taken_and_what_nobody_knows_is_named(client: Client) -> None:
    nothing: dict[str, Any] = {"user": "me", "best_of": 1, "suffix": "", "logit_bias": {"foo": 0}}
    answer = client.post(PATH, prompt="x", max_tokens=1, zebra=1, **nothing)
    assert answer.status == 200
    assert answer.headers["x-qwen3c-ignored"] == "zebra"


def test_openai_python_reads_it(python: openai.OpenAI) -> None:
    whole = python.completions.create(model="m", prompt="def f", max_tokens=5, seed=1, logprobs=2, echo=True)
    pieces = [*python.completions.create(model="m", prompt="def f", max_tokens=5, seed=1, stream=True)]
    assert whole.choices[0].text == "def f" + "".join(piece.choices[0].text for piece in pieces)
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.text_offset is not None
    assert whole.usage is not None and whole.usage.completion_tokens <= 5
    with pytest.raises(openai.BadRequestError) as error:
        python.completions.create(model="m", prompt="def f", suffix="x")
    assert error.value.param == "suffix"
