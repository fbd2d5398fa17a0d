"""The page of a trace: one file that loads nothing, runs only its own script, and has the engine's numbers.

python -m pytest tests/inspect/test_trace_page.py
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import export_small_model

from qwen3c import Model
from qwen3c.inspect import trace, trace_page

HOSTILE = (
    "</script><script>document.title = 'taken'</script><!-- <script> {{DATA}} {{TITLE}} <img src=x "
    "onerror=alert(1)>"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(str(export_small_model(tmp_path_factory.mktemp("small"), context=1024)))


def text_of(model: Model, prompt: str = "def f(x):\n    return", n: int = 4) -> trace.Text:
    return trace.continue_text(model, model.tokenizer.encode(prompt), n, temperature=0)


class Elements(HTMLParser):
    """Tags, attributes and the text of scripts, as a browser splits a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.scripts: list[str] = []
        self.title = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        if self._inside == "title":
            self.title += data


@pytest.mark.parametrize("prompt", ["def f(x):\n", HOSTILE], ids=["ordinary", "hostile"])
def test_a_page_holds_its_data_and_runs_its_own_script_only(model: Model, prompt: str) -> None:
    data = trace_page.collect(model, text_of(model, prompt))
    page = trace_page.page(prompt, data)
    found = Elements(page)
    assert found.title == prompt + " · trace"
    assert len(found.scripts) == 2
    assert json.loads(found.scripts[0]) == json.loads(json.dumps(data))
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    # nothing is loaded, no handler is in an attribute
    for tag, attributes in found.tags:
        assert tag not in ("img", "link", "iframe", "object", "base")
        assert not any(name.startswith("on") or name in ("src", "href") for name in attributes)
    template = trace_page.PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|innerHTML|eval\(", template)


def test_the_numbers_are_those_of_the_trace(model: Model) -> None:
    text = text_of(model)
    n, c = len(text.ids), model.config
    data, arrays = trace_page.collect(model, text), model.trace(text.ids)
    packed = np.frombuffer(base64.b64decode(data["attention"]), np.uint8).reshape(c.n_layers, c.n_heads, -1)
    rows, columns = np.tril_indices(n)
    for layer in range(c.n_layers):
        p = f"model.layers.{layer}"
        weights = arrays[f"{p}.self_attn.attn_weights"][:, rows, columns]
        assert np.abs(packed[layer] / 255 - np.sqrt(weights)).max() <= 0.51 / 255
        for name, array in [
            ("attention", arrays[f"{p}.self_attn.o_proj"]),
            ("feed_forward", arrays[f"{p}.mlp.down_proj"]),
        ]:
            assert np.allclose(data["norms"][name][layer], np.sqrt((array**2).mean(-1)), rtol=1e-3)
        assert np.allclose(
            data["norms"]["residual"][layer + 1], np.sqrt((arrays[p] ** 2).mean(-1)), rtol=1e-3
        )
    last = data["lens"][-1]
    for i, place in enumerate(data["expected"]):
        assert last["tokens"][i] == place["tokens"][: trace_page.LENS_TOKENS]
        assert last["p"][i] == place["p"][: trace_page.LENS_TOKENS]
    assert last["tokens"][-1] == trace.predict(model, arrays["lm_head"][-1], trace_page.LENS_TOKENS).tokens
    assert {str(id) for id in text.ids} <= {str(id) for id in data["texts"]}


def test_the_routing_of_experts_is_on_the_page(tmp_path: Path) -> None:
    model = Model(
        str(export_small_model(tmp_path, architecture="qwen3_moe", n_experts=8, n_experts_per_token=3))
    )
    text = text_of(model)
    data, arrays = trace_page.collect(model, text), model.trace(text.ids, "*.shares")
    assert data["experts"] == 8 and len(data["routing"]) == len(arrays) > 0
    for (layer, codes), (name, shares) in zip(data["routing"].items(), arrays.items(), strict=True):
        assert name == f"model.layers.{layer}.mlp.gate.shares"
        found = np.frombuffer(base64.b64decode(codes), np.uint8).reshape(len(text.ids), 8)
        assert np.abs(found / 255 - np.sqrt(shares)).max() <= 0.51 / 255


def test_a_page_is_written_whole_and_over_a_page_only(model: Model, tmp_path: Path) -> None:
    target = tmp_path / "trace.html"
    for n in (1, 2):
        size = trace_page.write(model, text_of(model, n=n), str(target))
        assert size == target.stat().st_size
        assert list(tmp_path.iterdir()) == [target]
    (tmp_path / "other.html").write_text("<!doctype html>mine")
    with pytest.raises(ValueError, match="other.html: exists and is not a trace"):
        trace_page.write(model, text_of(model), str(tmp_path / "other.html"))
    assert (tmp_path / "other.html").read_text() == "<!doctype html>mine"
    with pytest.raises(ValueError, match="is a directory"):
        trace_page.write(model, text_of(model), str(tmp_path))


def test_a_text_too_long_for_a_page_is_refused_with_both_numbers(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_page, "MAX_ATTENTION", 2_000_000)
    text = trace.Text([1] * 1000, 1000)
    with pytest.raises(
        ValueError, match="the attention weights of 1000 tokens are 4 MB, a page holds 2 MB of them"
    ):
        trace_page.collect(model, text)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_a_browser_draws_the_page(architecture: str, tmp_path: Path) -> None:
    model = Model(str(export_small_model(tmp_path, architecture=architecture)))
    text = text_of(model, HOSTILE)
    trace_page.write(model, text, str(tmp_path / "trace.html"))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update"]  # fmt: skip
    command = [*browser, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom",
               (tmp_path / "trace.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr
    drawn = Elements(done.stdout)
    chips = [a for tag, a in drawn.tags if "token" in a.get("class", "").split()]
    assert len(chips) == 2 * len(text.ids)  # the text, and what a token looks at
    cells = [tag for tag, _ in drawn.tags if tag == "td"]
    assert len(cells) == len(text.ids) * (model.config.n_layers + 2)
    maps = [attributes.get("id") for tag, attributes in drawn.tags if tag == "canvas"]
    assert maps.count(None) == model.config.n_heads and {"map", "all-tokens", "one-token"} < {*maps}
    routing = next(attributes for tag, attributes in drawn.tags if attributes.get("id") == "routing")
    assert ("hidden" in routing) == (model.config.n_experts == 0)
    assert len(drawn.scripts) == 2 and "taken" not in drawn.title
