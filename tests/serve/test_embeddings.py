"""POST /v1/embeddings gives the vectors of Model.embed, to the bit."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from servers import Client, Server, asking, eventually

PATH = "/v1/embeddings"
TEXTS = ["import os", "x", "The sun is a star. " * 20, "no <|im_end|> yes", "日本語"]


def vectors(body: dict[str, Any]) -> NDArray[np.float32]:
    assert [one["index"] for one in body["data"]] == list(range(len(body["data"])))
    return np.array([one["embedding"] for one in body["data"]], np.float32)


def test_vectors_are_those_of_the_model(client: Client, box: Server) -> None:
    body = client.ok(PATH, input=TEXTS, model="box")
    assert np.array_equal(vectors(body), box.model.embed(TEXTS))
    assert np.array_equal(vectors(client.ok(PATH, input=TEXTS[0])), box.model.embed(TEXTS[:1]))
    ends = len(TEXTS)
    n_tokens = sum(len(box.model.tokenizer.encode(text)) for text in TEXTS) + ends
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == n_tokens


def test_token_ids_are_a_text_whether_they_have_its_end_or_not(client: Client, box: Server) -> None:
    tokenizer = box.model.tokenizer
    ids = [tokenizer.encode(text) for text in TEXTS]
    end = tokenizer.control_id("<|endoftext|>")
    expected = box.model.embed(TEXTS)
    assert np.array_equal(vectors(client.ok(PATH, input=ids)), expected)
    assert np.array_equal(vectors(client.ok(PATH, input=[[*one, end] for one in ids])), expected)
    assert np.array_equal(vectors(client.ok(PATH, input=ids[0])), expected[:1])


def test_base64_holds_the_same_float32_little_endian(client: Client, box: Server) -> None:
    body = client.ok(PATH, input=TEXTS, encoding_format="base64")
    raw = [base64.b64decode(one["embedding"]) for one in body["data"]]
    assert np.array_equal(np.array([np.frombuffer(one, "<f4") for one in raw]), box.model.embed(TEXTS))


def test_fewer_dimensions_are_the_first_ones_at_length_one(client: Client, box: Server) -> None:
    cut = box.model.embed(TEXTS)[:, :10]
    expected = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    found = vectors(client.ok(PATH, input=TEXTS, dimensions=10))
    assert np.array_equal(found, expected)
    whole = vectors(client.ok(PATH, input=TEXTS, dimensions=box.model.config.dim))
    assert np.array_equal(whole, box.model.embed(TEXTS))


def test_more_texts_than_the_queue_holds_are_read_some_at_a_time(client: Client, box: Server) -> None:
    texts = [f"text {i}" for i in range(60)]
    limits = box.served.scheduler.limits
    assert len(texts) > limits.running + limits.queue
    assert np.array_equal(vectors(client.ok(PATH, input=texts)), box.model.embed(texts))


def test_openai_python_asks_for_base64_and_reads_it(python: openai.OpenAI, box: Server) -> None:
    found = python.embeddings.create(model="box", input=TEXTS)
    assert np.array_equal(np.array([one.embedding for one in found.data], np.float32), box.model.embed(TEXTS))
    assert found.usage.prompt_tokens > 0
    short = python.embeddings.create(model="box", input="x", dimensions=5, encoding_format="float")
    assert len(short.data[0].embedding) == 5


def test_nothing_goes_on_for_a_client_that_has_left(client: Client, box: Server) -> None:
    scheduler = box.served.scheduler
    before, texts = scheduler.counters.prompt_tokens, [f"{i}" + " word" * 400 for i in range(300)]
    with asking(box.address, PATH, input=texts):
        eventually(lambda: scheduler.counters.prompt_tokens > before)
    eventually(lambda: scheduler.n_running == scheduler.n_waiting == 0)
    client.ok(PATH, input="the next one")
    assert scheduler.counters.prompt_tokens - before < 300 * 400 / 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"), ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[]]}, "input"), ({"input": 5}, "input"), ({"input": [4096]}, "input[0]"),
        ({"input": "a", "dimensions": 0}, "dimensions"), ({"input": "a", "dimensions": 193}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "encodingformat": "float"}, "encodingformat"),
        ({"input": "a", "input_type": "query"}, "input_type"),
        ({"input": "a", "normalize": False}, "normalize"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_names_the_field(client: Client, fields: dict[str, Any], param: str) -> None:
    answer = client.post(PATH, fields)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_a_text_beyond_the_context_is_not_cut(client: Client) -> None:
    for input in ("x " * 600, [5] * 600):
        answer = client.post(PATH, input=input)
        assert (answer.status, answer.error["param"]) == (400, "input")
        assert answer.error["code"] == "context_length_exceeded"
