"""/v1/models, /props, /health and /version: what is served, and whether it is well."""

from __future__ import annotations

import threading
import time
from typing import Any

import openai
import pytest
from anthropic import Anthropic, NotFoundError
from servers import BOX, Client, Server, eventually, running
from small_models import TINY_QWEN3

from qwen3c import __version__
from qwen3c.serve.surfaces import listing

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def test_models_are_listed_whether_they_are_loaded_or_not_and_none_is_loaded_for_it(
    python: openai.OpenAI,
) -> None:
    with running({"first": BOX, "second": TINY_QWEN3}, context=1000) as server:
        client = Client(server.address)
        first, second = client.get("/v1/models").body["data"]
        assert (first["id"], second["id"]) == ("first", "second")
        assert (first["loaded"], second["loaded"]) == (True, False)
        assert (first["context_length"], second["max_model_len"]) == (512, 1000)
        assert "thinking" in second["capabilities"] and "thinking" not in first["capabilities"]
        assert client.get("/v1/models/second").body == second
        assert [served.name for served in server.api.models.loaded] == ["first"]
        assert client.get("/health").body["models"] == {"first": "ok", "second": "unloaded"}
        missing = client.get("/v1/models/third")
        assert (missing.status, missing.error["code"]) == (404, "model_not_found")
        answer = client.post("/v1/chat/completions", CHAT | {"model": "second"})
        assert answer.status == 200 and answer.body["model"] == "second"
        assert client.get("/v1/models/second").body == second | {"loaded": True}
        unknown = client.post("/v1/completions", prompt="a", model="third")
        assert (unknown.status, unknown.error["param"]) == (404, "model")
    assert [model.id for model in python.models.list()] == ["box"]
    assert python.models.retrieve("box").owned_by == "qwen3c"


def test_what_can_rerank_says_so(client: Client, ranker: Client, thinker: Client) -> None:
    able = set()
    for one in (client, ranker, thinker):
        (model,) = one.get("/v1/models").body["data"]
        status = one.post("/v1/rerank", query="a", documents=["b"]).status
        assert ("rerank" in model["capabilities"]) == (status == 200)
        able.add(status)
    assert able == {200, 400}


def test_clients_of_anthropics_api_get_the_models_in_its_words(box: Server) -> None:
    anthropic = Anthropic(base_url=box.address, api_key="none", max_retries=0)
    page = anthropic.models.list()
    assert [model.id for model in page] == ["box"] and page.has_more is False and page.last_id == "box"
    model = anthropic.models.retrieve("box")
    assert (model.type, model.display_name, model.max_input_tokens) == ("model", "box", 512)
    assert model.created_at.timestamp() == box.api.started
    with pytest.raises(NotFoundError) as caught:
        anthropic.models.retrieve("none")
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "not_found_error"


def test_props_are_what_clients_know_llama_server_by(client: Client, box: Server) -> None:
    props = client.get("/props").body
    assert props["default_generation_settings"]["n_ctx"] == props["n_ctx"] == 512
    assert props["chat_template"] == box.model.chat_template.source
    assert props["total_slots"] == 4 and props["modalities"] == {"vision": False, "audio": False}
    assert props["model_path"] is None and props["model_alias"] == "box" and props["thinking"] == "none"
    assert props["upstream"] is None and props["mcp"] is False and props["needs_key"] is False
    assert client.get("/version").body == {"version": __version__}


def test_health_is_bad_while_the_server_drains() -> None:
    with running({"m": BOX}) as server:
        client = Client(server.address)
        answer = client.get("/health")
        assert (answer.status, answer.body["status"]) == (200, "ok")
        server.api.draining = True
        answer = client.get("/health")
        assert (answer.status, answer.body["status"]) == (503, "draining")


def test_an_engine_that_dies_says_so_to_those_who_wait_to_newcomers_and_to_health(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running({"m": BOX}) as server:
        client, scheduler = Client(server.address), server.served.scheduler

        def broken(rows: object) -> None:
            raise RuntimeError("on purpose")

        monkeypatch.setattr(scheduler._batch, "run", broken)
        waiting = client.post("/v1/chat/completions", CHAT)
        assert (waiting.status, waiting.error["code"]) == (500, "engine_failed")
        assert waiting.headers["x-should-retry"] == "false" and "purpose" not in str(waiting.body)
        newcomer = client.post("/v1/completions", prompt="a")
        assert (newcomer.status, newcomer.error["code"]) == (500, "engine_failed")
        answer = client.get("/health")
        assert (answer.status, answer.body["status"]) == (503, "failed")
        assert answer.body["models"] == {"m": "failed"}


def test_an_engine_that_hangs_is_bad_health_and_one_that_idles_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running({"m": BOX}) as server:
        client, scheduler = Client(server.address), server.served.scheduler
        monkeypatch.setattr(listing, "STUCK", 0.05)
        time.sleep(0.1)
        assert client.get("/health").status == 200, "it idles"
        going, run = threading.Event(), scheduler._batch.run

        def slow(rows: Any) -> Any:
            going.wait(20)
            return run(rows)

        monkeypatch.setattr(scheduler._batch, "run", slow)
        answered = threading.Thread(target=client.post, args=("/v1/chat/completions", CHAT))
        answered.start()
        try:
            other = Client(server.address)
            eventually(lambda: other.get("/health").status == 503)
        finally:
            going.set()
            answered.join()
        eventually(lambda: other.get("/health").status == 200)


def test_a_server_that_ends_tells_those_who_wait() -> None:
    """They get an end, and newcomers a 503 with a time to come back."""
    with running({"m": BOX}) as server:
        client = Client(server.address)
        server.served.scheduler.close()
        answer = client.post("/v1/chat/completions", CHAT)
        assert answer.status == 503 and answer.headers["retry-after"] == "5"


def test_the_addresses_of_openai_answer_without_their_version(box: Server) -> None:
    with openai.OpenAI(base_url=box.address, api_key="none", max_retries=0) as sdk:
        assert [model.id for model in sdk.models.list()] == ["box"]
        assert sdk.models.retrieve("box").id == "box"
        assert sdk.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hello"}], max_tokens=2
        )
        assert sdk.completions.create(model="m", prompt="hello", max_tokens=2)
        assert sdk.responses.create(model="m", input="hello", max_output_tokens=2)
        assert sdk.embeddings.create(model="m", input="hello")
