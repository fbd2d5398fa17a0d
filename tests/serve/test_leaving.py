"""A client that leaves frees its places in any state, and nobody else notices.

test_chat.py looks at the application alone; here guard, HTTP layer, metrics, logs and MCP stand before it.

python -m pytest tests/serve/test_leaving.py
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import httpx2
import pytest
from servers import BOX, asking, eventually
from small_models import TINY_QWEN3
from small_server import serving

from qwen3c.cli.serve import _application
from qwen3c.serve.api import Api
from qwen3c.serve.config import ModelSettings, Settings

CHAT = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "word " * 1500}], "max_tokens": 400, "seed": 1}
SHORT = {"messages": [{"role": "user", "content": "def parse("}], "seed": 2, "logprobs": True}
NO_END = {"logit_bias": {str(id): -10000 for id in (4091, 4089, 4092, 4093)}}


@pytest.fixture(scope="module")
def whole() -> Iterator[tuple[Api, str]]:
    """(what the endpoints share, the address) of a server that has two places and a queue."""
    models = {"tiny": ModelSettings(str(TINY_QWEN3)), "box": ModelSettings(str(BOX))}
    settings = Settings(models=models, default_model="tiny", cache_memory=64 << 20, running=2, queue=16)
    app, api = _application(settings, needs_key=False)
    with serving(app) as server:
        server.service.log._stream = io.StringIO()
        yield api, f"http://127.0.0.1:{server.port}"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("state", ["queued", "reading", "writing"])
def test_a_client_that_leaves_frees_its_place(whole: tuple[Api, str], state: str, stream: bool) -> None:
    api, address = whole
    scheduler = api.models.loaded[0].scheduler
    with httpx2.Client(base_url=address, timeout=60, trust_env=False) as client:

        def bystander() -> object:
            return client.post(CHAT, json=SHORT | {"max_tokens": 60}).json()["choices"]

        expected = bystander()
        eventually(lambda: scheduler.n_running == 0)
        scheduler.tree.clear()
        before = scheduler.counters.generated_tokens
        text = LONG if state == "reading" else SHORT | NO_END | {"max_tokens": 1900}
        if state == "queued":
            with asking(address, CHAT, **text), asking(address, CHAT, **text):
                eventually(lambda: scheduler.n_running == 2)
                with asking(address, CHAT, **text, stream=stream):
                    eventually(lambda: scheduler.n_waiting == 1)
                eventually(lambda: scheduler.n_waiting == 0)
                assert scheduler.n_running == 2, "it was the one that waited who left"
        else:
            with asking(address, CHAT, **text, stream=stream):
                eventually(lambda: scheduler.n_running == 1)
                if state == "writing":
                    eventually(lambda: scheduler.counters.generated_tokens > before + 3)
                assert bystander() == expected
        eventually(lambda: scheduler.n_running == 0 and scheduler.n_waiting == 0)
        assert scheduler.counters.generated_tokens - before < 1500, json.dumps([state, stream])
        assert bystander() == expected
        assert client.get("/health").json()["status"] == "ok"
