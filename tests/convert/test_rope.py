"""A rotary embedding is read in every spelling, and its frequencies are those of the papers.

python -m pytest tests/convert/test_rope.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3c.convert.rope import inverse_frequencies, read_rope
from qwen3c.convert.source import Keys


@pytest.mark.parametrize(("head_dim", "theta"), [(32, 1e4), (128, 1e6), (128, 5e6)])
def test_inverse_frequencies_follow_the_paper(head_dim: int, theta: float) -> None:
    keys = Keys(Path("config.json"), {"rope_theta": theta})
    found = inverse_frequencies(read_rope(keys, head_dim))
    assert found.dtype == np.float32
    expected = [np.float32(theta ** (-2 * i / head_dim)) for i in range(head_dim // 2)]
    np.testing.assert_array_max_ulp(found, np.array(expected, np.float32), 1)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0}},
    ],
)
def test_every_spelling_of_a_rope_is_understood(keys: dict[str, Any]) -> None:
    rope = read_rope(Keys(Path("config.json"), keys), 32)
    assert (rope.type, rope.theta, rope.attention_scale) == ("default", 1e6, 1.0)
