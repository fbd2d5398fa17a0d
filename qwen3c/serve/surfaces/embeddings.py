"""POST /v1/embeddings: texts as vectors, by the recipe that Model.embed has.

A text ends with the vocabulary's own end, and so do token ids unless they have it already. The vector is the
final hidden state there, at length 1. `dimensions` cuts it and brings it to length 1 again, as models that
were trained for it (Matryoshka) allow; with others a part of the vector says less than it seems to.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...drivers.retrieval import embedding_end, embedding_prompts, unit_vectors
from ..api import Api, json_answer
from ..ask import Ask
from ..errors import ApiError
from ..fields import Fields
from ..models import Served
from ..streams import unless_left
from ..talk import prompt_usage, prompts_of, recipe_error

IGNORED = ("user", "keep_alive")
MOST_INPUTS = 8192


def routes(api: Api) -> list[Route]:
    """The endpoint."""

    async def embed(request: Request) -> Response:
        fields = await api.fields(request)
        served = await api.models.get(fields.text("model"))
        wanted = read(fields, served)
        client = api.client(request)
        priority = api.priority(request, fields)
        headers = api.headers(served, fields.finish())
        prompts = await served.work(wanted.tokenized, served)
        ask = Ask(prompts, vectors=True, namespace=client.name, priority=priority, origin="input")
        rows, streams = await unless_left(request.receive, served.rows(ask, client.limits))
        for stream in streams:
            api.ended(request, served, stream)
        data = await served.work(wanted.data, rows)
        tokens = prompt_usage([stats for stream in streams for stats in stream.stats])
        body = {"object": "list", "data": data, "model": served.name, "usage": tokens}
        return json_answer(body, headers=headers)

    return [Route("/v1/embeddings", embed, methods=["POST"])]


@dataclass
class Wanted:
    """The request. inputs: texts or token ids. dimensions: how many numbers of each vector are wanted."""

    inputs: list[str | list[int]]
    dimensions: int
    base64: bool

    def tokenized(self, served: Served) -> list[list[int]]:
        """The prompts. ApiError 400 if one is empty or the vocabulary lacks the token that ends a text."""
        model = served.model
        texts = [one for one in self.inputs if isinstance(one, str)]
        for i, one in enumerate(self.inputs):
            if not one:
                path = "input" if len(self.inputs) == 1 else f"input[{i}]"
                raise ApiError(400, f"{path} is empty", param=path)
        try:
            if texts:
                return embedding_prompts(model, model.tokenizer, texts)
            end = embedding_end(model.tokenizer)
        except ValueError as error:
            raise recipe_error("input", error) from None
        ids = [one for one in self.inputs if not isinstance(one, str)]
        return [one if one[-len(end) :] == end else [*one, *end] for one in ids]

    def data(self, rows: Sequence[NDArray[np.float32]]) -> list[dict[str, Any]]:
        """The vectors, as OpenAI lists them."""
        vectors = unit_vectors(rows, len(rows[0]))
        if self.dimensions < vectors.shape[1]:
            vectors = unit_vectors(list(vectors[:, : self.dimensions]), self.dimensions)
        return [
            {"object": "embedding", "index": i, "embedding": self._encoded(vector)}
            for i, vector in enumerate(vectors)
        ]

    def _encoded(self, vector: NDArray[np.float32]) -> str | list[float]:
        if self.base64:
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        found: list[float] = vector.tolist()
        return found


def read(fields: Fields, served: Served) -> Wanted:
    """What the fields ask for. ApiError 400 names a field that is wrong or not supported."""
    if "input" not in fields:
        raise fields.error("input", "is missing")
    config = served.model.config
    inputs = prompts_of(fields, "input", config.n_tokens)
    if len(inputs) > MOST_INPUTS:
        raise fields.error("input", f"has {len(inputs)} items, more than {MOST_INPUTS}")
    dimensions = fields.whole("dimensions", 1, config.dim, config.dim)
    encoding = fields.text("encoding_format", "float", choices=("float", "base64"))
    fields.ignore(*IGNORED)
    fields.refuse("truncate_prompt_tokens", "no text is cut")
    fields.refuse("normalize", "vectors have length 1", unless=(True,))
    fields.refuse("embd_normalize", "vectors have length 1", unless=(2,))
    for name in ("input_type", "task", "instruction", "prompt_name"):
        fields.refuse(name, "put `Instruct: TASK\\nQuery:` before the text of a query")
    return Wanted(inputs, dimensions or config.dim, encoding == "base64")
