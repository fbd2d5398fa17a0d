"""What an int8 KV cache costs the model in the box.

tests/test_run.py holds the figure itself to the logits. python -m pytest tests/test_perplexity.py
"""

from __future__ import annotations

from pathlib import Path

import qwen3c
from qwen3c.perplexity import measure

PACKAGE = Path(qwen3c.__file__).parent


def test_an_int8_cache_costs_at_most_one_percent_of_perplexity() -> None:
    found = {}
    for kv in ("f16", "int8"):
        model = qwen3c.Model(str(PACKAGE / "data" / "model.bin"), kv=kv)
        # Python source, which is what it was trained on
        ids = model.tokenizer.encode((PACKAGE / "export.py").read_text())[:5000]
        found[kv] = measure(model, ids, window=2048).perplexity
    print(found)
    assert len(ids) == 5000
    assert found["int8"] != found["f16"]
    assert found["int8"] <= 1.01 * found["f16"]
