"""One small use each of libraries that people ask a server with; `make conformance`
runs it where they are installed.

python tests/serve/clients.py URL [NAME...]

A model that talks at random answers, talker.py's: what is decided is that a reply, a call or a value of the
right shape comes out at the other end.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any, Literal

PACKAGES = [
    "litellm",
    "langchain-openai",
    "instructor",
    "pydantic-ai-slim[openai]",
    "openai-agents",
    "llm",
    "anthropic",
]
HELLO = [{"role": "user", "content": "hello"}]
MODEL = "talker"


def use_litellm(url: str) -> None:
    litellm = import_module("litellm")
    common = {
        "model": f"openai/{MODEL}",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "messages": HELLO,
        "max_tokens": 50,
    }
    assert litellm.completion(**common).choices[0].message.content
    chunks = list(litellm.completion(**common, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
    called = litellm.completion(**{**common, "max_tokens": 200}, tools=tools, tool_choice="required")
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
    vectors = litellm.embedding(
        model=f"openai/{MODEL}", api_base=f"{url}/v1", api_key="none", input=["a", "b"]
    )
    assert len(vectors.data) == 2


def use_langchain_openai(url: str) -> None:
    langchain = import_module("langchain_openai")
    model = langchain.ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=MODEL, max_tokens=200)
    assert model.invoke("hello").content
    assert "".join(chunk.content for chunk in model.stream("hello"))
    assert shape()(**model.with_structured_output(shape()).invoke("hello").model_dump())
    (call,) = (
        model.bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
        .invoke("hello")
        .tool_calls
    )
    assert call["name"] == "weather" and set(call["args"]) == {"city"}
    embeddings = langchain.OpenAIEmbeddings(
        base_url=f"{url}/v1", api_key="none", model=MODEL, check_embedding_ctx_length=False
    )
    assert len(embeddings.embed_documents(["a", "b"])) == 2


def use_instructor(url: str) -> None:
    instructor, openai = import_module("instructor"), import_module("openai")
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=mode)
        value = client.chat.completions.create(
            model=MODEL, messages=HELLO, response_model=shape(), max_tokens=200, max_retries=0
        )
        assert value.kind in ("a", "b")


def use_pydantic_ai_slim(url: str) -> None:
    pydantic_ai = import_module("pydantic_ai")
    openai = import_module("pydantic_ai.models.openai")
    provider = import_module("pydantic_ai.providers.openai").OpenAIProvider(
        base_url=f"{url}/v1", api_key="none"
    )
    for kind in (openai.OpenAIChatModel, openai.OpenAIResponsesModel):
        model = kind(MODEL, provider=provider)
        settings = {"max_tokens": 200}
        assert pydantic_ai.Agent(model, model_settings=settings).run_sync("hello").output
        found = (
            pydantic_ai.Agent(model, output_type=shape(), model_settings=settings).run_sync("hello").output
        )
        assert found.kind in ("a", "b")


def use_openai_agents(url: str) -> None:
    agents, openai = import_module("agents"), import_module("openai")
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    settings = agents.ModelSettings(max_tokens=200)
    tool = agents.function_tool(weather)
    for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        model = kind(MODEL, openai_client=client)
        agent = agents.Agent(
            "one", instructions="Be brief.", model=model, tools=[tool], model_settings=settings
        )
        assert agents.Runner.run_sync(agent, "hello").final_output
        agent = agents.Agent("two", model=model, output_type=shape(), model_settings=settings)
        assert agents.Runner.run_sync(agent, "hello").final_output.kind in ("a", "b")
        asyncio.run(_stream(agents, agents.Agent("three", model=model, model_settings=settings)))


async def _stream(agents: Any, agent: Any) -> None:
    result = agents.Runner.run_streamed(agent, "hello")
    events = [event async for event in result.stream_events()]
    assert events and result.final_output


def use_llm(url: str) -> None:
    models = import_module("llm.default_plugins.openai_models")
    model = models.Chat(
        MODEL, key="none", model_name=MODEL, api_base=f"{url}/v1", supports_tools=True, supports_schema=True
    )
    for stream in (True, False):
        assert model.prompt("hello", stream=stream, key="none", max_tokens=50).text()


def use_anthropic(url: str) -> None:
    anthropic = import_module("anthropic")
    client = anthropic.Anthropic(base_url=url, api_key="none")
    with client.messages.stream(model=MODEL, max_tokens=50, messages=HELLO) as stream:
        said = "".join(stream.text_stream)
        assert said == stream.get_final_text()
    tools = [{"name": "weather", "input_schema": CITY}]
    with client.messages.stream(
        model=MODEL, max_tokens=200, messages=HELLO, tools=tools, tool_choice={"type": "any"}
    ) as stream:
        (called,) = (block for block in stream.get_final_message().content if block.type == "tool_use")
    assert called.input == {"city": "Rome"}
    assert client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens > 0
    assert client.messages.parse(
        model=MODEL, max_tokens=200, messages=HELLO, output_format=shape()
    ).parsed_output


# ----------------------------------------------------------------------------

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def weather(city: Literal["Rome", "Oslo"]) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


def shape() -> Any:
    """A class of pydantic's: what an answer must look like."""
    return import_module("pydantic").create_model("Shape", kind=(Literal["a", "b"], ...), sure=(bool, ...))


USES: dict[str, Callable[[str], None]] = {
    "litellm": use_litellm,
    "langchain-openai": use_langchain_openai,
    "instructor": use_instructor,
    "pydantic-ai-slim": use_pydantic_ai_slim,
    "openai-agents": use_openai_agents,
    "llm": use_llm,
    "anthropic": use_anthropic,
}


def main(url: str, *names: str) -> int:
    """Each in a process of its own, for some change what others see. The number of those that fail."""
    if len(names) == 1:
        try:
            USES[names[0]](url)
        except Exception:
            traceback.print_exc()
            return 1
        return 0
    faults = 0
    for name in names or USES:
        done = subprocess.run(
            [sys.executable, __file__, url, name], env={**os.environ, "OPENAI_API_KEY": "none"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        faults += done.returncode != 0
        print(f"{'FAIL' if done.returncode else 'ok  '} {name} {version(name)}", flush=True)
        if done.returncode:
            print(done.stderr[-3000:])
    return faults


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
