"""Options of -m serve on their way to the settings.

python -m pytest tests/cli/test_serve.py
"""

from __future__ import annotations

import dataclasses

import pytest

from qwen3c.cli.options import USED_BY
from qwen3c.cli.run import main
from qwen3c.cli.serve import SETTINGS, UPSTREAM
from qwen3c.serve.config import Settings


def test_no_option_that_serve_takes_is_dropped() -> None:
    taken = {option for option, modes in USED_BY.items() if "serve" in modes}
    assert taken == {*SETTINGS, *UPSTREAM, "config", "print_config", "bits"}
    assert set(SETTINGS.values()) <= {item.name for item in dataclasses.fields(Settings)}


def test_offline_and_servers_of_tools_are_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "serve", "--offline", "--mcp", "tools.json", "--print-config"]) == 0
    said = capsys.readouterr().out
    assert "offline = true" in said and '/tools.json"' in said
