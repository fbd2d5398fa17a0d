"""A trace as one page to look at: `run.py -m trace --html FILE`.

data/trace.html is the page; this module puts the numbers into it. The page loads nothing, and its content
security policy lets no script run but its own. Text of the model or the user is embedded
as JSON and shown as text, never as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..format import Config
from ..model import Model
from ..system.files import write_whole
from .trace import Array, Text, alternatives, predict, token_text

PAGE = Path(__file__).parents[1] / "data" / "trace.html"
FIRST_LINE = "<!doctype html><!-- a trace by qwen3c -->"
MAX_ATTENTION = 16 << 20  # attention weights in a page, one byte each
LENS_TOKENS = 5  # predictions shown after each layer
LENS_ROWS = 64  # positions whose logits are held at once
NAMES = (
    "model.embed_tokens",
    "model.layers.*[0-9]",
    "*.attn_weights",
    "*.o_proj",
    "*.down_proj",
    "*.experts",
    "*.shares",
    "lm_head",
)


def check_target(path: str) -> None:
    """ValueError if `path` cannot be written, or holds something that is not a trace."""
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{path}: is a directory; name the file to write")
    if not target.parent.is_dir():
        raise ValueError(f"{path}: there is no directory {target.parent}")
    if target.exists():
        with open(target, "rb") as file:
            if file.read(len(FIRST_LINE)) != FIRST_LINE.encode():
                raise ValueError(f"{path}: exists and is not a trace; nothing but a trace is written over")


def check_size(config: Config, n: int) -> None:
    """ValueError if the attention weights of n tokens are too many for a page."""
    size = config.n_layers * config.n_heads * n * (n + 1) // 2
    if size > MAX_ATTENTION:
        limit = f"a page holds {MAX_ATTENTION / 1e6:.0f} MB of them"
        raise ValueError(
            f"the attention weights of {n} tokens are {size / 1e6:.0f} MB, {limit}; shorten the text"
        )


def write(model: Model, text: Text, path: str) -> int:
    """Write the page of `text` to `path`, whole or not at all; returns its size in bytes."""
    check_target(path)
    content = page(model.metadata["name"], collect(model, text))
    write_whole(Path(path), content)
    return len(content.encode())


def page(title: str, data: dict[str, Any]) -> str:
    """The HTML of a page that shows `data`, complete in itself."""
    template = FIRST_LINE + PAGE.read_text(encoding="utf-8").removeprefix("<!doctype html>")
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # inside <script type="application/json"> only a "<" could end the block or begin a comment
    numbers = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    values = {"TITLE": html.escape(title), "SCRIPT_HASH": f"sha256-{digest}", "DATA": numbers}
    return re.sub(r"\{\{(TITLE|SCRIPT_HASH|DATA)\}\}", lambda match: values[match[1]], template)


def collect(model: Model, text: Text) -> dict[str, Any]:
    """Everything the page shows, as plain data."""
    c = model.config
    check_size(c, len(text.ids))
    trace = model.trace(text.ids, NAMES)
    expected = alternatives(model, text, trace["lm_head"])
    streams = [trace["model.embed_tokens"], *(trace[f"model.layers.{layer}"] for layer in range(c.n_layers))]
    lens = [_lens(model, stream) for stream in streams]
    shown = {*text.ids, *(id for place in expected for id in place.tokens)}
    shown.update(id for layer in lens for place in layer["tokens"] for id in place)
    return {
        "name": model.metadata["name"],
        "layers": c.n_layers,
        "heads": c.n_heads,
        "kv_heads": c.n_kv_heads,
        "dim": c.dim,
        "parameters": c.n_parameters,
        "group_size": c.group_size,
        "activations": model.activations,
        "prompt": text.n_prompt,
        "tokens": text.ids,
        "texts": {id: token_text(model, id) for id in sorted(shown)},
        "expected": [
            {"tokens": place.tokens, "p": _rounded(place.probabilities), "chance": place.chance}
            for place in expected
        ],
        "lens": lens,
        "norms": {
            "residual": [_rms(stream) for stream in streams],
            "attention": [
                _rms(trace[f"model.layers.{layer}.self_attn.o_proj"]) for layer in range(c.n_layers)
            ],
            "feed_forward": [_rms(trace[_feed_forward(c, layer)]) for layer in range(c.n_layers)],
        },
        "attention": _packed(
            trace[f"model.layers.{layer}.self_attn.attn_weights"] for layer in range(c.n_layers)
        ),
        "experts": c.n_experts,
        "routing": {
            layer: base64.b64encode(_square_roots(trace[f"model.layers.{layer}.mlp.gate.shares"])).decode()
            for layer in range(c.n_layers)
            if c.has_experts(layer)
        },
    }


def _feed_forward(c: Config, layer: int) -> str:
    """The name of the activation that this layer's feed-forward adds to the residual stream."""
    return f"model.layers.{layer}.mlp.{'experts' if c.has_experts(layer) else 'down_proj'}"


def _lens(model: Model, stream: Array) -> dict[str, Any]:
    """The logit lens: the likeliest next tokens if no layer came after these rows (n, dim)."""
    places = [
        predict(model, row, LENS_TOKENS)
        for start in range(0, len(stream), LENS_ROWS)
        for row in model.logit_lens(stream[start : start + LENS_ROWS])
    ]
    return {
        "tokens": [place.tokens for place in places],
        "p": [_rounded(place.probabilities) for place in places],
    }


def _rms(rows: Array) -> list[float]:
    return _rounded(np.sqrt(np.mean(np.square(rows, dtype=np.float64), axis=-1)).tolist())


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _packed(layers: Iterable[Array]) -> str:
    """Attention weights (n_heads, n, n) of all layers in base64: a byte, 255 sqrt(p), for each pair seen."""
    seen = []
    for weights in layers:
        rows, columns = np.tril_indices(weights.shape[-1])
        seen.append(_square_roots(weights[:, rows, columns]))
    return base64.b64encode(b"".join(seen)).decode()


def _square_roots(shares: Array) -> bytes:
    """255 sqrt(share) in a byte each; the root makes small shares visible."""
    return np.round(255 * np.sqrt(shares)).astype(np.uint8).tobytes()
