"""What an int8 KV cache costs a trained model; tests/cli/test_modes.py holds the figure itself to the logits.

python -m pytest tests/inspect/test_perplexity.py
"""

from __future__ import annotations

from pathlib import Path

from small_models import TINY_QWEN3

from qwen3c import Model, format
from qwen3c.inspect.perplexity import measure


def test_an_int8_cache_costs_at_most_one_percent_of_perplexity() -> None:
    found = {}
    # Python source, which is what it was trained on
    text = Path(format.__file__).read_text()
    for kv in ("f16", "int8"):
        model = Model(str(TINY_QWEN3), kv=kv)
        ids = model.tokenizer.encode(text)[:5000]
        found[kv] = measure(model, ids, window=2048).perplexity
    assert len(ids) == 5000
    assert found["int8"] != found["f16"]
    assert found["int8"] <= 1.01 * found["f16"]
