"""What every endpoint shares."""

from __future__ import annotations

import pytest
from servers import Client

from qwen3c.serve.api import header_text


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("zzz", "zzz"),
        ("", ""),
        (" ", ""),
        (" zzz ", "zzz"),
        ("é\r\nx: y", "???x: y"),
        ("x " * 300, "x " * 99 + "x"),
    ],
)
def test_the_name_of_a_field_that_nobody_knows_comes_back_as_a_header_can_hold_it(
    client: Client, name: str, header: str
) -> None:
    """An empty one did end the connection: a header's value neither begins nor ends with a space."""
    answer = client.http.post("/tokenize", json={"prompt": "x", name: 1})
    assert answer.status_code == 200
    assert answer.headers["x-qwen3c-ignored"] == header


def test_several_unknown_names_are_one_header(client: Client) -> None:
    answer = client.http.post("/tokenize", json={"prompt": "x", "yyy": 1, "": 2})
    assert answer.headers["x-qwen3c-ignored"] == "yyy,"
    assert header_text("a\x00b\x7f") == "a?b?"
