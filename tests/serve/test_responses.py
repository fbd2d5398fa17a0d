"""The requests of Open Responses' compliance tests, and the order of events that clients rely on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.responses import Response
from servers import Client, running
from talker import write_talker

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "maxLength": 9}},
        "required": ["location"],
    },
}
CALLS = {
    "tools": [WEATHER],
    "tool_choice": "required",  # a model that talks at random does not choose to
    "parallel_tool_calls": False,
}
REQUESTS: dict[str, dict[str, Any]] = {
    "basic": {"input": [{"type": "message", "role": "user", "content": "Say hello in exactly 3 words."}]},
    "system prompt": {
        "input": [
            {"type": "message", "role": "system", "content": "You are a pirate."},
            {"type": "message", "role": "user", "content": "Say hello."},
        ]
    },
    "tool calling": {"input": [{"role": "user", "content": "What is the weather like?"}], **CALLS},
    "multi-turn": {
        "input": [
            {"type": "message", "role": "user", "content": "My name is Alice."},
            {"type": "message", "role": "assistant", "content": "Hello Alice!"},
            {"type": "message", "role": "user", "content": "What is my name?"},
        ]
    },
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a model that has tools and a long context, and talks at random."""
    path = write_talker(tmp_path_factory.mktemp("talker") / "talker.bin")
    with running({"talker": path}) as server:
        yield Client(server.address)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_response_is_complete_whole_or_streamed(agent: Client, name: str) -> None:
    request = {"model": "talker", "seed": 1, **REQUESTS[name]}
    whole = agent.ok(PATH, **request)
    events = streamed(agent, request)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    kind = "function_call" if "tools" in request else "message"
    for response in (whole, events[-1]["response"]):
        assert response["status"] == "completed"
        assert [item["type"] for item in response["output"]] == [kind]
    assert said(whole) == said(events[-1]["response"])


@pytest.mark.parametrize("name", REQUESTS)
def test_the_sdk_finds_every_field_that_it_demands(agent: Client, name: str) -> None:
    request = {"model": "talker", "seed": 1, **REQUESTS[name]}
    for body in (agent.ok(PATH, **request), *(event["response"] for event in ends(streamed(agent, request)))):
        Response.model_validate(body | {"usage": body["usage"] or USED}, strict=True)


USED = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "output_tokens_details": {"reasoning_tokens": 0},
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
}


def ends(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events that hold the response."""
    return [event for event in events if "response" in event]


def streamed(agent: Client, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The data of the events, which have no [DONE] after them."""
    with agent.http.stream("POST", PATH, json=request | {"stream": True}) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def said(response: dict[str, Any]) -> list[Any]:
    return [(item.get("name"), item.get("arguments"), item.get("content")) for item in response["output"]]


def test_a_call_comes_as_an_item_its_arguments_and_their_end(agent: Client) -> None:
    events = streamed(agent, REQUESTS["tool calling"])
    about = {event["type"]: event for event in events}
    assert about["response.output_item.added"]["item"]["type"] == "function_call"
    item = about["response.output_item.done"]["item"]
    arguments = about["response.function_call_arguments.done"]["arguments"]
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == arguments == item["arguments"]
    assert "location" in json.loads(arguments)


def test_a_picture_is_refused_by_name(agent: Client) -> None:
    part = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    answer = agent.post(
        PATH, input=[{"role": "user", "content": [{"type": "input_text", "text": "?"}, part]}]
    )
    assert answer.status == 400
    assert answer.error["param"] == "input[0].content[1].type"


def test_what_other_tools_would_show_may_be_asked_for(agent: Client) -> None:
    shown = ["web_search_call.action.sources", "code_interpreter_call.outputs", "reasoning.encrypted_content"]
    assert agent.ok(PATH, input="hello", include=shown)["status"] == "completed"
    assert agent.post(PATH, input="hello", include=["everything"]).error["param"] == "include"


def test_the_tokens_of_a_request_are_counted_as_they_are_read(agent: Client) -> None:
    for request in REQUESTS.values():
        counted = agent.http.post(f"{PATH}/input_tokens", json=request).json()
        used = agent.ok(PATH, **request)["usage"]["input_tokens"]
        assert counted == {"object": "response.input_tokens", "input_tokens": used}
    assert agent.http.post(f"{PATH}/input_tokens", json={}).json()["error"]["param"] == "input"
