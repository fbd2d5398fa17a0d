"""What only Anthropic's surface has: its schema of an answer, and a conversation without a user."""

from __future__ import annotations

import json

import anthropic
import pytest
from servers import Client, Server

USER = {"role": "user", "content": "hello"}
SCHEMA: dict[str, object] = {"enum": [7, 8]}
FORMAT = {"type": "json_schema", "schema": SCHEMA}


@pytest.mark.parametrize("fields", [{"output_config": {"format": FORMAT}}, {"output_format": FORMAT}])
def test_the_text_follows_the_schema(client: Client, fields: dict[str, object]) -> None:
    answer = client.ok("/v1/messages", messages=[USER], max_tokens=9, **fields)
    assert json.loads(answer["content"][0]["text"]) in (7, 8)


def test_the_sdk_parses_what_it_asked_for(box: Server) -> None:
    with anthropic.Anthropic(base_url=box.address, api_key="none", max_retries=0) as sdk:
        message = sdk.messages.create(
            model="box", max_tokens=9, messages=[{"role": "user", "content": "hello"}],
            output_config={"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
        )  # fmt: skip
    assert message.content[0].type == "text"
    assert json.loads(message.content[0].text) in (7, 8)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema is missing"),
        ({"output_config": {"formats": {}}}, "output_config.formats is no field; did you mean 'format'?"),
        ({"output_config": {"length": 1}}, "output_config.length is not supported"),
        (
            {"output_config": {"format": FORMAT}, "output_format": FORMAT},
            "output_format and output_config.format are two",
        ),
        (
            {"output_format": {"type": "json_schema", "schema": {"not": {}}}},
            "output_format.schema: ",
        ),
    ],
)
def test_a_format_that_cannot_be_is_refused_by_name(
    client: Client, fields: dict[str, object], said: str
) -> None:
    answer = client.post("/v1/messages", messages=[USER], max_tokens=9, **fields)
    assert answer.status == 400
    assert answer.error["message"].startswith(said)
