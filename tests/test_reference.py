"""The engine computes what the reference says, and both read the same weights from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import MIXED_RECIPE, export_small_model, small_weights

from qwen3c.engine import Engine
from qwen3c.format import ModelFile
from qwen3c.reference import forward, load_weights

SHAPES = [
    {"architecture": "qwen2", "head_dim": 16},
    {"architecture": "llama", "head_dim": 16, "tied": False},
    {"architecture": "qwen3_moe", "n_layers": 3, "mlp_only_layers": [1]},
    {"tied": True, "n_heads": 4, "n_kv_heads": 4},
    {
        "tied": False,
        "n_heads": 8,
        "n_kv_heads": 1,
        "head_dim": 16,
        "group_size": 128,
        "dim": 128,
        "hidden_dim": 256,
    },
    {
        "n_layers": 3,
        "n_heads": 6,
        "n_kv_heads": 2,
        "head_dim": 32,
        "rope_theta": 5e6,
        "group_size": 32,
        "dim": 96,
    },
    {
        "n_heads": 32,
        "n_kv_heads": 1,
        "head_dim": 8,
        "dim": 256,
        "hidden_dim": 512,
        "group_size": 256,
        "vocab_size": 499,
    },
    {"group_size": 32, "vocab_size": 499, "recipe": MIXED_RECIPE},
    {"architecture": "qwen3_moe", "group_size": 64, "recipe": MIXED_RECIPE | {"encoding": "int6"}},
]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_small_model(tmp_path_factory.mktemp("model"), context=512, **request.param)


def nmse(x: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sum((x - expected).astype(np.float64) ** 2) / np.sum(expected.astype(np.float64) ** 2))


def test_float_activations_agree_with_the_reference(path: Path) -> None:
    file = ModelFile(path)
    ids = np.random.default_rng(0).integers(0, file.config.vocab_size, 300)  # crosses a KV block
    expected = forward(file.config, load_weights(file), ids)  # type: ignore[arg-type]
    logits = Engine(path, kv="f32", activations="float32").session().forward(ids, logits="all")
    assert nmse(logits, expected) <= 1e-10


@pytest.mark.parametrize(
    "rounded", [{"activations": "int8"}, {"activations": "float32", "kv": "int8"}], ids=str
)
def test_rounding_to_int8_stays_close_to_the_reference(path: Path, rounded: dict[str, Any]) -> None:
    file = ModelFile(path)
    ids = np.random.default_rng(0).integers(0, file.config.vocab_size, 300)
    expected = forward(file.config, load_weights(file), ids)  # type: ignore[arg-type]
    # rounding to 8 bits costs about 1e-4 of a product's energy (group 64); a few layers add up
    assert 1e-6 < nmse(Engine(path, **rounded).session().forward(ids, logits="all"), expected) < 3e-2


def test_weight_returns_what_the_reference_reads(path: Path) -> None:
    file, model = ModelFile(path), Engine(path)
    weights = load_weights(file)
    for tensor in file.tensors:
        for part in tensor.parts:
            assert np.array_equal(model.weight(part.name), weights[part.name]), part.name


def test_stored_weights_are_within_half_a_step_of_the_source(tmp_path: Path) -> None:
    path = export_small_model(tmp_path, group_size=32)
    model = Engine(path)
    for name, source in small_weights().items():
        stored = model.weight(name)
        if source.ndim == 1:
            assert np.array_equal(stored, source), name
            continue
        step = np.abs(source).reshape(len(source), -1, 32).max(axis=2) / 127
        error = np.abs(stored - source).reshape(len(source), -1, 32).max(axis=2)
        assert np.all(error <= 0.5 * step * 1.002 + 1e-12), name  # fp16 rounds the step by up to 2^-11


def test_an_unknown_weight_is_a_key_error(path: Path) -> None:
    with pytest.raises(KeyError, match="nonsense"):
        Engine(path).weight("nonsense")
