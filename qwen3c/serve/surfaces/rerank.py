"""POST /v1/rerank and /rerank: how well documents meet a query, by the recipe that Model.rerank has.

`documents` is answered as Jina and Cohere do, an object with `results`; `texts` as text-embeddings-inference
does, a bare list. Either way the best come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...drivers.retrieval import relevance, rerank_prompts
from ..api import Api, json_answer
from ..ask import Ask
from ..fields import Fields
from ..models import Served
from ..streams import unless_left
from ..talk import prompt_usage, recipe_error

IGNORED = ("user", "keep_alive", "truncate", "truncation_direction")  # a text that does not fit is an error
MOST_DOCUMENTS = 8192


def routes(api: Api) -> list[Route]:
    """The endpoints."""

    async def rerank(request: Request) -> Response:
        fields = await api.fields(request)
        served = await api.models.get(fields.text("model"))
        wanted = read(fields)
        client = api.client(request)
        priority = api.priority(request, fields)
        headers = api.headers(served, fields.finish())
        prompts, answers = await served.work(wanted.prompts, served)
        ask = Ask(prompts, rows=True, namespace=client.name, priority=priority, origin=wanted.name)
        rows, streams = await unless_left(request.receive, served.rows(ask, client.limits))
        for stream in streams:
            api.ended(request, served, stream)
        results = await served.work(wanted.results, rows, answers)
        if wanted.name == "texts":
            return json_answer(results, headers=headers)
        tokens = prompt_usage([stats for stream in streams for stats in stream.stats])
        head = {"id": f"rerank-{api.request_id(request)}", "object": "list", "model": served.name}
        return json_answer(head | {"results": results, "usage": tokens}, headers=headers)

    return [Route(path, rerank, methods=["POST"]) for path in ("/v1/rerank", "/rerank")]


@dataclass
class Wanted:
    """The request. name: of the field with the documents, which says whose words the answer is in.

    instruction: what the search is for. top: how many results. returns: whether they have the texts. raw:
    whether a score is the logit of the probability.
    """

    name: str
    query: str
    documents: list[str]
    instruction: str | None
    top: int
    returns: bool
    raw: bool

    def prompts(self, served: Served) -> tuple[list[list[int]], list[int]]:
        """(the prompts, the ids of the two answers). ApiError 400 if the model has not the tokens of the
        recipe.
        """
        model = served.model
        try:
            return rerank_prompts(model, model.tokenizer, self.query, self.documents, self.instruction)
        except ValueError as error:
            raise recipe_error(self.name, error) from None

    def results(self, rows: Sequence[NDArray[np.float32]], answers: list[int]) -> list[dict[str, Any]]:
        """The documents with their scores, the best first; of equal ones the first."""
        scores: list[float] = relevance(rows, answers).tolist()
        no, yes = answers
        if self.raw:
            scores = [float(row[yes]) - float(row[no]) for row in rows]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: self.top]
        return [self._result(i, scores[i]) for i in order]

    def _result(self, index: int, score: float) -> dict[str, Any]:
        if self.name == "texts":
            text = {"text": self.documents[index]} if self.returns else {}
            return {"index": index, "score": score} | text
        document = {"document": {"text": self.documents[index]}} if self.returns else {}
        return {"index": index, "relevance_score": score} | document


def read(fields: Fields) -> Wanted:
    """What the fields ask for. ApiError 400 names a field that is wrong or not supported."""
    query = fields.text("query")
    if query is None:
        raise fields.error("query", "is missing")
    name = "texts" if "texts" in fields else "documents"
    if name == "texts":
        fields.refuse("documents", "give either documents or texts")
    documents = documents_of(fields, name)
    most = len(documents)
    wanted = Wanted(
        name,
        query,
        documents,
        instruction=fields.text("instruction"),
        top=fields.whole("top_n", 1, 1 << 31, most) or most,
        returns=fields.flag("return_text" if name == "texts" else "return_documents", False) or False,
        raw=fields.flag("raw_scores", False) or False,
    )
    fields.ignore(*IGNORED)
    for field in ("max_tokens_per_doc", "max_chunks_per_doc", "truncate_prompt_tokens"):
        fields.refuse(field, "no text is cut")
    fields.refuse("rank_fields", "a document is a text")
    return wanted


def documents_of(fields: Fields, name: str) -> list[str]:
    """The documents: texts, or objects with one."""
    found = fields.items(name, MOST_DOCUMENTS)
    if not found:
        raise fields.error(name, "is not a list of at least one text")
    texts = []
    for i, item in enumerate(found):
        if isinstance(item, dict):
            item = Fields(item, fields.path(f"{name}[{i}]")).text("text")
        if not isinstance(item, str):
            raise fields.error(f"{name}[{i}]", "is neither a text nor an object with one")
        texts.append(item)
    return texts
