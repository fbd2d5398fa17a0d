"""Servers that tests share, and clients of them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import openai
import pytest
from servers import BOX, Client, Server, running
from small_models import TINY_QWEN3
from test_retrieval import write_source

from qwen3c.convert.export import export

pytest.register_assert_rewrite("browser", "scene")
if find_spec("playwright"):  # the page's tests drive a browser
    from browser import browser, chat, served, stub  # noqa: F401


@pytest.fixture(scope="module")
def box() -> Iterator[Server]:
    """A server of the model in the box, which answers but does not think; it has few places."""
    with running({"box": BOX}, running=4, queue=8) as server:
        yield server


@pytest.fixture(scope="module")
def tiny() -> Iterator[Server]:
    """A server of a hybrid model with a context of 2048."""
    with running({"tiny": TINY_QWEN3}) as server:
        yield server


@pytest.fixture(scope="module")
def client(box: Server) -> Client:
    return Client(box.address)


@pytest.fixture(scope="module")
def thinker(tiny: Server) -> Client:
    return Client(tiny.address)


@pytest.fixture(scope="module")
def python(box: Server) -> openai.OpenAI:
    """openai-python, which repeats nothing."""
    return openai.OpenAI(base_url=f"{box.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a random model that has the tokens of Qwen3-Reranker's recipe; it has few places."""
    directory = tmp_path_factory.mktemp("judge")
    export(write_source(directory / "source", context=1024), directory / "model.bin")
    with running({"judge": directory / "model.bin"}, running=4, queue=16) as server:
        yield server


@pytest.fixture(scope="module")
def ranker(judge: Server) -> Client:
    return Client(judge.address)
