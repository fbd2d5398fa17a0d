"""docs/SERVING.md and README: every snippet runs against a real server, every table is the code's."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from api_tables import BOX, PAGE, ROOT, document, replaced, sections
from small_server import Running, serving

from qwen3c.cli.serve import _alias, _application
from qwen3c.serve import config
from qwen3c.serve.config import ModelSettings, Settings, UpstreamSettings
from qwen3c.serve.host import read_servers
from qwen3c.serve.keys import read_keys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = "127.0.0.1:8080"  # where the documents say that a server is
MODEL = "qwen3c-box"
TEXT = PAGE.read_text()
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A block of a document. heading: of the section that it stands in."""

    heading: str
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.heading}-{self.language}".replace(" ", "_")


def snippets(text: str, page: str = "") -> list[Snippet]:
    found = []
    for match in FENCE.finditer(text):
        headings = re.findall(r"^#+ (.*)$", text[: match.start()], re.MULTILINE)
        found.append(Snippet(page + headings[-1], match[1], match[2]))
    return found


SNIPPETS = snippets(TEXT)
IN_README = [one for one in snippets(README, "README ") if "8080" in one.code]


def of(*languages: str) -> list[Snippet]:
    return [one for one in SNIPPETS + IN_README if one.language in languages]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """The server of the documents: the model in the box under the alias that it has without one."""
    app, _ = _application(Settings(models={MODEL: ModelSettings(str(BOX))}, cache_memory=256 << 20), False)
    with serving(app) as running:
        yield running


def there(code: str, server: Running) -> str:
    """The snippet for the address of this server."""
    assert HERE in code
    return code.replace(HERE, f"127.0.0.1:{server.port}")


def test_the_tables_are_those_of_the_code() -> None:
    """If this fails: python tests/serve/api_tables.py."""
    assert replaced(TEXT, sections(document())) == TEXT


def test_every_snippet_is_of_a_kind_that_is_tried() -> None:
    assert {one.language for one in SNIPPETS} == {"sh", "python", "js", "json", "yaml", "toml", "text"}
    assert IN_README


@pytest.mark.parametrize("snippet", of("sh"), ids=str)
def test_shell_snippets_run(snippet: Snippet, server: Running) -> None:
    words = shlex.split(there(snippet.code, server).replace("\\\n", " "))
    if words[0] == "curl":
        answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        assert json.loads(answer.stdout)["choices"][0]["message"]["content"]
    elif words[0] == "docker":
        pairs = itertools.pairwise(words)
        settings = dict(word.split("=", 1) for before, word in pairs if before == "-e")
        assert answers(settings["OPENAI_API_BASE_URL"])
    else:
        assert words[0] == "lm_eval"
        given = dict(one.split("=") for one in words[words.index("--model_args") + 1].split(","))
        assert given["model"] == MODEL
        scored = {"prompt": [[5, 6, 7]], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        body = httpx2.post(given["base_url"], json=scored, timeout=60).json()
        assert len(body["choices"][0]["logprobs"]["token_logprobs"]) == 4
        assert answers(given["base_url"].replace("/v1/completions", "/tokenizer_info"), "")


@pytest.mark.parametrize("snippet", of("python"), ids=str)
def test_python_snippets_run(snippet: Snippet, server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    for name in re.findall(r"^(?:from|import) (\w+)", snippet.code, re.MULTILINE):
        pytest.importorskip(name, reason=f"{name} is not installed")
    exec(there(snippet.code, server), {})
    said = capsys.readouterr().out
    assert said.strip()
    if "json_schema" in snippet.code:
        assert set(json.loads(said)) == {"answer", "points"}


@pytest.mark.parametrize("snippet", of("js"), ids=str)
def test_node_snippets_run(snippet: Snippet, server: Running, tmp_path: Path) -> None:
    """Where node is, and npm's openai: in the node_modules of this folder, or that NODE_PATH names."""
    folders = [Path(os.environ.get("NODE_PATH", "")), ROOT / "node_modules"]
    modules = [folder for folder in folders if (folder / "openai").is_dir()]
    if shutil.which("node") is None or not modules:
        pytest.skip("node or its package openai is not installed")
    (tmp_path / "node_modules").symlink_to(modules[0], target_is_directory=True)
    (tmp_path / "snippet.mjs").write_text(there(snippet.code, server))
    told = subprocess.run(["node", "snippet.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert told.stdout.strip(), told.stderr


def values(table: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of everything that is no table itself."""
    items = table.items() if isinstance(table, dict) else (("", item) for item in table)
    for key, value in items:
        yield key, value
        if isinstance(value, (dict, list)):
            yield from values(value)


def loaded(language: str, text: str) -> Any:
    """The configuration in a snippet."""
    if language == "yaml":
        return yaml.safe_load(text)
    return json.loads(text) if language == "json" else tomllib.loads(text)


def answers(url: str, path: str = "/models") -> bool:
    return bool(httpx2.get(url + path).status_code == 200)


def served(url: str) -> bool:
    """Whether what a client asks first at such an address is answered."""
    if url.endswith("/v1"):
        return answers(url)
    if url.endswith("/mcp"):
        return bool(httpx2.post(url, json={}).status_code == 400)  # it wants JSON-RPC, but it is there
    return answers(url, "/props") and answers(url, "/v1/models")


@pytest.mark.parametrize("snippet", [one for one in of("json", "yaml", "toml") if HERE in one.code], ids=str)
def test_configurations_of_clients_name_an_address_and_a_model_that_are_served(
    snippet: Snippet, server: Running
) -> None:
    table = loaded(snippet.language, there(snippet.code, server))
    found = list(values(table))
    urls = [value for _, value in found if str(value).startswith("http://127.0.0.1")]
    assert urls and all(served(url) for url in urls)
    names = {str(value) for key, value in found if key in ("model", "ANTHROPIC_MODEL")}
    models = {name.removeprefix("qwen3c/") for name in names}
    assert models <= {MODEL}


@pytest.mark.parametrize(
    ("heading", "keys"),
    [
        ("Continue", {"name", "version", "schema", "models"}),
        ("Zed", {"language_models"}),
        ("Claude Code", {"env"}),
        ("Codex", {"model", "model_provider", "model_providers"}),
        ("opencode", {"$schema", "model", "provider"}),
    ],
)
def test_configurations_of_clients_have_the_keys_that_those_read(heading: str, keys: set[str]) -> None:
    for one in SNIPPETS:
        if one.heading == heading:
            assert loaded(one.language, one.code).keys() == keys


def test_what_home_assistant_is_told_is_served(server: Running) -> None:
    (told,) = [one for one in SNIPPETS if one.heading == "Home Assistant"]
    (url,) = re.findall(r"http://\S+", there(told.code, server))
    assert served(url)


def test_files_of_mcp_servers_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_KEY", "secret")
    files = [one.code for one in SNIPPETS if one.heading == "MCP"]
    assert len(files) == 3
    for text in files:
        path = tmp_path / "mcp.json"
        path.write_text(text)
        assert read_servers(str(path))


def test_the_settings_in_the_document_are_all_and_have_their_defaults(tmp_path: Path) -> None:
    (text,) = [one.code for one in SNIPPETS if one.heading == "Settings"]
    path = tmp_path / "serve.toml"
    path.write_text(text)
    said = config.read(str(path))
    made, usual = Settings(**said), Settings()
    assert made == usual
    names = set(re.findall(r"^(?:# )?(\w+) = ", text, re.MULTILINE))
    tables = {"models", "upstream"}
    fields = {one.name for kind in (Settings, UpstreamSettings) for one in dataclasses.fields(kind)}
    assert names - {"small", "large", "fast"} == fields - tables
    path.write_text(re.sub(r"^# (?=\w+ = |\[)", "", text, flags=re.MULTILINE))
    whole = config.read(str(path))
    assert whole.keys() == {one.name for one in dataclasses.fields(Settings)}
    given = {"url": whole["upstream"].url, "model": whole["upstream"].model}
    unset = dict.fromkeys(("requests_per_day", "tokens_per_day", "state_file"))
    told = dataclasses.replace(whole["upstream"], **unset)
    assert told == UpstreamSettings(**given)


def test_the_file_of_keys_can_be_read(tmp_path: Path) -> None:
    (text,) = [one.code for one in SNIPPETS if one.heading == "Keys"]
    path = tmp_path / "keys"
    path.write_text(text)
    assert [key.name for key in read_keys(path)] == ["alice", "editor"]


def test_the_limits_in_the_document_are_the_defaults() -> None:
    usual = Settings()
    said = TEXT.split("\n## Limits\n")[1].split("\n## ")[0]
    for name in re.findall(r"`(\w+)`", said):
        assert hasattr(usual, name), name
        value, row = getattr(usual, name), next(line for line in said.splitlines() if f"`{name}`" in line)
        if isinstance(value, (int, float)) and name != "max_body":
            assert re.search(rf"(?<![\d.]){value:g}(?![\d.])", row), row
    assert "4 MiB" in said and usual.max_body == 4 << 20


def test_every_command_in_the_document_has_options_that_exist() -> None:
    told = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = re.findall(r"(?:python run\.py|qwen3c) ((?:.*\\\n)*.*)", TEXT)
    flags = {word for command in commands for word in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", command)}
    flags |= set(re.findall(r"`(--[a-z-]+)", TEXT))
    elsewhere = {"--network"}  # docker's
    assert len(flags) > 10
    for flag in flags - elsewhere:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", told), flag


def test_models_in_the_snippets_are_the_one_in_the_box(server: Running) -> None:
    listed = httpx2.get(f"http://127.0.0.1:{server.port}/v1/models").json()
    assert [one["id"] for one in listed["data"]] == [MODEL]
    assert _alias(str(BOX)) == MODEL


@pytest.mark.parametrize(
    ("schema", "dropped"),
    [
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if, then"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "zzz"}, "format"),
        ({"$ref": "http://x/y"}, "$ref"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ],
)
def test_schemas_are_refused_and_loosened_as_the_document_says(
    schema: dict[str, Any], dropped: str, server: Running
) -> None:
    section = TEXT.split("\n## Structured output and tools\n")[1].split("\n## ")[0]
    assert f"`{dropped.split(', ')[0]}`" in section
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for strict, status in ((True, 400), (False, 200)):
        wanted = {"name": "a", "schema": schema, "strict": strict}
        format = {"type": "json_schema", "json_schema": wanted}
        answer = httpx2.post(url, json=body | {"response_format": format}, timeout=60)
        assert answer.status_code == status
    assert answer.headers.get("x-qwen3c-dropped") == dropped
