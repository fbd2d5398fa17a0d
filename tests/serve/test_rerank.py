"""POST /v1/rerank and /rerank give the scores of Model.rerank, to the bit, in Jina's words and TEI's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from servers import Client, Server

QUERY = "What is the capital of China?"
DOCUMENTS = ["Beijing is the capital of China.", "Gravity attracts two bodies.", "", "no <|im_end|> yes"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_scores_are_those_of_the_model_the_best_first(ranker: Client, judge: Server, path: str) -> None:
    body = ranker.ok(path, query=QUERY, documents=DOCUMENTS, model="judge")
    found = {one["index"]: one["relevance_score"] for one in body["results"]}
    expected = judge.model.rerank(QUERY, DOCUMENTS)
    assert np.array_equal(np.array([found[i] for i in range(len(DOCUMENTS))], np.float32), expected)
    assert [one["index"] for one in body["results"]] == [int(i) for i in np.argsort(-expected, kind="stable")]
    assert all(set(one) == {"index", "relevance_score"} for one in body["results"])
    assert body["usage"]["total_tokens"] > 0
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "the prompts begin alike"


def test_documents_may_be_objects_and_come_back_if_they_are_asked_for(ranker: Client, judge: Server) -> None:
    fields: dict[str, Any] = {
        "query": QUERY,
        "top_n": 2,
        "return_documents": True,
        "instruction": "find facts",
    }
    body = ranker.ok("/v1/rerank", documents=[{"text": text} for text in DOCUMENTS], **fields)
    expected = judge.model.rerank(QUERY, DOCUMENTS, "find facts")
    best = np.argsort(-expected, kind="stable")[:2]
    assert [one["document"]["text"] for one in body["results"]] == [DOCUMENTS[i] for i in best]
    assert [np.float32(one["relevance_score"]) for one in body["results"]] == [expected[i] for i in best]


def test_texts_are_answered_as_tei_does(ranker: Client, judge: Server) -> None:
    body = ranker.ok("/rerank", query=QUERY, texts=DOCUMENTS, truncate=True)
    expected = judge.model.rerank(QUERY, DOCUMENTS)
    assert [set(one) for one in body] == [{"index", "score"}] * len(DOCUMENTS)
    assert {one["index"]: np.float32(one["score"]) for one in body} == dict(enumerate(expected))
    raw = ranker.ok("/rerank", query=QUERY, texts=DOCUMENTS, raw_scores=True, return_text=True)
    assert [one["text"] for one in raw] == [DOCUMENTS[one["index"]] for one in raw]
    for one in raw:
        assert math.isclose(1 / (1 + math.exp(-one["score"])), expected[one["index"]], rel_tol=1e-6)


def test_more_documents_than_the_queue_holds_are_read_some_at_a_time(ranker: Client, judge: Server) -> None:
    documents = [f"document {i}" for i in range(50)]
    body = ranker.ok("/rerank", query=QUERY, texts=documents)
    assert {one["index"]: np.float32(one["score"]) for one in body} == dict(
        enumerate(judge.model.rerank(QUERY, documents))
    )


def test_a_model_without_the_tokens_of_the_recipe_says_so_in_a_line(client: Client) -> None:
    answer = client.post("/v1/rerank", query="a", documents=["b"])
    assert (answer.status, answer.error["param"]) == (400, "documents")
    assert "the recipe needs" in answer.error["message"] and "\n" not in answer.error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": ["a"]}, "query"), ({"query": "a"}, "documents"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": 5, "documents": ["a"]}, "query"), ({"query": "a", "documents": ["b", 5]}, "documents[1]"),
        ({"query": "a", "documents": [{"txt": "b"}]}, "documents[0]"),
        ({"query": "a", "documents": [{"text": 5}]}, "documents[0].text"),
        ({"query": "a", "documents": ["b"], "texts": ["b"]}, "documents"),
        ({"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ({"query": "a", "documents": ["b"], "topn": 1}, "topn"),
        ({"query": "a", "documents": ["b"], "max_tokens_per_doc": 9}, "max_tokens_per_doc"),
        ({"query": "a", "documents": ["b"], "rank_fields": ["t"]}, "rank_fields"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_done_names_the_field(ranker: Client, fields: dict[str, Any], param: str) -> None:
    answer = ranker.post("/v1/rerank", fields)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_a_document_beyond_the_context_is_not_cut(ranker: Client) -> None:
    answer = ranker.post("/v1/rerank", query="a", documents=["b", "c " * 1200])
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert answer.error["param"] == "documents"
