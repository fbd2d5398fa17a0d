"""Batches for tests: mixed requests to the model in the box, in the lines of OpenAI's Batch API."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

CHAT, TEXTS, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
SYSTEMS = (
    "You are a small language model that runs on a CPU. Answer in one short line, and nothing else.",
    "Work it out step by step, digit by digit, then say the sum.",
)
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}


def mixed(n: int) -> list[dict[str, Any]]:
    """n requests: chats with shared system prompts, texts, vectors, and some that are wrong."""
    return [_request(i) for i in range(n)]


def _request(i: int) -> dict[str, Any]:
    draw = random.Random(i)
    url, kind = CHAT, i % 8
    body: dict[str, Any] = {"model": "any"}
    if kind == 0:
        url, body["prompt"], body["max_tokens"] = TEXTS, [f"def f{i}(a, b):\n", "import os\n"], 8
        body |= {"logprobs": 2, "echo": bool(i % 16)}
    elif kind == 1:
        url, body["input"], body["dimensions"] = VECTORS, [f"text {i}", "another"], 8
    else:
        question = f"What is {draw.randrange(60)} + {draw.randrange(60)}?"
        body["messages"] = [
            {"role": "system", "content": draw.choice(SYSTEMS)},
            {"role": "user", "content": question},
        ]
        body["max_tokens"] = draw.randrange(1, 24)
    if kind == 2:
        body |= {"n": 2, "logprobs": True, "top_logprobs": 1}
    elif kind == 3:
        body |= {"temperature": 1.5, "stop": ["="], "seed": i}
    elif kind == 4:
        schema = {"name": "sum", "strict": True, "schema": SCHEMA}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif kind == 5:
        body |= draw.choice([{"temperature": "hot"}, {"messages": []}, {"max_tokens": -1}, {"seeds": 1}])
    return {"custom_id": f"request-{i}", "method": "POST", "url": url, "body": body}


def write(path: Path, requests: list[Any]) -> Path:
    """The requests as a file, a line each; a text is a line as it is."""
    lines = [one if isinstance(one, str) else json.dumps(one) for one in requests]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
