"""Model.trace, and the output of inspect/trace.py; tests/test_oracle.py compares activations with
transformers.

python -m pytest tests/inspect/test_trace.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_models import export_small_model, small_weights

from qwen3c import Model, engine
from qwen3c.inspect import trace

Arrays = dict[str, NDArray[np.float32]]


def random_ids(model: engine.Engine, n: int) -> NDArray[np.int64]:
    return np.random.default_rng(n).integers(0, model.config.vocab_size, n)


# ----------------------------------------------------------------------------
# Invariants


def equal(a: Arrays, b: Arrays) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", [{}, {"activations": "float32"}, {"kv": "int8"}], ids=str)
def test_a_trace_has_the_bits_of_the_forward_pass(kind: dict[str, Any], tmp_path: Path) -> None:
    model = engine.Engine(str(export_small_model(tmp_path, context=512)), **kind)
    ids = random_ids(model, 300)
    logits = model.session().forward(ids, logits="all")
    trace = model.trace(ids)
    assert np.array_equal(trace["lm_head"], logits)
    assert np.array_equal(model.session().forward(ids, logits="all"), logits)
    # a token sees nothing of those after it
    shorter = model.trace(ids[:100])
    assert all(
        np.array_equal(trace[name][:100], array) for name, array in shorter.items() if "attn" not in name
    )
    name = "model.layers.1.self_attn.attn_weights"
    assert np.array_equal(trace[name][:, :100, :100], shorter[name])


def test_threads_and_instruction_sets_trace_the_same_bits(tmp_path: Path) -> None:
    path = str(export_small_model(tmp_path, context=512, dim=256, hidden_dim=512, n_heads=6))
    ids = random_ids(engine.Engine(path), 300)
    expected = engine.Engine(path, threads=1).trace(ids)
    usual = engine.isa()
    try:
        for isa in engine.runnable_isas():
            engine.set_isa(isa)
            assert equal(engine.Engine(path, threads=2).trace(ids), expected), isa
    finally:
        engine.set_isa(usual)


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_attention_weights_are_probabilities_of_what_a_token_sees(kv: engine.KV, tmp_path: Path) -> None:
    model = engine.Engine(str(export_small_model(tmp_path, context=1024)), kv=kv)
    for name, weights in model.trace(random_ids(model, 600), "*.attn_weights").items():
        assert weights.shape == (4, 600, 600), name
        assert np.all(weights >= 0)
        assert np.allclose(weights.sum(-1), 1, atol=1e-5)
        assert not np.triu(weights, 1).any()


def test_the_logit_lens_after_the_last_layer_is_the_logits(tmp_path: Path) -> None:
    model = engine.Engine(str(export_small_model(tmp_path, context=512)))
    trace = model.trace(random_ids(model, 300))
    assert np.array_equal(model.logit_lens(trace["model.layers.1"]), trace["lm_head"])
    assert not np.array_equal(model.logit_lens(trace["model.layers.0"]), trace["lm_head"])


def test_names_choose_what_is_kept(tmp_path: Path) -> None:
    model = engine.Engine(str(export_small_model(tmp_path)))
    whole = model.trace([1, 2, 3])
    for names in (
        "model.layers.0.*",
        "*.k_proj",
        "lm_head",
        "*.down_proj.input",
        ["model.norm", "model.layers.1"],
    ):
        some = model.trace([1, 2, 3], names)
        assert some
        assert all(np.array_equal(array, whole[name]) for name, array in some.items())
    assert list(model.trace([1, 2], "*.k_proj")) == [
        f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 1)
    ]


def test_what_cannot_be_traced_is_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = engine.Engine(str(export_small_model(tmp_path)))
    with pytest.raises(ValueError, match="no activation of this model is called 'layers.0'"):
        model.trace([1], "layers.0")
    with pytest.raises(ValueError, match="257 more ids from position 0 pass the context of 256"):
        model.trace([1] * 257)
    with pytest.raises(ValueError, match=r"token id 512 is outside 0\.\.511"):
        model.trace([512])
    with pytest.raises(ValueError, match=r"x must have shape \(n, 64\), n >= 1, got \(1, 65\)"):
        model.logit_lens(np.zeros((1, 65)))
    monkeypatch.setattr("qwen3c.engine.engine.available", lambda: 1000)
    with pytest.raises(ValueError, match=r"the trace of 4 tokens takes [\d,]+ bytes, 1,000 are available"):
        model.trace([1, 2, 3, 4])
    model.session().forward([1, 2, 3])


# ----------------------------------------------------------------------------
# What is said of it


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(str(export_small_model(tmp_path_factory.mktemp("small"), n_layers=3)))


def text_of(model: Model, prompt: str = "def f(x):", n: int = 3) -> trace.Text:
    return trace.continue_text(model, model.tokenizer.encode(prompt), n, temperature=0)


def test_the_flow_names_every_module_once_with_its_shapes(small: Model) -> None:
    text = text_of(small)
    n, shown = len(text.ids), list(trace.lines(small, text, "input_flow"))
    for name, array in small.trace(text.ids).items():
        if name.startswith(("model.layers.1", "model.layers.2")):
            continue
        module = name.removeprefix("model.layers.0").removeprefix(".") or "x"
        line = next(line for line in shown if line.split()[:1] == [module])
        assert re.search(rf"-> \({', '.join(map(str, array.shape))}\) ", line), name
    assert "model.layers.1 to model.layers.2: likewise" in shown
    assert any(re.search(rf"^model.embed_tokens +\({n}\) +-> \({n}, 64\)", line) for line in shown)
    assert any(re.search(rf"^  self_attn.o_proj +\({n}, 128\) +-> \({n}, 64\)", line) for line in shown)


def test_every_token_after_the_prompt_has_its_probability_and_the_alternatives(small: Model) -> None:
    text = text_of(small)
    assert len(text.ids) == text.n_prompt + 3
    expected = trace.alternatives(small, text, small.trace(text.ids)["lm_head"])
    events = list(small.generate(text.ids[: text.n_prompt], 3, temperature=0, logprobs=trace.ALTERNATIVES))
    for place, event in zip(expected[text.n_prompt - 1 :], events, strict=True):
        assert place.tokens == [id for id, _ in event.top_logprobs]  # type: ignore[union-attr]
        assert np.allclose(place.probabilities, np.exp([p for _, p in event.top_logprobs]), rtol=1e-4)  # type: ignore[union-attr]
        assert place.chance == pytest.approx(np.exp(event.logprob), rel=1e-4)  # type: ignore[arg-type]
    shown = list(trace.lines(small, text, "compact"))
    chances = [float(re.search(r"([\d.]+)%   else ", line)[1]) for line in shown if "   else " in line]  # type: ignore[index]
    assert chances == [pytest.approx(100 * place.chance, abs=0.06) for place in expected[text.n_prompt - 1 :]]  # type: ignore[operator]


def test_the_ranges_are_those_of_the_arrays(small: Model) -> None:
    text = text_of(small)
    told = trace.describe(small, text, "verbose")
    arrays, exact = small.trace(text.ids), trace.exact_trace(small, text.ids)
    assert [entry["name"] for entry in told["activations"]] == list(arrays)
    for entry in told["activations"]:
        array = arrays[entry["name"]].astype(np.float64)
        assert entry["shape"] == array.shape and entry["bytes"] == 4 * array.size
        figures = [entry["minimum"], entry["maximum"], entry["mean"], entry["std"], entry["rms"]]
        wanted = [array.min(), array.max(), array.mean(), array.std(), np.sqrt(np.mean(array**2))]
        assert np.allclose(figures, wanted, rtol=1e-4, atol=1e-6), entry["name"]
        off = array - exact[entry["name"]]
        assert entry["error"] == pytest.approx(np.sqrt(np.sum(off**2) / np.sum(array**2)), rel=0.05)
    errors = {entry["name"]: entry["error"] for entry in told["activations"]}
    assert errors["model.embed_tokens"] == 0 and 1e-4 < errors["lm_head"] < 0.1
    json.dumps(told)


def test_the_weights_have_their_statistics_and_rounding_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"dim": 128, "vocab_size": 501, "tied": False}
    model = engine.Engine(str(export_small_model(tmp_path, **shape)))
    monkeypatch.setattr(trace, "SLICE_WEIGHTS", 5000)
    source = small_weights(**shape)
    tensors = {tensor.name: tensor for tensor in model.file.tensors}
    told = list(trace.weights(model.file))
    assert {weight.name for weight in told} == {name for name, tensor in tensors.items() if tensor.parts}
    for weight in told:
        parts = [part.name for part in tensors[weight.name].parts]
        stored = np.concatenate([model.weight(name) for name in parts]).astype(np.float64)
        s = weight.statistics
        assert np.allclose([s.minimum, s.maximum, s.mean, s.std],
                           [stored.min(), stored.max(), stored.mean(), stored.std()],
                           rtol=1e-3, atol=1e-6)  # fmt: skip
        lost = np.sqrt(
            np.sum((stored - np.concatenate([source[name] for name in parts])) ** 2) / np.sum(stored**2)
        )
        assert weight.error == pytest.approx(lost, rel=0.1), weight.name


def test_routing_counts_the_tokens_of_each_expert(tmp_path: Path) -> None:
    shape = {"architecture": "qwen3_moe", "n_experts": 8, "n_experts_per_token": 3, "n_layers": 3}
    model = Model(str(export_small_model(tmp_path, **shape)))  # type: ignore[arg-type]
    text = text_of(model, "def f(x):\n    return x")
    arrays = model.trace(text.ids)
    counts = trace.routing(arrays)
    assert list(counts) == [f"model.layers.{layer}" for layer in range(3) if model.config.has_experts(layer)]
    for layer, tokens in counts.items():
        logits = arrays[f"{layer}.mlp.gate"]
        chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :3]
        assert np.array_equal(tokens, np.bincount(chosen.ravel(), minlength=8))
        assert tokens.sum() == 3 * len(text.ids)
    shown = list(trace.lines(model, text, "compact"))
    for layer, tokens in counts.items():
        line = next(line for line in shown if re.match(rf"{layer} +\d+ +\d+: ", line))
        bars = line.split("  ")[-1]
        assert len(bars) == 8 and bars[tokens.argmax()] == "█"
        assert [bar == "·" for bar in bars] == (tokens == 0).tolist()
        assert f"{tokens.argmax()}: {tokens.max()}" in line
    assert trace.describe(model, text, "compact")["routing"] == {k: v.tolist() for k, v in counts.items()}
    assert any(
        "router: a logit for each of 8 experts" in line for line in trace.lines(model, text, "input_flow")
    )
    list(trace.lines(model, text, "verbose"))


@pytest.mark.parametrize("level", trace.LEVELS)
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_every_level_fits_80_columns_whatever_the_text(level: str, architecture: str, tmp_path: Path) -> None:
    model = Model(str(export_small_model(tmp_path, architecture=architecture)), threads=1)
    long = model.tokenizer.encode("a prompt much longer than a line of any terminal. " * 4)
    for prompt in (long[:2], long):
        shown = list(trace.lines(model, trace.continue_text(model, prompt, 4, seed=1), level))
        assert not [line for line in shown if len(line) > 79]
        assert "".join(trace.token_text(model, id) for id in prompt) in re.sub(r"[|\s]", "", "".join(shown))


def test_what_cannot_be_seen_is_written_out(small: Model) -> None:
    assert [trace.token_text(small, id) for id in small.tokenizer.encode("漢")] == ["\\xe6", "\\xbc", "\\xa2"]
    assert trace.visible(" a\tb\n") == "·a⇥b↵"
    assert trace.visible("\x1b[31m\u202e\x00é漢") == "\\u{1b}[31m\\u{202e}\\u{0}é漢"
