"""A batch gets the server's own answers, whatever order and company they are computed in.

python -m pytest tests/serve/test_batch.py
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
from openai_schema import check_body
from servers import BOX, Client, Server
from small_batches import CHAT, TEXTS, VECTORS, mixed

from qwen3c import Model
from qwen3c.serve.api import Api
from qwen3c.serve.batch import Item, answered, lasting, read_items
from qwen3c.serve.models import Models, Served, ServeOptions


def items_of(requests: list[dict[str, Any]]) -> list[Item]:
    return read_items(json.dumps(one).encode() for one in requests)


def answers_of(
    requests: list[dict[str, Any]], running: int = 16, **options: Any
) -> tuple[dict[str, bytes], Served]:
    """The lines by custom_id, and the model as it was at the end."""

    async def work() -> tuple[dict[str, bytes], Served]:
        options.setdefault("kv_bytes", 64 << 20)
        serving = ServeOptions(running, 1 << 20, offline=True, **options)
        async with Models({"box": lambda: Model(BOX, 1)}, serving).open() as models:
            async with contextlib.aclosing(answered(Api(models), items_of(requests), running)) as answers:
                found = {answer.custom_id: answer.line async for answer in answers}
            return found, models.loaded[0]

    return asyncio.run(work())


def body_of(line: bytes) -> Any:
    return json.loads(line)["response"]["body"]


@pytest.fixture(scope="module")
def lines() -> dict[str, bytes]:
    """The answers to 200 requests."""
    return answers_of(mixed(200))[0]


def test_an_answer_is_the_server_s_but_for_what_tells_of_the_run(
    lines: dict[str, bytes], client: Client, box: Server
) -> None:
    for request in mixed(200):
        if "n" in request["body"]:
            continue  # seeds follow each other there: the next test has them
        item = items_of([request])[0]
        seed = {"seed": int.from_bytes(item.digest[:6], "big")} if item.url != VECTORS else {}
        answer = client.post(item.url, seed | item.body)
        found = json.loads(lines[item.custom_id])
        assert found["response"]["status_code"] == answer.status
        if answer.status == 200:
            expected, body = lasting(answer.body), found["response"]["body"]
            assert body | {"id": ""} == expected | {"id": ""}
        else:
            assert found["response"]["body"] == answer.body


@pytest.mark.parametrize("running", [1, 5, 64])
def test_answers_do_not_depend_on_how_many_run_and_in_which_order(
    lines: dict[str, bytes], running: int
) -> None:
    some = mixed(200)[100:140]
    found, _ = answers_of(some[::-1], running)
    assert found == {one["custom_id"]: lines[one["custom_id"]] for one in some}


def test_memory_bounds_the_cache_and_changes_no_answer(
    lines: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    forward = Model.forward

    def watched(self: Model, *args: Any) -> Any:
        found = forward(self, *args)
        held.append(self.kv_bytes)
        return found

    monkeypatch.setattr(Model, "forward", watched)
    with Model(BOX, 1) as model:
        bound = 5 * model.kv_block_bytes
    found, served = answers_of(mixed(40), 16, kv_bytes=bound)
    assert found == {one["custom_id"]: lines[one["custom_id"]] for one in mixed(40)}
    assert max(held) <= bound and served.scheduler.counters.evictions > 0


def test_what_prompts_have_in_common_is_read_once() -> None:
    """However far apart they stand: 20 beginnings, of 10 requests each, one at a time."""
    beginnings = [f"def {chr(97 + i)}_function(alpha, beta, gamma): # {i}\n" * 6 for i in range(20)]
    requests = [
        {"custom_id": f"{end}-{i}", "method": "POST", "url": TEXTS,
         "body": {"prompt": f"{beginning}{end}", "max_tokens": 1}}
        for end in range(10) for i, beginning in enumerate(beginnings)
    ]  # fmt: skip
    with Model(BOX, 1) as model:
        length = {len(model.text_prompt(one)) for one in beginnings}
        block = model.kv_block_bytes
    _, served = answers_of(requests, 1, kv_bytes=4 * block)
    assert min(length) > 50 and served.scheduler.counters.prompt_tokens < 20 * max(length) + 200 * 8


def test_every_line_is_of_openai_s_shapes(lines: dict[str, bytes]) -> None:
    for request in mixed(200):
        answer = json.loads(lines[request["custom_id"]])
        assert answer.keys() == {"id", "custom_id", "response", "error"} and answer["error"] is None
        response = answer["response"]
        assert response.keys() == {"status_code", "request_id", "body"}
        check_body(request["url"], response["status_code"], response["body"])
        assert response["status_code"] == 200 or response["body"]["error"]["param"]


def test_replies_without_a_seed_differ_between_requests_and_not_between_runs() -> None:
    body = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 30, "temperature": 2}
    requests = [{"custom_id": f"{i}", "method": "POST", "url": CHAT, "body": body} for i in range(6)]
    once, again = answers_of(requests)[0], answers_of(requests)[0]
    assert once == again
    assert len({body_of(line)["choices"][0]["message"]["content"] for line in once.values()}) == 6


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"url": "/v1/responses"}, 404, "/v1/responses"),
        ({"url": None}, 404, "url"),
        ({"method": "GET"}, 405, "GET"),
        ({"body": None}, 400, "null"),
        ({"body": ["a"]}, 400, "a list"),
        ({"body": {"messages": [{"role": "user", "content": "\ud800"}]}}, 400, "surrogate"),
        ({"body": {"messages": [{"role": "user", "content": "a"}], "stream": True}}, 400, "stream"),
        ({"body": {"messages": [{"role": "user", "content": "a " * 600}]}}, 400, "context"),
    ],
)
def test_what_is_wrong_with_a_request_is_its_answer(change: dict[str, Any], status: int, word: str) -> None:
    right = mixed(8)[6]
    wrong = {**right, "custom_id": "wrong", **change}
    found, _ = answers_of([wrong, right])
    assert json.loads(found[right["custom_id"]])["response"]["status_code"] == 200
    response = json.loads(found["wrong"])["response"]
    assert response["status_code"] == status and word in response["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ("{}", "custom_id is missing"),
        ('{"custom_id": 5}', "not a text"),
        ('{"custom_id": "a", "custom-id": "b", "metod": "POST"}', "did you mean"),
        ('{"custom_id": "first"}', "that of line 1"),
        ('{"custom_id": "\\ud800"}', "surrogate"),
        ("\xff", "UTF-8"),
    ],
)
def test_a_line_that_cannot_be_answered_is_named(line: str, word: str) -> None:
    with pytest.raises(ValueError, match=f"line 3: .*{word}"):
        read_items([b'{"custom_id": "first"}\n', b"\n", line.encode("latin-1")])
