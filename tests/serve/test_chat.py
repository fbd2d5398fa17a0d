"""POST /v1/chat/completions says what Model.chat says, whole and in pieces, and lets go of what nobody waits
for.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import openai
import pytest
from pydantic import BaseModel
from servers import Client, Server, asking, eventually, running
from small_models import TINY_QWEN3, export_small_model, token_id

from qwen3c.serve.ask import Ask, KeyLimits
from qwen3c.serve.errors import ApiError
from qwen3c.serve.scheduler import Scheduler

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "What is 27 + 45?"}]
NO_END = {"4091": -10000, "4089": -10000}  # of the model in the box
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
        },
    },
}


def gathered(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of a stream, put together as a client does it."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in event["choices"]:
            choice = found.setdefault(
                piece["index"],
                {"content": "", "reasoning_content": "", "calls": [], "logprobs": None, "finish": None},
            )
            assert choice["finish"] is None, "something came after the end"
            delta = piece["delta"]
            choice["content"] += delta.get("content", "")
            choice["reasoning_content"] += delta.get("reasoning_content", "")
            for call in delta.get("tool_calls", ()):
                assert call["index"] == len(choice["calls"])
                choice["calls"].append({key: value for key, value in call.items() if key != "index"})
            if piece["logprobs"] is not None:
                choice["logprobs"] = (choice["logprobs"] or []) + piece["logprobs"]["content"]
            choice["finish"] = piece["finish_reason"]
    return [found[i] for i in sorted(found)]


def whole(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a body, in the same form."""
    found = []
    for choice in body["choices"]:
        message, logprobs = choice["message"], choice["logprobs"]
        found.append(
            {
                "content": message["content"] or "",
                "reasoning_content": message.get("reasoning_content", ""),
                "calls": message.get("tool_calls", []),
                "logprobs": logprobs["content"] if logprobs else None,
                "finish": choice["finish_reason"],
            }
        )
    return found


# ----------------------------------------------------------------------------
# What comes


def test_a_reply_is_what_the_model_says(client: Client, box: Server) -> None:
    body = client.ok(PATH, messages=MESSAGES, seed=4, temperature=0.9)
    expected = box.model.chat(MESSAGES, seed=4, temperature=0.9)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    n_prompt = len(box.model.chat_prompt(MESSAGES))
    tokens = body["usage"]
    assert tokens["prompt_tokens"] == n_prompt
    assert tokens["completion_tokens"] == expected.stats.generated_tokens
    assert tokens["total_tokens"] == n_prompt + expected.stats.generated_tokens
    again = client.ok(PATH, messages=MESSAGES, seed=4, temperature=0.9)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == n_prompt - 1
    assert again["timings"]["cache_n"] == n_prompt - 1 and again["timings"]["prompt_n"] == 1
    assert whole(again) == whole(body)


def test_n_replies_are_those_of_as_many_seeds(thinker: Client) -> None:
    fields: dict[str, Any] = {"messages": MESSAGES, "temperature": 1.5, "max_tokens": 12}
    body = thinker.ok(PATH, n=4, seed=11, **fields)
    alone = [whole(thinker.ok(PATH, seed=11 + i, **fields))[0] for i in range(4)]
    assert whole(body) == alone
    assert len({one["content"] for one in alone}) == 4
    assert body["usage"]["prompt_tokens"] == thinker.ok(PATH, **fields)["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}, {"n": 3}, {"stop": ["a", " "]},
        {"max_tokens": 0},
        {"max_tokens": 1}, {"response_format": {"type": "json_object"}},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": "none"}, {"guided_choice": ["yes", "no"]},
        {"n": 2, "logprobs": True, "stop": "t"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("thinks", [False, True])
def test_a_stream_says_what_the_whole_answer_says(
    client: Client, thinker: Client, ranker: Client, fields: dict[str, Any], thinks: bool
) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 40, "seed": 3, "temperature": 1.1} | fields
    server = ranker if "tools" in fields else thinker if thinks else client  # who has tokens for calls
    body = server.ok(PATH, **asked)
    events = server.events(PATH, stream_options={"include_usage": True}, **asked)
    last = events.pop()
    found, expected = gathered(events), whole(body)
    for one in (*found, *expected):
        for call in one["calls"]:
            assert call.pop("id").startswith("call_")
    assert found == expected
    assert last["choices"] == [], "the usage is the last before [DONE]"
    assert last["usage"] | {"prompt_tokens_details": 0} == body["usage"] | {"prompt_tokens_details": 0}
    n: int = fields.get("n", 1)
    roles = [(event["choices"][0]["index"], event["choices"][0]["delta"].get("role")) for event in events[:n]]
    assert roles == [(i, "assistant") for i in range(n)]
    assert all(event["usage"] is None for event in events)


def test_thought_is_apart_from_the_answer_and_counted(ponderer: Server) -> None:
    client, end = Client(ponderer.address), token_id("</think>")
    options: Any = {"seed": 1, "logit_bias": {end: 4.0}}
    fields: dict[str, Any] = {
        "messages": MESSAGES,
        "max_tokens": 80,
        "seed": 1,
        "logit_bias": {str(end): 4.0},
    }
    expected = ponderer.model.chat(MESSAGES, 80, **options)
    assert expected.thinking and expected.text
    body = client.ok(PATH, **fields)
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (expected.thinking, expected.text)
    n_thought = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < n_thought < body["usage"]["completion_tokens"]
    assert gathered(client.events(PATH, **fields)) == whole(body)
    short = client.ok(PATH, **fields, thinking_budget=n_thought - 3)
    assert short["usage"]["completion_tokens_details"]["reasoning_tokens"] < n_thought
    answer = client.post(PATH, fields | {"chat_template_kwargs": {"enable_thinking": False}})
    assert (answer.status, answer.error["param"]) == (400, "chat_template_kwargs.enable_thinking")


def test_a_hybrid_model_can_be_told_not_to_think(thinker: Client, tiny: Server) -> None:
    expected = tiny.model.chat(MESSAGES, 20, seed=1, thinking=False).text
    for off in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        body = thinker.ok(PATH, messages=MESSAGES, max_tokens=20, seed=1, **off)
        assert whole(body)[0]["content"] == expected


def test_log_probabilities_are_those_of_the_model(client: Client, box: Server) -> None:
    fields: dict[str, Any] = {"seed": 9, "temperature": 1.3}
    body = client.ok(PATH, messages=MESSAGES, max_tokens=8, logprobs=True, top_logprobs=4, **fields)
    events = [*box.model.generate(box.model.chat_prompt(MESSAGES), 8, logprobs=4, **fields)]
    tokenizer = box.model.tokenizer
    shown = [event for event in events if event.token is not None and not tokenizer.is_control(event.token)]
    content = body["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in content] == [event.logprob for event in shown]
    assert [bytes(one["bytes"]) for one in content] == [
        tokenizer.token_bytes(event.token or 0) for event in shown
    ]
    for one, event in zip(content, shown, strict=True):
        assert [top["logprob"] for top in one["top_logprobs"]] == [
            logprob for _, logprob in event.top_logprobs or ()
        ]


def test_a_conversation_may_be_what_the_developer_says_alone(client: Client, box: Server) -> None:
    said = {"role": "system", "content": "Say hello."}
    answer = client.ok(PATH, messages=[said | {"role": "developer"}], max_tokens=2)
    assert answer["usage"]["prompt_tokens"] == len(box.model.chat_prompt([said]))


def test_developer_and_system_messages_join_into_the_first(client: Client, box: Server) -> None:
    messages = [
        {"role": "developer", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "system", "content": "two"}, {"role": "assistant", "content": None},
        {"role": "user", "content": "ho"},
    ]  # fmt: skip
    joined = [
        {"role": "system", "content": "one\n\ntwo"}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": ""}, {"role": "user", "content": "ho"},
    ]  # fmt: skip
    body = client.ok(PATH, messages=messages, seed=1)
    assert whole(body)[0]["content"] == box.model.chat(joined, seed=1).text
    assert body["usage"]["prompt_tokens"] == len(box.model.chat_prompt(joined))


def test_stop_texts_and_length_end_a_reply(client: Client) -> None:
    fields: dict[str, Any] = {"messages": MESSAGES, "temperature": 0}
    text = whole(client.ok(PATH, **fields))[0]["content"]
    middle = text[len(text) // 2 :][:2]
    (stopped,) = whole(client.ok(PATH, stop=[middle, "never this"], **fields))
    assert stopped["content"] == text[: text.index(middle)] and stopped["finish"] == "stop"
    (cut,) = whole(client.ok(PATH, max_completion_tokens=2, **fields))
    assert cut["finish"] == "length" and text.startswith(cut["content"])


# ----------------------------------------------------------------------------
# What cannot be done


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content[0].type"),
        ({"top_logprobs": 2}, "top_logprobs"), ({"n": 129}, "n"), ({"functions": []}, "functions"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema",
           "json_schema": {"name": "a", "strict": True, "schema": {"not": {}}}}},
         "response_format.json_schema.schema"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"), ({"modalities": ["audio"]}, "modalities"),
        ({"chat_template": "x"}, "chat_template"),
        ({"stream_options": {"include_usage": 1}}, "stream_options"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x"),
        ({"logit_bias": {"9999": 1}}, "logit_bias.9999"),
        ({"response_fromat": {}}, "response_fromat"), ({"stop": ["a", ""]}, "stop"),
        ({"priority": -1}, "priority"),
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_the_meaning_and_cannot_be_done_is_refused_by_name(
    client: Client, fields: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        answer = client.post(PATH, {"messages": MESSAGES, "stream": stream} | fields)
        assert answer.status == 400 and answer.error["param"].startswith(param)


def test_a_conversation_beyond_the_context_says_both_numbers(client: Client) -> None:
    answer = client.post(PATH, messages=[{"role": "user", "content": "word " * 600}])
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert answer.error["n_prompt_tokens"] > answer.error["n_ctx"] == 512


def test_there_is_nothing_elsewhere_and_nothing_for_other_methods(client: Client) -> None:
    for answer in (client.get("/v1/nothing"), client.post("/v2/chat/completions", {})):
        assert (answer.status, answer.error["code"]) == (404, "not_found")
    wrong = client.get(PATH)
    assert (wrong.status, wrong.error["code"]) == (405, "method_not_allowed")
    assert "POST" in wrong.headers["allow"]


# ----------------------------------------------------------------------------
# Waiting, reading, writing, and nobody there any more


def slow_down(server: Server, seconds: float) -> None:
    """Let every pass take a while."""
    batch = server.served.scheduler._batch
    run = batch.run

    def slowly(rows: Any) -> Any:
        time.sleep(seconds)
        return run(rows)

    batch.run = slowly  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def ponderer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a random model whose replies begin in thought."""
    with running({"m": export_small_model(tmp_path_factory.mktemp("ponderer"), thinking="always")}) as server:
        yield server


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    """A server of one place, whose every pass takes a while."""
    with running({"m": TINY_QWEN3}, running=1, queue=4) as server:
        slow_down(server, 0.02)
        yield server


def idle(scheduler: Scheduler) -> bool:
    return scheduler.n_running == scheduler.n_waiting == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("state", ["reading", "writing"])
def test_a_request_whose_client_leaves_is_let_go_of(slow: Server, state: str, stream: bool) -> None:
    scheduler = slow.served.scheduler
    counters = scheduler.counters
    prompt = f"{state} {stream} " + ("word " * 1500 if state == "reading" else "")
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 1500,
        "stream": stream,
    }
    fields |= {"logit_bias": {"4092": -10000}, "temperature": 1.5}
    read, written, passes = counters.prompt_tokens, counters.generated_tokens, 0
    with asking(slow.address, PATH, **fields):
        if state == "reading":
            eventually(lambda: counters.prompt_tokens > read)
            assert counters.generated_tokens == written
        else:
            eventually(lambda: counters.generated_tokens > written + 3)
        passes = counters.passes
    eventually(lambda: idle(scheduler))
    assert counters.passes - passes <= 10, "it went on after its client had left"
    if state == "reading":
        assert counters.generated_tokens == written
    answer = Client(slow.address).ok(PATH, messages=MESSAGES, max_tokens=2)
    assert answer["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_client_leaves_in_the_queue_never_runs(slow: Server, stream: bool) -> None:
    scheduler, counters = slow.served.scheduler, slow.served.scheduler.counters
    fields: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 1000, "logit_bias": {"4092": -10000}}
    before = counters.generated_tokens
    with asking(slow.address, PATH, **fields):
        eventually(lambda: scheduler.n_running == 1 and counters.generated_tokens > before)
        read = counters.prompt_tokens
        with asking(slow.address, PATH, **fields | {"stream": stream}):
            eventually(lambda: scheduler.n_waiting == 1)
        eventually(lambda: scheduler.n_waiting == 0)
        assert scheduler.n_running == 1, "the other goes on"
        assert counters.prompt_tokens == read
    eventually(lambda: idle(scheduler))


def test_progress_says_queued_then_reading_then_what_was_cached() -> None:
    with running({"m": TINY_QWEN3}, running=1) as server:
        client = Client(server.address)
        scheduler = server.served.scheduler
        slow_down(server, 0.01)
        long = [{"role": "user", "content": "word " * 900}]
        with asking(server.address, PATH, messages=MESSAGES, max_tokens=100, logit_bias={"4092": -10000}):
            eventually(lambda: scheduler.n_running == 1)
            events = client.events(PATH, messages=long, max_tokens=2, return_progress=True)
        progress = [event["prompt_progress"] for event in events if "prompt_progress" in event]
        stages = [one["stage"] for one in progress]
        assert stages[0] == "queued" and progress[0]["position"] == 1
        assert stages == sorted(stages), "queued, then reading"
        reading = [one["processed"] for one in progress if one["stage"] == "reading"]
        assert reading == sorted(reading) and reading[-1] == progress[-1]["total"] and len(reading) > 2
        assert all(
            one["cache"] <= one["processed"] <= one["total"] for one in progress if one["stage"] == "reading"
        )
        first = next(i for i, event in enumerate(events) if event["choices"][0]["delta"].get("content"))
        assert not any("prompt_progress" in event for event in events[first:])
        again = client.events(PATH, messages=long, max_tokens=2, return_progress=True)
        cached = [event["prompt_progress"]["cache"] for event in again if "prompt_progress" in event]
        assert cached[-1] == progress[-1]["total"] - 1
        assert not any(
            "prompt_progress" in event for event in client.events(PATH, messages=MESSAGES, max_tokens=2)
        )


def test_silence_is_broken_by_comments_and_a_failure_after_the_200_ends_the_stream_without_done() -> None:
    with running({"m": TINY_QWEN3}) as server:
        server.api.ping = 0.05
        batch = server.served.scheduler._batch

        def fails(rows: object) -> NoReturn:
            time.sleep(0.3)
            raise ValueError("/secret/path: the model's logits are not finite")

        batch.run = fails  # type: ignore[method-assign]
        with Client(server.address).http.stream(
            "POST", PATH, json={"messages": MESSAGES, "stream": True}
        ) as response:
            text = "".join(response.iter_text())
        assert response.status_code == 200
        assert (
            response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
        )
        assert text.count(": ping\n\n") >= 2 and "[DONE]" not in text and "secret" not in text
        error = json.loads(text.rstrip().rpartition("data: ")[2])["error"]
        assert error["type"] == "server_error" and error["code"] == "engine_failed" and error["param"] is None
        with pytest.raises(openai.APIError, match="not finite"):
            python = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
            for _ in python.chat.completions.create(model="m", messages=MESSAGES, stream=True):  # type: ignore[arg-type]
                pass


def test_a_full_queue_says_when_to_come_back() -> None:
    with running({"m": TINY_QWEN3}, running=1, queue=1) as server:
        client, scheduler = Client(server.address), server.served.scheduler
        slow_down(server, 0.02)
        fields: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 300, "logit_bias": {"4092": -10000}}
        with asking(server.address, PATH, **fields), asking(server.address, PATH, **fields):
            eventually(lambda: scheduler.n_running + scheduler.n_waiting == 2)
            for stream in (False, True):
                answer = client.post(PATH, fields | {"stream": stream})
                assert (answer.status, answer.error["code"]) == (429, "queue_full")
                assert 1 <= int(answer.headers["retry-after"]) <= 120


def test_a_key_has_no_more_places_than_it_is_given(slow: Server) -> None:
    """Running ones count, too; and what another key has does not."""
    limits, scheduler = KeyLimits(running=1, queue=1), slow.served.scheduler

    async def several() -> list[int]:
        found, streams = [], []
        ask = Ask([[5, 6]], max_tokens=500, sampling={"logit_bias": {4092: -1000.0}}, namespace="key")
        for one in (ask, ask, ask, replace(ask, namespace="other"), replace(ask, prompts=[[5]] * 3)):
            try:
                streams.append(await slow.served.submit(one, limits))
                found.append(200)
            except ApiError as error:
                found.append(error.status)
            await asyncio.sleep(0.1)
        for stream in streams:
            stream.cancel()
            async for _ in stream:
                pass
        return found

    assert asyncio.run(several()) == [200, 200, 429, 200, 400]
    eventually(lambda: idle(scheduler))


# ----------------------------------------------------------------------------
# Clients


class Sum(BaseModel):
    total: int


def test_openai_python_reads_it(python: openai.OpenAI) -> None:
    messages: Any = MESSAGES
    reply = python.chat.completions.create(model="m", messages=messages, seed=1)
    assert reply.choices[0].message.content and reply.choices[0].message.tool_calls is None
    raw = python.chat.completions.with_raw_response.create(model="m", messages=messages, seed=1)
    assert raw.headers["x-qwen3c-backend"] == "local" and raw.headers["x-qwen3c-model"] == "box"
    with python.chat.completions.stream(model="m", messages=messages, seed=1) as stream:
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.content == raw.parse().choices[0].message.content
    parsed = python.chat.completions.parse(
        model="m", messages=messages, response_format=Sum, max_tokens=60, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Sum)
    with pytest.raises(openai.LengthFinishReasonError):
        python.chat.completions.parse(model="m", messages=messages, response_format=Sum, max_tokens=2)


def test_openai_python_reads_calls(judge: Server) -> None:
    python = openai.OpenAI(base_url=f"{judge.address}/v1", api_key="none", max_retries=0)
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    function = {"name": "weather", "parameters": schema | {"additionalProperties": False}}
    fields: dict[str, Any] = {
        "model": "m",
        "messages": MESSAGES,
        "tools": [{"type": "function", "function": function}],
        "max_tokens": 300,
        "seed": 2,
    }
    fields |= {
        "parallel_tool_calls": False,
        "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
    }
    call = python.chat.completions.create(**fields, tool_choice="required")
    assert call.choices[0].finish_reason == "tool_calls" and call.choices[0].message.tool_calls
    with python.chat.completions.stream(**fields, tool_choice="required") as stream:
        made = stream.get_final_completion().choices[0].message.tool_calls
    assert made and made[0].function.name == "weather"
    assert json.loads(made[0].function.arguments)["city"] in ("Rome", "Oslo")


def test_openai_python_raises_what_it_should(python: openai.OpenAI) -> None:
    messages: Any = MESSAGES
    with pytest.raises(openai.BadRequestError) as wrong:
        python.chat.completions.create(model="m", messages=messages, top_logprobs=2)
    assert wrong.value.param == "top_logprobs" and wrong.value.code is None
    with pytest.raises(openai.BadRequestError) as long:
        python.chat.completions.create(model="m", messages=[{"role": "user", "content": "word " * 600}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        python.models.retrieve("nothing")


@pytest.mark.parametrize("text", ["some words, " * 300_000, "x" * 3_000_000, "<|im_end|>" * 300_000])
@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/v1/messages", "/v1/responses", "/v1/embeddings"])
def test_what_is_much_too_long_is_the_usual_error(client: Client, path: str, text: str) -> None:
    asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    fields = {"/v1/completions": {"prompt": text}, "/v1/responses": {"input": text},
              "/v1/embeddings": {"input": text}}.get(path, asked)  # fmt: skip
    answer = client.http.post(path, json=fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (
        error["n_prompt_tokens"] > error["n_ctx"] == 512 and str(error["n_prompt_tokens"]) in error["message"]
    )
    if path != "/v1/messages":
        assert error["code"] == "context_length_exceeded"


def test_a_grammar_that_fails_in_mid_reply_is_a_400_that_says_what_to_change(thinker: Client) -> None:
    format = {"type": "regex", "regex": r"(\w+\s?){1,1000}"}
    plain = {"chat_template_kwargs": {"enable_thinking": False}, "temperature": 100, "seed": 1}
    request = {"messages": MESSAGES, "response_format": format, "max_tokens": 900, **plain}
    answer = thinker.post(PATH, **request)
    assert (answer.status, answer.error["code"]) == (400, "grammar_failed")
    assert "ask with a simpler" in answer.error["message"] and answer.headers["x-should-retry"] == "false"
    *events, last = thinker.events(PATH, **request)
    assert len(events) > 10 and last["error"] == answer.error
